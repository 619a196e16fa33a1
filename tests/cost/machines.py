"""A machine of round numbers, for times that can be worked out by hand."""

from __future__ import annotations

from moec.cost import GemmCurve, MachineProfile
from moec.cost.machine import Overhead, Points

#: 1 ns an element and 1 ns a row, on one thread; exactly half on two.
ONE = GemmCurve("bf16", "avx2", 1, ((1, 2.0), (2, 3.0), (4, 5.0), (512, 513.0)))
TWO = GemmCurve("bf16", "avx2", 2, ((1, 1.0), (2, 1.5), (4, 2.5), (512, 256.5)))


def overhead(tasks: Points = ((1, 0.0),), rows: Points = ((1, 0.0),)) -> Overhead:
    """None but what is given."""
    return Overhead("bf16", tasks, rows)


def round_machine(**changes: object) -> MachineProfile:
    """1 GB/s and 4 GFLOP/s a thread, 100 µs a call, 10 µs of barriers for two threads; no other overhead."""
    numbers: dict[str, object] = {
        "name": "round",
        "fingerprint": "0" * 16,
        "cores": 2,
        "isa": "avx2",
        "calibrated": True,
        "bandwidth": ((1, 1e9), (2, 2e9)),
        "flops": (("bf16", "avx2", 4e9),),
        "curves": (ONE, TWO),
        "call_seconds": 100e-6,
        "barriers": ((1, 0.0), (2, 10e-6)),
        "overheads": (overhead(),),
    }
    return MachineProfile(**{**numbers, **changes})  # type: ignore[arg-type]
