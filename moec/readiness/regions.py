"""Decoder layers as compiled regions: what is alike is traced, lowered and compiled once, whatever the depth.

Built on ``torch.compiler.nested_compile_region``: Dynamo emits one ``invoke_subgraph`` call a layer, all on one body.
What it takes, learnt by trying (torch 2.13):

- The marked function must be the same one for all layers, with the layer as an *argument*. Dynamo then renames the
  sources of the first layer's weights to the next layer's and skips tracing altogether.
- With gradients, Inductor's memory planning reuses buffers that a region's backward still needs: wrong gradients, right
  loss. So a region is entered only where gradients are off; training is compiled as if nothing were marked.
- A cache object among the arguments makes the whole layer a region with mutated inputs, each a copy of the cache unless
  Inductor takes it back, and an uninitialised one fails. So with a cache only the MoE block is a region; the cache is
  written outside it.
- Hooks on one layer are not among the checks of reuse. So likeness is asked once more when the layer is traced.
- A region that is called both inside another region and outside fails in AOTAutograd. So regions never nest.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.compiler import nested_compile_region

from moec.readiness.report import LeftOut, RegionGroup
from moec.readiness.rewriters import is_rewritten, verdict
from moec.readiness.signature import Signature, obstacle, signature

_OWN = frozenset({"forward"})
_MAX_VARIANTS = 4096  # of one marked function in one graph; torch raises an error beyond, and its default is 8
_FEWEST_LAYERS = {"auto": 4, True: 2}  # for fewer layers tracing each is quicker than the detour
_PLAIN = (torch.Tensor, bool, int, float, str, type(None))

_marked: dict[int, tuple[weakref.ref[torch.nn.Module], weakref.ref[torch.nn.Module]]] = {}
"""``id`` of a marked module -> the module, and the leader of its group. A copy of a marked module is not in it."""


def _call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The body of the region: the module's own forward."""
    return type(module).forward(module, *args, **kwargs)


_region = nested_compile_region(_call, max_reuse_entries=_MAX_VARIANTS)


def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a marked module's forward; named like it, so that a pickled module finds its own again."""
    if (
        torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and _plain(args)
        and _plain(kwargs.values())
        and not _inside_body()
        and _still_alike(id(self))  # asked last: inside a layer's region it would be a check of its reuse
    ):
        return _region(self, *args, **kwargs)
    return type(self).forward(self, *args, **kwargs)


def _plain(values: Any) -> bool:
    """Are the arguments tensors and constants only? Anything else (a cache) may be mutated by the layer."""
    for value in values:
        if isinstance(value, tuple | list):
            if not _plain(value):
                return False
        elif not isinstance(value, _PLAIN):
            return False
    return True


@torch.compiler.assume_constant_result
def _inside_body() -> bool:
    """Asked while tracing, in plain Python: is Dynamo in the body of a region, a checkpoint or the like?"""
    return InstructionTranslator.current_tx().output.current_tracer.parent is not None


@torch.compiler.assume_constant_result
def _still_alike(key: int) -> bool:
    """Asked while tracing, in plain Python: does the module still compute what its group's leader computes?

    A copy of a model carries the marks with it and may have been changed since; it is unknown here, and no region.
    """
    if key not in _marked:
        return False
    module, leader = (reference() for reference in _marked[key])
    if module is None or leader is None or obstacle(module, _OWN) or obstacle(leader, _OWN):
        return False
    return module is leader or signature(module, _OWN) == signature(leader, _OWN)


class RegionChange:
    """Marks the layers of a model that are alike, and can take the marks off again."""

    def __init__(self, model: torch.nn.Module, experts: dict[str, torch.nn.Module], regions: bool | str) -> None:
        self.groups: list[RegionGroup] = []
        self.left_out: list[LeftOut] = []
        self._modules: list[torch.nn.Module] = []
        fewest = _FEWEST_LAYERS[regions]
        _drop_inherited(model)
        for stack_name in _layer_stacks(model, experts):
            self._mark_stack(stack_name, model.get_submodule(stack_name), experts, fewest)

    def _mark_stack(
        self, stack_name: str, stack: torch.nn.Module, experts: dict[str, torch.nn.Module], fewest: int
    ) -> None:
        alike: dict[Signature, list[str]] = {}
        for child_name, layer in stack.named_children():
            name = f"{stack_name}.{child_name}"
            reason = obstacle(layer) or _untraceable(layer)
            if reason is not None:
                self.left_out.append(LeftOut(name, type(layer).__name__, reason))
            else:
                alike.setdefault(signature(layer), []).append(name)
        for names in alike.values():
            layers = [stack.get_submodule(name.removeprefix(f"{stack_name}.")) for name in names]
            kind = type(layers[0]).__name__
            if len(layers) < fewest:
                reason = f"only {len(layers)} of its kind (a shared region needs {fewest})"
                self.left_out.extend(LeftOut(name, kind, reason) for name in names)
                continue
            blocks = [b for name in names for b in _moe_blocks(name, experts)]
            self.groups.append(RegionGroup(kind, tuple(names), tuple(blocks)))
            for relative in ["", *(b.removeprefix(f"{names[0]}.") for b in _moe_blocks(names[0], experts))]:
                self._mark([layer.get_submodule(relative) for layer in layers])

    def _mark(self, modules: list[torch.nn.Module]) -> None:
        for module in modules:
            _marked[id(module)] = weakref.ref(module), weakref.ref(modules[0])
            weakref.finalize(module, _marked.pop, id(module), None)
            # Through __dict__: the attribute is no parameter, buffer or module, and undo must leave no trace.
            module.__dict__["forward"] = types.MethodType(forward, module)
            self._modules.append(module)

    def undo(self) -> None:
        for module in self._modules:
            _marked.pop(id(module), None)
            module.__dict__.pop("forward", None)
        self._modules.clear()


def _drop_inherited(model: torch.nn.Module) -> None:
    """Take off the marks that a copied or unpickled model brought along from the one that was prepared."""
    for module in model.modules():
        own = module.__dict__.get("forward")
        if id(module) in _marked or not isinstance(own, types.MethodType) or own.__self__ is not module:
            continue
        # pickle stores a bound method by its name, and finds the class's own forward under it
        if own.__func__ in (forward, type(module).forward):
            del module.__dict__["forward"]


def _untraceable(layer: torch.nn.Module) -> str | None:
    """Why the layer's forward may not fit into one graph, which a region has to, or None."""
    for name, module in layer.named_modules():
        known = None if is_rewritten(module) else verdict(module)
        if known is not None:
            return f"{name} is not rewritten: {known.reason}"
    return None


def _layer_stacks(model: torch.nn.Module, experts: dict[str, torch.nn.Module]) -> list[str]:
    """The outermost module lists that hold layers with experts in them."""
    stacks: list[str] = []
    for name, module in model.named_modules():
        holds = any(e.startswith(f"{name}.") for e in experts)
        if isinstance(module, torch.nn.ModuleList) and holds and not any(name.startswith(f"{s}.") for s in stacks):
            stacks.append(name)
    return stacks


def _moe_blocks(layer_name: str, experts: dict[str, torch.nn.Module]) -> list[str]:
    """The modules right above the layer's experts, which hold router and experts; not the layer itself.

    Experts that hold others are adapters around them.
    """
    parents = [name.rpartition(".")[0] for name in experts if name.startswith(f"{layer_name}.")]
    return [parent for parent in dict.fromkeys(parents) if parent != layer_name and parent not in experts]
