"""How the weights of a layer lie in memory, as far as embedded code must know it when it is generated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moec.backends.calls import UnsupportedError
from moec.capture.origin import FX_META
from moec.ir.core import Op, Value
from moec.ir.opdef import op_def


def recorded_weights(op: Op) -> list[Tensor] | None:
    """The up and then the down weights of a ``moe.experts`` op, as export recorded them; None where one is a pass's."""
    found = [_recorded(v) for name in ("up", "down") for v in op.group(name)]
    known = [t for t in found if t is not None]
    return known if len(known) == len(found) else None


def _recorded(value: Value) -> Tensor | None:
    for meta in (value.meta, value.op.meta if value.op is not None else {}):
        found = meta.get(FX_META, {}).get("val")
        if isinstance(found, Tensor):
            return found
    return None


def outputs_as_rows(op: Op, weights: Sequence[Tensor]) -> tuple[bool, bool]:
    """Whether rows in memory are outputs: of the up, and of the down weights.

    Args:
        op: A ``moe.experts`` op.
        weights: Its up and then its down weights.

    Raises:
        UnsupportedError: A weight has no contiguous side, or those of the experts do not lie alike.
    """
    count = len(op.group("up"))
    return _as_rows(op, "up", weights[:count]), _as_rows(op, "down", weights[count:])


def _as_rows(op: Op, name: str, weights: Sequence[Tensor]) -> bool:
    get = op_def(op.name).attr
    along = [w.stride(-1) == 1 or w.shape[-1] == 1 for w in weights]
    for weight, contiguous in zip(weights, along, strict=True):
        if not contiguous and weight.stride(-2) != 1:
            raise UnsupportedError(f"a weight has no contiguous side: its strides are {weight.stride()}")
    if len(set(along)) > 1:
        raise UnsupportedError(f"some {name} weights lie transposed, others do not")
    if not get(op, "stacked"):
        experts = get(op, "experts")
        for part in (weights[i : i + experts] for i in range(0, len(weights), experts)):
            if len({w.stride() for w in part}) > 1:
                raise UnsupportedError(f"the experts' {name} weights have different strides")
    return along[0] == (get(op, f"{name}_form") == "nk")
