"""Folders whose weights are quantized: fp8 as DeepSeek-V3's and Qwen3's is read as it lies, or as what it stands for.

transformers itself keeps fp8 on some GPUs alone; elsewhere it loads what the numbers stand for, and refuses matrices
whose sides are no multiples of 128, such as DeepSeek-V3's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moec.aot.checkpoint import Checkpoint, read_tensor
from moec.cli.conversion import QUANTIZER
from moec.cli.model import ModelError
from moec.ir.scaled_semantics import SCALED, wide_weight

_SCALE = "_scale_inv"
"""Ends the name of a weight's scales."""
_NEXT = (
    "load it with transformers' AutoModelForCausalLM, call dequantize() or pass a quantization_config with "
    "dequantize=True, and save_pretrained what comes of it"
)


def method_of(config: Any) -> str:
    """How weights are quantized, in transformers' words: ``fp8``; empty where they are not."""
    method = _settings(config).get("quant_method", "")
    return str(getattr(method, "value", method))


def _settings(config: Any) -> Mapping[str, Any]:
    given = getattr(config, "quantization_config", None) or {}
    made: Mapping[str, Any] = given if isinstance(given, Mapping) else given.to_dict()
    return made


def in_fp8(config: Any, file: Path) -> bool:
    """Whether weights are in fp8 with a scale for 128 x 128 elements.

    Raises:
        ModelError: They are in fp8 of another form.
    """
    if method_of(config) != "fp8":
        return False
    settings = _settings(config)
    block, scheme = settings.get("weight_block_size", (SCALED, SCALED)), settings.get("activation_scheme", "dynamic")
    why = ""
    if block is None or tuple(block) != (SCALED, SCALED):
        why = f"a scale for a block of {block}, and kernels take blocks of {SCALED} x {SCALED}"
    elif scheme != "dynamic":
        why = f"activation_scheme {scheme!r}, and kernels scale rows as they come (dynamic)"
    elif (kind := settings.get("expert_dtype", "fp8")) != "fp8":
        why = f"experts in {kind}, and kernels multiply fp8"
    if why:
        raise ModelError(f"{file}: its weights in fp8 have {why}", hint=_NEXT)
    return True


def quantize(model: nn.Module, config: Any) -> nn.Module:
    """Put transformers' modules in fp8 in the place of a model's own; their memory is untouched.

    Args:
        model: Of that configuration, its weights' values do not matter.
        config: Where :func:`in_fp8` is true.
    """
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    made = FineGrainedFP8Config.from_dict(dict(_settings(config)))
    quantizer = FineGrainedFP8HfQuantizer(made, pre_quantized=True)
    put: Any = quantizer._process_model_before_weight_loading  # preprocess_model would look for a GPU
    put(model)
    setattr(model, QUANTIZER, quantizer)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                kept = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
                setattr(module, name, kept)
    return model


def load_other(model: nn.Module, checkpoint: Checkpoint, prefix: str = "") -> None:
    """Load what lies in another type than the model has it: scales, biases of routers.

    Raises:
        ModelError: Something of the model is not in the folder at all.
    """
    state = model.state_dict()
    for name, why in checkpoint.missing.items():
        if name not in checkpoint.other:
            raise ModelError(f"the weight {name.removeprefix(prefix)!r} cannot be read: {why}", hint=_NEXT)
        value = state[name.removeprefix(prefix)]
        value.copy_(read_tensor(checkpoint.other[name], value.shape))


def load_all(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Load the weights of a model from where they lie, with names that have no prefix.

    Raises:
        ModelError: One is missing.
    """
    load_other(model, checkpoint)
    state = model.state_dict()
    for name, places in checkpoint.places.items():
        state[name].copy_(read_tensor(places, state[name].shape))
    return model


def dequantized(narrow: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of the model that a quantized one stands for.

    Args:
        narrow: The quantized model; its weights are not read.
        checkpoint: Where they lie, with names that have no prefix.
        dtype: Of weights that are quantized.

    Raises:
        ModelError: One is missing.
    """
    load_other(narrow, checkpoint)
    made: dict[str, Tensor] = {}
    state = narrow.state_dict()
    for name, value in state.items():
        if name.endswith(_SCALE):
            continue
        read = read_tensor(checkpoint.places[name], value.shape) if name in checkpoint.places else value
        scale = name + _SCALE
        if scale in state:
            at = checkpoint.places.get(scale)
            scales = state[scale] if at is None else read_tensor(at, state[scale].shape)
            read = wide_weight(read, scales.float()).to(dtype)
        made[name] = read
    return made
