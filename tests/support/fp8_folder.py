"""A small DeepSeek-V3 in a folder, in fp8 as its checkpoint lies, and a reference of it that is made without moec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests.backends.fp8 import fp8_row_value, fp8_weight, fp8_weight_value
from tests.support.fp8_models import SIZES

WHOLE = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
"""Parts of names of weights that are not in fp8."""
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def narrow(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in fp8, and its scales."""
    values, scales = fp8_weight(weight[None].float())
    return values[0], scales[0]


def value(weight: Tensor) -> Tensor:
    """What a matrix stands for once it is in fp8."""
    values, scales = narrow(weight)
    return fp8_weight_value(values[None], scales[None])[0]


def is_narrow(name: str, weight: Tensor) -> bool:
    """Whether the checkpoint has a weight in fp8."""
    return weight.dim() == 2 and not any(part in name for part in WHOLE)


def write_folder(folder: Path, *, scales: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """Write the folder; returns the model in f64 that it stands for, rows of what is in fp8 narrowed.

    Args:
        folder: An empty one.
        scales: Type of the scales on disk.
        settings: Of the quantization.
    """
    torch.manual_seed(0)
    config = DeepseekV3Config(**SIZES, n_shared_experts=1)
    model = DeepseekV3ForCausalLM(config).eval()
    stored: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.dim() > 1:
                weight.mul_(4)
            if name.endswith("e_score_correction_bias"):
                weight.uniform_(0, 0.1)
        for name, weight in model.state_dict().items():
            if ".experts." in name:
                weight.copy_(_experts(name, weight, stored, scales))
            elif is_narrow(name, weight):
                _put(stored, name, weight, scales)
                weight.copy_(value(weight))
            else:
                stored[name] = weight.clone()
    save_file(stored, folder / "model.safetensors")
    told = json.loads(config.to_json_string(use_diff=False)) | {"quantization_config": FP8 | settings}
    (folder / "config.json").write_text(json.dumps(told | {"dtype": "float32"}))
    return _narrowing(model.double())


def _put(stored: dict[str, Tensor], name: str, weight: Tensor, scales: torch.dtype) -> None:
    stored[name], scale = narrow(weight)
    stored[f"{name}_scale_inv"] = scale.to(scales)


def _experts(name: str, weight: Tensor, stored: dict[str, Tensor], scales: torch.dtype) -> Tensor:
    """Store stacked weights one by one, gate and up apart; returns what they stand for."""
    base, _, kind = name.rpartition(".")
    made = []
    for e, matrix in enumerate(weight):
        parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)) if "gate" in kind else {kind: matrix}
        for part, own in parts.items():
            _put(stored, f"{base}.{e}.{part}.weight", own.contiguous(), scales)
        made.append(torch.cat([value(own) for own in parts.values()]))
    return torch.stack(made)


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).float()
    return torch.stack([fp8_row_value(row) for row in flat]).reshape(x.shape).to(x.dtype)


def _narrowing(model: nn.Module) -> nn.Module:
    """Have every layer whose weight is in fp8 narrow its rows."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_narrow(f"{name}.weight", module.weight):
            module.register_forward_pre_hook(lambda module, args: (_rows(args[0]),))
        elif name.endswith(".experts"):
            module.forward = lambda x, ids, weights, own=module: _loop(own, x, ids, weights)
    return model


def _loop(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t, chosen in enumerate(ids.tolist()):
        for j, e in enumerate(chosen):
            gate, up = (module.gate_up_proj[e] @ _rows(x[t])).chunk(2)
            out[t] += weights[t, j] * (module.down_proj[e] @ _rows(nn.functional.silu(gate) * up))
    return out
