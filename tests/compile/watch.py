"""What really runs: a dispatch mode that sees every op, and a count of the graphs that Dynamo makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GROUPED_GEMMS = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
PICKS = ("aten::index", "aten::index_select", "aten::gather")


class Watch(TorchDispatchMode):
    """Counts the ops that run while it is on, and sets apart those that read expert weights.

    What runs inside a ``moec`` op is the op's own business and is not seen.

    Attributes:
        ops: Executions by qualified name (``"moec::experts"``).
        ids: What every ``moec::experts`` was given as expert ids, ``[T, k]`` each.
        params: Addresses of all tensors that any ``moec::experts`` was given as weights.
        expert_reads: Executions of grouped GEMMs, and for picks of rows of a 3-D parameter.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.ids: list[torch.Tensor] = []
        self.params: set[int] = set()
        self.expert_reads: Counter[str] = Counter()
        self._stacked = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() == 3}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        self.ops[name] += 1
        if name in GROUPED_GEMMS or (name in PICKS and args[0].untyped_storage().data_ptr() in self._stacked):
            self.expert_reads[name] += 1
        if name == "moec::experts":
            self.ids.append(args[1])
            self.params |= {p.data_ptr() for p in args[3]}
        return func(*args, **(kwargs or {}))


class Graphs:
    """A Dynamo backend that compiles nothing and counts how often it is called: what ``backend="eager"`` would make."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.count += 1
        return gm.forward


def moec_compile(
    model: Any, *, inner: str = "eager", fullgraph: bool = True, watch: Watch | None = None, **options: Any
) -> Any:
    """Bare ``torch.compile`` with moec, as a user writes it.

    Args:
        model: What to compile.
        inner: The inner compiler; tests take the quick one unless they say more.
        fullgraph: A graph break is an error.
        watch: A mode to be on while compiled graphs run. (Dynamo runs nothing compiled under a mode from outside.)
        **options: Further options of moec. Tests of the door run layers on ``aten``, which has eager's bits and nothing
            to compile; test_cpu_backend.py takes the default.
    """
    options = {"inner": inner, "backends": ["aten"], **options}
    if watch is None:
        return torch.compile(model, backend="moec", fullgraph=fullgraph, options=options)
    backend = torch._dynamo.lookup_backend("moec")

    def watched(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        compiled = backend(gm, example_inputs, options=options)

        def run(*args: Any) -> Any:
            with watch:
                return compiled(*args)

        return run

    return torch.compile(model, backend=watched, fullgraph=fullgraph)
