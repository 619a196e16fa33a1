"""The cost model asked about ops: what ``ctx.cost_model`` is to passes, and advice to the kernels of a program.

Backends know nothing of profiles: what a call should do is handed to them as a function
(:data:`moec.backends.base.Adviser`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from moec.backends.base import Advice, Adviser
from moec.backends.cpu.isa import LEVELS, isa_of
from moec.backends.partition import layer_inside
from moec.cost import LayerShape, LayerTime, MachineProfile, library_is_faster, machine_for, predict, threads_for
from moec.cost.attention import BACKWARD_PRODUCTS
from moec.cost.curve import LayerCurve, measured_curve
from moec.cost.links import Link
from moec.cost.machine import ITEM_BYTES
from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.ir.types import TensorType
from moec.parallel.costs import costs_of
from moec.parallel.piece_costs import piece_seconds
from moec.parallel.work_costs import times_of
from moec.targets import parse_target

BACKWARD_WORK = 8 / 3
"""Work of a layer's backward over its forward's: the up GEMM again, and two GEMMs for each one of the forward."""


@dataclass(frozen=True)
class OpCosts:
    """Predicted times of ``moe.experts`` on the cpu backend, alone and spread over ranks.

    Attributes:
        machine: The profile of the target's processor, measured or assumed.
        isa: Instruction set of the kernels.
    """

    machine: MachineProfile
    isa: str

    def predict(self, op: Op, load: int | Sequence[int], threads: int) -> LayerTime | None:
        """The time of one call; None for an op that the model does not know.

        Args:
            op: A ``moe.experts``.
            load: Tokens of the call, or the rows of every expert.
            threads: Threads of the call.
        """
        shape = layer_shape(op)
        return None if shape is None else predict(shape, load, self.machine, threads, self.isa)

    def expert_times(self, op: Op, backward: bool = False) -> LayerCurve | None:
        """Times of one rank's experts of a ``moe.parallel_experts``; None where the model does not know them."""
        return self.layer_times(layer_inside(op), op.attrs["group"], backward, str(op.attrs.get("backend", "")))

    def layer_times(self, op: Op, group: str, backward: bool = False, backend: str = "") -> LayerCurve | None:
        """Times of a ``moe.experts`` on a rank of a group; None where the model does not know it.

        Those of PyTorch's products where ``backend`` is ``aten``, else those of the ``cpu`` backend's kernels.
        """
        shape, agreed = layer_shape(op), costs_of(group)
        if shape is None or agreed is None:
            return None
        work = times_of(group)
        if work is not None and backend == "aten":
            return work.experts(shape, backward)
        curve = measured_curve(shape, agreed.machine, agreed.threads, agreed.isa)
        return curve.times(BACKWARD_WORK) if backward else curve

    def transport(self, group: str, ranks: int) -> Link | None:
        """The links of a group, as its ranks measured them together."""
        agreed = costs_of(group)
        return None if agreed is None else agreed.link

    def copying(self, group: str, bytes: float) -> float:
        """Time in which a rank of a group copies ``bytes`` in its memory: it reads them and writes them."""
        agreed = costs_of(group)
        machine, threads = (self.machine, 1) if agreed is None else (agreed.machine, agreed.threads)
        return 2 * bytes / machine.bytes_per_s(threads)

    def in_place(self, op: Op) -> bool:
        """Whether chunks write gradients of weights where they belong: the cpu backend's kernels do."""
        return layer_shape(layer_inside(op)) is not None

    def chunk_seconds(self, op: Op, place: int, along: str) -> float:
        """What a chunk costs beside its rows, as the ranks of the layer's group measured it together."""
        agreed = costs_of(op.attrs["group"])
        return 0.0 if agreed is None else agreed.chunks.of(place, along).all

    def front_seconds(self, op: Op, place: int, along: str) -> float:
        """Of these, those before the first chunk's experts."""
        agreed = costs_of(op.attrs["group"])
        return 0.0 if agreed is None else agreed.chunks.of(place, along).front

    def dense_seconds(self, group: str, rows: float, inputs: float, outputs: float, dtype: str) -> float | None:
        """Time of ``rows`` rows times a matrix on a rank of a group, as PyTorch multiplies.

        Where its ranks did not measure that together, as the kernels of experts multiply.
        """
        agreed, work = costs_of(group), times_of(group)
        if work is not None and (took := work.product(rows, inputs * outputs, dtype)) is not None:
            return took
        if agreed is None or dtype not in ITEM_BYTES:
            return None
        return agreed.machine.curve(dtype, agreed.isa, agreed.threads).seconds(rows) * inputs * outputs

    def core_seconds(self, group: str, flops: float, bytes: float, dtype: str, backward: bool) -> float:
        """Time of attention between its projections: its operations at the rate of products of many rows."""
        work = times_of(group)
        rate = None if work is None else work.rate(dtype)
        if work is None or rate is None:
            return 0.0
        return max(flops * (BACKWARD_PRODUCTS if backward else 1.0) / rate, bytes / work.bytes_per_s)

    def moved_seconds(self, group: str, bytes: float) -> float:
        """Time of an op that reads and writes so many bytes together."""
        work = times_of(group)
        return 0.0 if work is None else bytes / work.bytes_per_s

    def op_seconds(self, op: Op, group: str, place: int, bytes: float) -> float:
        """Time of an op of a layer's program that is no expert and sends nothing."""
        work = times_of(group)
        return 0.0 if work is None else work.op_s[place] + bytes / work.bytes_per_s

    def piece_seconds(self, group: str) -> float | None:
        """What an op of a layer in pieces takes, as the ranks of its group measured it together."""
        return piece_seconds(group)

    def burden(self, group: str) -> Link | None:
        """What a collective of a group takes of the experts beside it."""
        agreed = costs_of(group)
        return None if agreed is None else agreed.chunks.burden

    def advise(self, op: Op) -> Adviser | None:
        """What a call of ``op`` should do, by its tokens; None for an op that the model does not know."""
        shape = layer_shape(op)
        if shape is None:
            return None

        @lru_cache(maxsize=4096)
        def advice(tokens: int, threads: int) -> Advice:
            team = team_for(shape, tokens, self.machine, threads, self.isa)
            return Advice(team, library_is_faster(shape, tokens, self.machine, team, self.isa))

        return advice


@lru_cache(maxsize=16)
def op_costs(target: str) -> OpCosts | None:
    """The costs of ops on ``target``, from the stored profile where it means this machine; None where nothing is known.

    A profile that is measured later is read by the next process.
    """
    isa = isa_of(target)
    if isinstance(isa, str) or isa.name not in LEVELS:
        return None
    return OpCosts(machine_for(parse_target(target.partition(",")[0])), isa.name)


def team_for(shape: LayerShape, tokens: int, machine: MachineProfile, threads: int, isa: str) -> int:
    """How many of ``threads`` threads a call takes: all, where the machine was not measured.

    What one core alone draws from memory decides; assumed numbers do not know it.
    """
    return threads_for(shape, tokens, machine, threads, isa) if machine.calibrated else threads


def layer_shape(op: Op) -> LayerShape | None:
    """The sizes of a ``moe.experts``; None where one is not known before run time, or the type is none of the model's.

    Experts of different widths count with their mean.
    """
    if op.name != "moe.experts":
        return None
    get = op_def(op.name).attr
    types = [v.type for v in (op.operands[0], op.operands[1], op.result, *op.group("down"))]
    if not all(isinstance(t, TensorType) for t in types):
        return None
    x, ids, result, *downs = (t for t in types if isinstance(t, TensorType))
    sizes = [x.shape[1], ids.shape[1], result.shape[1], *(d for t in downs for d in t.shape)]
    if x.dtype.name not in ITEM_BYTES or not all(d.is_Integer for d in sizes):
        return None
    inners = [int(t.shape[-1 if get(op, "down_form") == "nk" else -2]) for t in downs]
    parts = 1 if get(op, "layout") in ("single", "rows") else 2
    hidden, top_k, width = (int(d) for d in sizes[:3])
    inner = round(sum(inners) / len(inners))
    return LayerShape(hidden, inner, width, get(op, "experts"), top_k, parts, x.dtype.name)
