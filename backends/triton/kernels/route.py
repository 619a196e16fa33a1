"""The kernel of a router: scores, bias, groups, top k, renormalisation and scale in one pass over the logits.

Experts are chosen by integer keys that are in the order of what the selection goes by, NaN above all: no logits,
whatever they are, give an id out of range or one twice. Of equal ones the first is taken. Groups lie next to each
other, each padded to a power of two columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moec.backends import routers
from moec.backends.calls import UnsupportedError
from moec.backends.triton.kernels.dtypes import POINTERS, TL_TYPES, number, rounded
from moec.backends.triton.kernels.rows import padded
from moec.backends.triton.kernels.source import kernel_file
from moec.backends.triton.kernels.text import Argument, Kernel, KernelFile, cdiv, function
from moec.ir.core import Op

MOST_EXPERTS = 4096
"""Columns that a program holds."""
_GONE = "-0x80000000"
_HELPERS = '''\
@triton.jit
def keys(x):
    """Integers in the order of x, NaN above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def best_of(key, column):
    """The column of the largest key of each row, the first of equal ones."""
    return tl.min(tl.where(key == tl.max(key, 1)[:, None], column, 0x7FFFFFFF), 1)[:, None]
'''


@dataclass(frozen=True)
class Router(routers.Router):
    """What the kernel is generated for, and how its experts lie in columns."""

    @property
    def rows(self) -> tuple[int, int]:
        """Groups, one where there are none, and experts in each."""
        return max(1, self.groups), self.experts // max(1, self.groups)

    @property
    def columns(self) -> int:
        """Columns of a program, padded."""
        groups, size = self.rows
        return padded(groups) * padded(size)


def read_router(op: Op) -> Router:
    """The sizes, types and kind of a ``moe.route`` op.

    Raises:
        UnsupportedError: Something in it is not covered; the message ends "cannot run this op: ...".
    """
    router = routers.read(op, TL_TYPES, Router)
    if router.columns > MOST_EXPERTS:
        raise UnsupportedError(f"{router.experts} experts; at most {MOST_EXPERTS} are supported")
    if router.experts % router.rows[0]:
        raise UnsupportedError(f"{router.experts} experts do not make {router.groups} groups of one size")
    if router.groups and not router.per_group and router.two and router.rows[1] < 2:
        raise UnsupportedError("a group of one expert has no best two")
    return router


def _score(r: Router, name: str, there: str) -> list[str]:
    """Statements: ``name``, logits, becomes scores in their type; what is not ``there`` counts for nothing."""
    if r.scoring == "softmax":
        return [
            f'{name} = tl.where({there}, {name}, float("-inf"))',
            f"{name} = tl.exp({name} - tl.max({name}, 1)[:, None])",
            f"{name} = {rounded(f'{name} / tl.sum({name}, 1)[:, None]', r.score)}",
        ]
    if r.scoring == "sigmoid":
        return [f"{name} = {rounded(f'sigmoid({name})', r.score)}"]
    if r.scoring == "sqrtsoftplus":
        soft = rounded(f"softplus({name})", r.score)
        return [f"{name} = {rounded(f'tl.sqrt_rn({soft})', r.score)}"]
    return []


def _best_groups(r: Router) -> list[str]:
    """Statements: ``choice`` outside the best groups becomes the fill."""
    groups, size = r.rows
    shape = f"(BLOCK_T, {padded(groups)}, {padded(size)})"
    lines = [
        f'in_group = tl.reshape(tl.where(valid, choice, float("-inf")), {shape})',
        "worth = tl.max(in_group, 2)",
    ]
    if r.two:
        lines += [
            f"place = tl.arange(0, {padded(size)})[None, None, :]",
            'second = tl.max(tl.where(place == tl.argmax(in_group, 2)[:, :, None], float("-inf"), in_group), 2)',
            f"worth = {rounded('worth + second', r.choice)}",
        ]
    return [
        *lines,
        f"group = tl.arange(0, {padded(groups)})[None, :]",
        f"group_key = tl.where(group < {groups}, keys(worth), {_GONE})",
        f"kept = tl.zeros((BLOCK_T, {padded(groups)}), tl.int32)",
        f"for j in range(0, {r.top_groups}):",
        "    here = best_of(group_key, group) == group",
        "    kept = tl.where(here, 1, kept)",
        f"    group_key = tl.where(here, {_GONE}, group_key)",
        f"kept = tl.reshape(tl.broadcast_to(kept[:, :, None], {shape}), (BLOCK_T, {r.columns}))",
        f"choice = tl.where(kept > 0, choice, {rounded_number(r.fill, r.choice)})",
    ]


def rounded_number(value: float, dtype: str) -> str:
    """A number as ``dtype`` holds it."""
    import torch

    from moec.ir.torch_dtypes import TO_TORCH

    return number(float(torch.tensor(value, dtype=TO_TORCH[dtype])))


def _choose(r: Router, value: str) -> list[str]:
    """Statements: the best k: ``picked`` columns and their ``weight``s, slots in order."""
    _, size = r.rows
    own = f"(column // {padded(size)} == j // {r.per_group})[None, :]"
    lines = [f"key = tl.where(valid, keys(choice), {_GONE})"]
    if r.per_group and not r.by_group:
        lines += [
            f"kept = tl.zeros((BLOCK_T, {r.columns}), tl.int32)",
            f"for j in range(0, {r.k}):",
            f"    best = best_of(tl.where({own} & (kept == 0), key, {_GONE}), column[None, :])",
            "    kept = tl.where(column[None, :] == best, 1, kept)",
            f"key = tl.where(kept > 0, key, {_GONE})",
        ]
    among = f"tl.where({own}, key, {_GONE})" if r.per_group and r.by_group else "key"
    return [
        *lines,
        f"slot = tl.arange(0, {padded(r.k)})[None, :]",
        f"picked = tl.zeros((BLOCK_T, {padded(r.k)}), tl.int32)",
        f"weight = tl.zeros((BLOCK_T, {padded(r.k)}), tl.float32)",
        f"for j in range(0, {r.k}):",
        f"    best = best_of({among}, column[None, :])",
        "    here = column[None, :] == best",
        "    picked = tl.where(slot == j, best, picked)",
        f"    weight = tl.where(slot == j, tl.sum(tl.where(here, {value}, 0.0), 1)[:, None], weight)",
        f"    key = tl.where(here, {_GONE}, key)",
    ]


def _weights(r: Router) -> list[str]:
    """Statements: the weights of the chosen."""
    lines = _score(r, "weight", f"slot < {r.k}") if r.topk_first else []
    if r.renormalize:
        lines.append(f"total = {rounded(f'tl.sum(tl.where(slot < {r.k}, weight, 0.0), 1)', r.score)}[:, None]")
        if r.eps:
            lines.append(f"total = {rounded(f'total + {number(r.eps)}', r.score)}")
        lines.append(f"weight = {rounded('weight / total', r.score)}")
    if r.scale != 1.0:
        lines.append(f"weight = {rounded(f'weight * {number(r.scale)}', r.score)}")
    return lines


def write_router(r: Router, interpreted: bool = False) -> KernelFile:
    """The file of a router's kernel."""
    bias = (Argument("bias", POINTERS[r.bias]),) if r.bias else ()
    groups, size = r.rows

    def grid(tokens: int, c: Mapping[str, int]) -> tuple[int, ...]:
        return (cdiv(tokens, c["BLOCK_T"]),)

    kernel = Kernel(
        "route",
        (
            Argument("logits", POINTERS[r.logit]),
            Argument("logits_s", "i64"),
            *bias,
            Argument("weights", POINTERS[r.out]),
            Argument("ids", "*i64"),
            Argument("tokens", "i32"),
        ),
        ("BLOCK_T",),
        grid,
    )
    expert = "{0}" if groups == 1 else f"{{0}} // {padded(size)} * {size} + {{0}} % {padded(size)}"
    valid = (
        f"expert < {size}"
        if groups == 1
        else (f"(column // {padded(size)} < {groups}) & (column % {padded(size)} < {size})")
    )
    body = [
        "token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)",
        f"column = tl.arange(0, {r.columns})",
        f"expert = {expert.format('column')}",
        f"valid = ({valid})[None, :]",
        "there = (token < tokens)[:, None]",
        "at = logits + token.to(tl.int64)[:, None] * logits_s + expert[None, :]",
        "score = tl.load(at, mask=there & valid, other=0.0).to(tl.float32)",
        *([] if r.score in ("f32", r.logit) else [f"score = {rounded('score', r.score)}"]),
        *([] if r.topk_first else _score(r, "score", "valid")),
        "choice = score",
    ]
    if r.bias:
        load = "tl.load(bias + expert[None, :], mask=valid, other=0.0).to(tl.float32)"
        body.append(f"choice = {rounded(f'score + {load}', r.choice)}")
    if r.groups and not r.per_group:
        body += _best_groups(r)
    body += [
        *_choose(r, "choice" if r.masked else "score"),
        *_weights(r),
        f"at = token.to(tl.int64)[:, None] * {r.k} + slot",
        f"there = there & (slot < {r.k})",
        f"tl.store(weights + at, {rounded('weight', r.out)}.to({TL_TYPES[r.out]}), mask=there)",
        f"tl.store(ids + at, ({expert.format('picked')}).to(tl.int64), mask=there)",
    ]
    text = function(kernel, f"The best {r.k} of {r.experts} experts for every token.", body)
    title = f"A router: {r.k} of {r.experts} experts, {r.scoring}"
    return kernel_file(title, [(kernel, text)], _HELPERS, interpreted)
