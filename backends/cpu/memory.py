"""Which tensors a kernel may read through a pointer. Anything else would be nonsense or a crash, so it is an error.

Tensors come here through torch's dispatcher, which has unwrapped what it knows: lazy negation, functional and fake
tensors, wrapper subclasses. What is left are a device that is not the CPU's and memory that was taken away, as sharding
does with parameters between the calls of their layer.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from moec.ir.core import Op
from moec.ir.errors import MoecError
from moec.ir.types import TensorType


class OperandError(MoecError):
    """A tensor that a kernel was given is no memory that it could read."""

    code = "cpu-operand"


def check_readable(tensors: Iterable[Tensor]) -> None:
    """Refuse tensors that are not the plain, allocated memory of a CPU.

    Raises:
        OperandError: with what the tensor is.
    """
    for t in tensors:
        if t.device.type != "cpu":
            raise OperandError(f"a kernel for the CPU was given a tensor on {t.device}", hint="use the backend 'aten'")
        if t.is_neg() or t.is_conj():
            raise OperandError("a kernel for the CPU was given a lazily negated or conjugated tensor")
        if t.numel() and not t.data_ptr():
            raise OperandError(
                f"a tensor of shape {list(t.shape)} has no memory: its storage was freed",
                hint="call the module through its own forward, so that sharded parameters are gathered first",
            )


def elsewhere(op: Op) -> str | None:
    """The device of an operand that is not on the CPU, or None."""
    devices = (v.type.device for v in op.operands if isinstance(v.type, TensorType))
    return next((d for d in devices if d.partition(":")[0] != "cpu"), None)
