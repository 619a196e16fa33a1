"""Low-rank adapters on parameters (peft's ``ParamWrapper``, for ``target_parameters``; LoRA, arXiv:2106.09685).

Stacked experts and routers are no linear layers, so peft wraps the whole module and makes the parameter
``W + s·B·A`` for the length of a call, by a parametrization that is put on and taken off every time. The module has
another class while it lasts, which no graph can hold: PyTorch compiles a dozen pieces a layer, anew in every call.
Here the same weights are computed first and handed to the module, which stays as it is.

The rewritten method is for tracing alone; in eager PyTorch the wrapper's own forward runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moec.readiness.rewriters.known import Rewriter, fingerprint
from moec.readiness.signature import hooks
from moec.sizes import size_text

_ACTIVATE = "db87e5dcf1da3acf"


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the wrapped module gives with its adapted parameters."""
    tracing = torch.compiler.is_dynamo_compiling() and "adapter_names" not in kwargs
    weights = _adapted(self) if tracing else {}
    if not weights:
        return type(self).forward(self, x, *args, **kwargs)
    return torch.func.functional_call(self.get_base_layer(), weights, (x, *args), kwargs)


def _adapted(wrapper: Any) -> dict[str, Tensor]:
    """The adapted parameters of the wrapped module; wrappers of several parameters lie around each other.

    None where no adapter is to be applied, or where the wrappers' own forwards have to run.
    """
    weights: dict[str, Tensor] = {}
    layer = wrapper
    while isinstance(layer, type(wrapper)):
        narrow = layer.get_param().dtype.itemsize < 2  # added in another type and clamped
        if narrow or layer.parameter_name in weights or (layer.disable_adapters and layer.merged):
            return {}
        if not (layer.disable_adapters or layer.merged):
            active = [name for name in layer.active_adapters if name in layer.lora_A]
            if active:
                weights[layer.parameter_name] = _weight(layer, active)
        layer = layer.base_layer
    return weights


def _weight(layer: Any, active: list[str]) -> Tensor:
    """``W + Σ s·B·A`` over the active adapters; of one adapter on experts in one operation, in W's type."""
    weight: Tensor = layer.get_param()
    if len(active) == 1 and layer.num_experts > 1:
        left, right, scale = layer.get_delta_factors(active[0])
        with torch.autocast(device_type=weight.device.type, enabled=False):
            return torch.baddbmm(weight, left, right, alpha=scale)
    delta: Tensor = layer.get_delta_weight(active[0])
    for name in active[1:]:
        delta = delta + layer.get_delta_weight(name)
    return weight + delta


def _check(module: Any) -> str | None:
    activate = getattr(type(module)._activate_lora, "__wrapped__", None)  # a context manager around the function
    if fingerprint(activate) != _ACTIVATE:
        return "ParamWrapper._activate_lora is not written as moec knows it: another release of peft, or a patch"
    inner: nn.Module = module.base_layer
    while isinstance(inner, type(module)):
        for kind in hooks(inner):
            return f"an adapter inside has a {kind}, which would no longer be called"
        inner = inner.base_layer
    return None


def _note(module: Any) -> str:
    size = module.get_param().numel() * module.get_param().element_size()
    return (
        f"its adapted weight, {size_text(size)}, is computed in every call; "
        "for inference, merge_and_unload() makes it part of the weights"
    )


REWRITER = Rewriter(
    target="peft.tuners.lora.layer.ParamWrapper",
    how="its adapted weight is computed before the call, where it was a parametrization for its length",
    methods={"forward": forward},
    sources={
        "ParamWrapper.forward": "dc3ee02c3c1bbb0c",
        "ParamWrapper._check_forward_args": "d31889bf6e52d598",
        "_LoraFactorsProxy.forward": "cb632ad21385a288",
        "_LoraParameterProxy.forward": "37d551dee6b2d74b",
    },
    check=_check,
    note=_note,
    runs_experts=False,
)
