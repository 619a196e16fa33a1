"""``moec.drop_dead_experts``: experts that can never be chosen leave a model, with their weights.

An expert is dead where its entry in a vector of E numbers beside the router (a bias on the logits, or one for the
selection alone) is -inf, or where the user says so. Its rows leave the stacked expert weights, the router's weight and
those vectors, and every count of experts is lowered. Nothing here knows a model's class: blocks are found by
transformers' experts interface and by shapes, and each one is run on random tokens before and after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moec.ir.errors import MoecError, nearest
from moec.readiness.experts import followers
from moec.sizes import size_text

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
_GROUPS = ("n_group", "num_group", "n_groups", "num_expert_group")
_CHOSEN = ("top_k", "num_experts_per_tok", "moe_k")
_FEWEST_IN_A_GROUP = 2
"""A group may be worth its best two experts."""
_CHECKED_TOKENS = 64
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_NARROW_TOLERANCE = 3e-2
"""Largest |difference| of the block's output before and after, over the largest |output|."""


class DeadExpertsError(MoecError):
    """Experts that were to be dropped and cannot be."""

    code = "dead-experts"


@dataclass(frozen=True)
class DroppedExperts:
    """What left one block.

    Attributes:
        name: Dotted path of the experts module.
        dead: Numbers that the dropped experts had.
        left: How many experts there are now.
        freed: Bytes of their weights.
    """

    name: str
    dead: tuple[int, ...]
    left: int
    freed: int


@dataclass
class DeadExpertsReport:
    """The answer of :func:`drop_dead_experts`."""

    blocks: list[DroppedExperts] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def freed(self) -> int:
        """Bytes given back."""
        return sum(b.freed for b in self.blocks)

    def __str__(self) -> str:
        lines = [f"{b.name}: {len(b.dead)} experts dropped, {b.left} left" for b in self.blocks]
        total = f"{size_text(self.freed)} of weights are freed" if self.blocks else "no expert is dead"
        return "\n".join([*lines, total, *(f"note: {n}" for n in self.notes)])


def drop_dead_experts(model: nn.Module, dead: Mapping[str, Sequence[int]] | None = None) -> DeadExpertsReport:
    """Take experts that can never be chosen out of a model, in place.

    Without ``dead`` the model computes what it did. An expert that ``dead`` names is dropped as if its logit were -inf:
    a softmax over all experts is then one over the rest. Parameters keep their identity and lose rows, so an optimizer
    with state for them must be made anew, and a checkpoint of the full shape no longer loads.

    Args:
        model: Its experts follow transformers' experts interface, stacked in one tensor for each projection.
        dead: Numbers of experts to drop by dotted path of their experts module, beside those that are -inf.

    Returns:
        What left, and how much memory that was.

    Raises:
        MoecError: A path or number that does not exist, or a block that cannot go without these experts: not as many
            in each group, fewer than a token chooses, weights that are not stacked, a router that is not found, or a
            result that would differ. The model is then as it was.
    """
    known = followers(model)
    for path in dead or {}:
        if path not in known:
            raise DeadExpertsError(f"{path!r} is no experts module of the model", hint=nearest(path, known))
    report, undo = DeadExpertsReport(), _Changes()
    try:
        for path, experts in known.items():
            block = _Block.find(model, path, experts, bool(dead and path in dead))
            if block is not None and (gone := block.dead((dead or {}).get(path, ()))):
                report.blocks.append(_drop(block, gone, undo, exact=path not in (dead or {})))
        _lower_configs(model, known, undo, report)
    except BaseException:
        undo.back()
        raise
    return report


class _Changes:
    """Everything that was changed, to be put back if a later block cannot be."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.numbers: list[tuple[Any, str, int]] = []

    def keep_rows(self, tensor: Tensor, rows: Tensor, dim: int) -> int:
        """Shorten a tensor; the bytes that this frees."""
        self.tensors.append((tensor, tensor.data, tensor.grad))
        before, grad = tensor.nbytes, tensor.grad
        tensor.grad = None
        tensor.data = tensor.data.index_select(dim, rows)
        if grad is not None:
            tensor.grad = grad.index_select(dim, rows)
        return before - tensor.nbytes

    def set(self, owner: Any, name: str, number: int) -> None:
        self.numbers.append((owner, name, getattr(owner, name)))
        setattr(owner, name, number)

    def back(self) -> None:
        for owner, name, number in reversed(self.numbers):
            setattr(owner, name, number)
        for tensor, data, grad in reversed(self.tensors):
            tensor.grad = None
            tensor.data = data
            tensor.grad = grad


@dataclass(frozen=True)
class _Block:
    """One block: its experts, its router, and vectors with an entry for each expert."""

    path: str
    owner: nn.Module
    experts: nn.Module
    router: nn.Module
    count: int
    vectors: tuple[Tensor, ...]

    @staticmethod
    def find(model: nn.Module, path: str, experts: nn.Module, wanted: bool) -> _Block | None:
        """The block of an experts module; None where there is none that could be read and none is ``wanted``.

        Raises:
            DeadExpertsError: It is wanted and cannot be read.
        """
        owner = model.get_submodule(path.rpartition(".")[0])
        count = next((n for name in _COUNTS if isinstance(n := getattr(experts, name, None), int)), None)
        routers = [] if count is None else list(_routers(owner, experts, count))
        if count is None or len(routers) != 1:
            if wanted:
                raise DeadExpertsError(f"{path}: {len(routers)} routers are found beside its experts, not one")
            return None
        tensors = [*owner.parameters(recurse=False), *owner.buffers(recurse=False)]
        tensors += [*routers[0].parameters(), *routers[0].buffers()]
        vectors = tuple({id(t): t for t in tensors if t.numel() == count and t.shape[-1] == count}.values())
        return _Block(path, owner, experts, routers[0], count, vectors)

    def dead(self, named: Sequence[int]) -> list[int]:
        """The experts to drop, ascending."""
        if wrong := [n for n in named if not 0 <= n < self.count]:
            raise DeadExpertsError(f"{self.path} has no expert {wrong[0]}: it holds {self.count}")
        found = {int(n) for v in self.vectors for n in torch.isneginf(v.detach().flatten()).nonzero()}
        return sorted(found | set(named))

    def number(self, names: Sequence[str]) -> int | None:
        """A number that the router or its owner goes by."""
        places = (self.router, self.owner)
        return next((n for m in places for name in names if isinstance(n := getattr(m, name, None), int)), None)


def _routers(owner: nn.Module, experts: nn.Module, count: int) -> Iterator[nn.Module]:
    inside = set(experts.modules())
    for module in owner.modules():
        weight = getattr(module, "weight", None)
        if module in inside or not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] != count:
            continue
        if isinstance(module, nn.Linear) or any(getattr(module, name, None) == count for name in _COUNTS):
            yield module


def _drop(block: _Block, dead: list[int], undo: _Changes, *, exact: bool) -> DroppedExperts:
    left = [n for n in range(block.count) if n not in set(dead)]
    _check(block, left)
    before = _run(block) if exact else None
    rows = torch.tensor(left)
    freed = 0
    for parameter in block.experts.parameters(recurse=False):
        freed += undo.keep_rows(parameter, rows.to(parameter.device), 0)
    weight = block.router.weight
    assert isinstance(weight, Tensor)
    freed += undo.keep_rows(weight, rows.to(weight.device), 0)
    for vector in block.vectors:
        freed += undo.keep_rows(vector, rows.to(vector.device), vector.dim() - 1)
    for module in (block.experts, block.owner, *block.router.modules()):
        for name in (*_COUNTS, "out_features"):
            if getattr(module, name, None) == block.count and (name in _COUNTS or module is block.router):
                undo.set(module, name, len(left))
    after = _run(block)
    if before is not None:
        error = float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))
        if not error <= _TOLERANCE.get(weight.dtype, _NARROW_TOLERANCE):
            raise DeadExpertsError(
                f"{block.path}: without its experts {dead} the block gives another result ({error:.1e} off)",
                hint="a softmax over all experts counts those that cannot be chosen; name them in `dead` to prune them",
            )
    return DroppedExperts(block.path, tuple(dead), len(left), freed)


def _check(block: _Block, left: list[int]) -> None:
    """Refuse what the block's code could not run, or what does not lie as it is taken to."""
    for name, parameter in block.experts.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter or parameter.shape[:1] != (block.count,):
            raise DeadExpertsError(f"{block.path}.{name} does not hold {block.count} experts one after another")
    chosen = block.number(_CHOSEN)
    if not left or (chosen is not None and chosen > len(left)):
        raise DeadExpertsError(f"{block.path}: {len(left)} experts would be left, a token chooses {chosen or 'some'}")
    groups = block.number(_GROUPS) or 1
    if groups > 1:
        sizes = [sum(n * groups // block.count == g for n in left) for g in range(groups)]
        if len(set(sizes)) > 1 or sizes[0] < _FEWEST_IN_A_GROUP:
            raise DeadExpertsError(
                f"{block.path}: its {groups} groups of experts would hold {', '.join(map(str, sizes))}",
                hint="groups must stay equally large, with two experts or more; drop as many of each",
            )


@torch.no_grad()
def _run(block: _Block) -> Tensor:
    """The block's output for random tokens, the same ones every time, outside of training."""
    weight = block.router.weight
    assert isinstance(weight, Tensor)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1, _CHECKED_TOKENS, weight.shape[1], generator=gen)
    like = next(block.experts.parameters())
    training = [m for m in block.owner.modules() if m.training]
    block.owner.eval()
    try:
        out = block.owner(x.to(like.device, like.dtype))
    except Exception as error:  # the user's module, called in a way of our own
        raise DeadExpertsError(
            f"{block.path}: its block does not run by itself, to be checked: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True
    found = out[0] if isinstance(out, tuple) else out
    if not isinstance(found, Tensor) or not found.is_floating_point() or not bool(torch.isfinite(found).all()):
        raise DeadExpertsError(f"{block.path}: its block gives no finite numbers for random tokens")
    return found.double()


def _lower_configs(model: nn.Module, known: Mapping[str, nn.Module], undo: _Changes, report: DeadExpertsReport) -> None:
    """Let configs and whole models say how many experts there are, where that is one number."""
    if not report.blocks:
        return
    left = {b.left for b in report.blocks}
    counts = {len(b.dead) + b.left for b in report.blocks}
    if len(report.blocks) != len(known) or len(left) != 1 or len(counts) != 1:
        report.notes.append("blocks hold different numbers of experts now, and the config cannot say so")
        return
    owners = {id(o): o for m in model.modules() for o in (m, getattr(m, "config", None)) if o is not None}
    for owner in owners.values():
        for name in _COUNTS:
            if vars(owner).get(name) == next(iter(counts)):
                undo.set(owner, name, next(iter(left)))
