"""Running one small model: as it is, and through moec."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import moec
from moec.coverage.compare import output_of, ties_in
from moec.coverage.tiny import BATCH, LENGTH, Tiny
from moec.lowering import block_name
from moec.readiness import PrepareReport, prepare
from moec.report import BlockReport, Report
from moec.runtime import counters

_TRIES = 8  # of inputs, for one without a near tie


@dataclass
class Run:
    """One call of a compiled model.

    Attributes:
        output: What it is judged by.
        report: What moec found.
        breaks: Graph breaks.
        ran: Executions of moec's ops, by block; those of shared experts are left out.
    """

    output: torch.Tensor
    report: Report
    breaks: int
    ran: dict[str, dict[str, int]]


@dataclass
class Study:
    """A small model twice: untouched, and readied for moec.

    Attributes:
        tiny: The model that both are made from.
        backends: Which of moec's backends may claim ops.
        reference: A copy that moec doesn't touch.
        model: A copy that goes through moec.
        prepared: What ``moec.prepare`` did to it.
        seed: Of the inputs, which have no near tie if any tried have none.
        ties: Near ties that are left.
        blocks: Paths of the MoE blocks that run on these inputs.
    """

    tiny: Tiny
    backends: tuple[str, ...] = ("cpu", "aten")
    reference: Any = field(init=False)
    model: Any = field(init=False)
    prepared: PrepareReport = field(init=False)
    seed: int = 0
    ties: int = 0
    blocks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fresh()

    def fresh(self) -> None:
        """Take new copies: running a model may change it (one keeps the capacity of its last batch)."""
        self.reference, self.model = (copy.deepcopy(self.tiny.model) for _ in range(2))
        self.prepared = prepare(self.model)

    def find_inputs(self) -> None:
        """Choose inputs for which no expert's choice hangs on a last bit.

        Raises:
            Exception: Whatever the family's own forward raises.
        """
        found = []
        for seed in range(_TRIES):
            found.append(ties_in(self.reference, self.inputs(seed), BATCH * LENGTH))
            if found[-1] == 0:
                break
        self.seed, self.ties = found.index(min(found)), min(found)
        with torch.no_grad():
            _, self.blocks = self.watched(self.inputs())

    def watched(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, list[str]]:
        """The untouched model's output, and the blocks that ran for it: others may be there for images only."""
        ran: set[torch.nn.Module] = set()
        hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, result: ran.add(module))
        try:
            output = output_of(self.reference(**inputs))
        finally:
            hook.remove()
        paths = [name for name, module in self.reference.named_modules() if module in ran]
        return output, [b for b in self.tiny.blocks() if any(p == b or p.startswith(f"{b}.") for p in paths)]

    def inputs(self, seed: int | None = None) -> dict[str, Any]:
        """Keyword arguments of a prefill without a cache."""
        made: dict[str, Any] = dict(self.tiny.inputs(self.seed if seed is None else seed))
        return made if self.tiny.images else {**made, "use_cache": False}

    def own_breaks(self, inputs: Mapping[str, Any]) -> int:
        """Graph breaks that PyTorch has on the readied model when nothing is compiled."""
        graphs = 0

        def count(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
            nonlocal graphs
            graphs += 1
            return gm.forward

        _forget()
        with torch.no_grad(), _quiet():
            compiled: Any = torch.compile(self.model, backend=count)
            compiled(**inputs)
        return _breaks(graphs)

    def run(self, inputs: Mapping[str, Any]) -> Run:
        """Through moec, compiled anew, the rest of the graph eager."""
        _forget()
        counters.reset()
        compiled = moec.compile(self.model, prepare=False, inner="eager", backends=self.backends)
        with moec.recording() as report, _quiet():
            output = output_of(compiled(**inputs))
        shared = {expert.name for block in report.layers for expert in block.shared}
        ran = {label: counts for label, counts in counters.snapshot().by_label.items() if label not in shared}
        return Run(output, report, _breaks(report.graphs), ran)

    def cache(self) -> tuple[Any, dict[str, Any]]:
        """A cache that the untouched model filled with the first sequence, and what else the next step takes.

        Returns:
            The cache (None: the model has none), and keyword arguments for one more token.
        """
        first = {name: value[:1] for name, value in self.tiny.inputs(self.seed).items()}
        token = self.tiny.inputs(self.seed + _TRIES)["input_ids"][:1, :1]
        if self.tiny.encoder_decoder:  # use_cache is the default; asked for, it would go to the encoder too
            result = self.reference(**first)
            encoded = self.reference.get_encoder()(first["input_ids"], first["attention_mask"])
            return result.past_key_values, {"encoder_outputs": encoded, "decoder_input_ids": token}
        result = self.reference(**first, use_cache=True)
        return getattr(result, "past_key_values", None), {"input_ids": token, "use_cache": True}


def layers_of(block: str, report: Report) -> list[BlockReport]:
    """What a report says of one block, given by the path of its experts."""
    return [layer for layer in report.layers if _same_block(block, layer.name)]


def ran_in(block: str, op: str, ran: Mapping[str, Mapping[str, int]]) -> bool:
    """Was one of moec's ops executed in the block?"""
    return any(counts.get(op) for label, counts in ran.items() if _same_block(block, label))


def _same_block(block: str, name: str) -> bool:
    """A report names a block by the module that its GEMMs ran in: the experts, something in them, or their owner.

    After a graph break it knows the end of the path only.
    """
    parts = block_name(block, 0).split(".")
    ends = [".".join(parts[i:]) for i in range(len(parts))]
    return any(name == end or name.startswith(f"{end}.") for end in ends) or ends[0].startswith(f"{name}.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings: blocks left to PyTorch are rows of the table, and what Dynamo thinks of a family is not asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _forget() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def _breaks(graphs: int) -> int:
    """Breaks that Dynamo counted. A frame that it gave up on whole makes no graph, a nested one makes several."""
    return max(graphs - 1, sum(torch._dynamo.utils.counters["graph_break"].values()), 0)
