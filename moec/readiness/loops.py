"""Loops over experts, written in Python, as one graph: Dynamo may look tokens up in the modules that hold them.

``torch.where(ids == e)`` gives as many tokens as chose the expert. Dynamo puts a call whose sizes depend on data into a
graph only where ``torch._dynamo.config.capture_dynamic_output_shape_ops`` is set, or with ``fullgraph=True``; else the
graph breaks. (``torch._dynamo.patch_dynamo_config`` does not take that setting, and Dynamo reads it once per graph.)
So a marked module asks, when it is traced, the graph's own shape environment for leave. It holds for the rest of that
graph, because the compiler behind Dynamo looks the tokens up again; nothing is set for the process.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable
from typing import Any

import torch


@torch.compiler.assume_constant_result
def _allow_searches() -> bool:
    """Called while tracing, in plain Python: sizes may depend on data from here on."""
    tracing = torch._guards.TracingContext.try_get()
    shapes = tracing.fake_mode.shape_env if tracing is not None and tracing.fake_mode is not None else None
    if shapes is not None:
        shapes.settings = dataclasses.replace(shapes.settings, allow_dynamic_output_shape_ops=True)
    return shapes is not None


def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a marked module's forward; named like it, so that a pickled module finds its own again."""
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        _allow_searches()
    return type(self).forward(self, *args, **kwargs)


def is_marked(module: torch.nn.Module) -> bool:
    """True if the loop of ``module`` may be traced as one graph."""
    own = module.__dict__.get("forward")
    return isinstance(own, types.MethodType) and own.__func__ is forward


class LoopChange:
    """Marks modules whose forward loops over experts, and can take the marks off again.

    Args:
        model: The model.
        names: Dotted paths of the modules; those with a forward of the instance's own are left.

    Attributes:
        names: The paths of those that are marked.
    """

    def __init__(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        self.names: list[str] = []
        self._modules: list[torch.nn.Module] = []
        for name in names:
            module = model.get_submodule(name)
            own = module.__dict__.get("forward")
            # A copy brings the mark along; pickle stores it by its name, and finds the class's own forward under it.
            if own is not None and getattr(own, "__func__", None) not in (forward, type(module).forward):
                continue
            # Through __dict__: the attribute is no parameter, buffer or module, and undo must leave no trace.
            module.__dict__["forward"] = types.MethodType(forward, module)
            self._modules.append(module)
            self.names.append(name)

    def undo(self) -> None:
        for module in self._modules:
            module.__dict__.pop("forward", None)
        self._modules.clear()
