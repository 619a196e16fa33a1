"""What this machine can do at most, measured here and now: arithmetic, GEMM, reading.

Three rates for one number of threads and one element type:

- the peak of multiply-adds whose operands stay in registers, which no GEMM reaches;
- the best GEMM found: PyTorch's, and moec's cpu backend on one dense layer;
- reading memory that no cache holds, the best of several ways that kernels read weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moec.backends.cpu.isa import isa_of
from moec.calibration.probes import Probes
from moec.ir.errors import MoecError
from ours import make_weights, moec_calls
from routing import Batch, draw_tokens
from shapes import DTYPES, Shape

_GEMM_SECONDS = 3.0  # longest that one product may take: some types have no fast GEMM everywhere


@dataclass(frozen=True)
class Effort:
    """How large the measurements are.

    Attributes:
        read_bytes: Far more than a cache holds.
        gemms: Sizes of square products.
        dense: Widths and token count of the dense layer.
    """

    read_bytes: int = 3 << 29
    gemms: tuple[int, ...] = (2048, 4096)
    dense: tuple[int, int] = (4096, 2048)


FULL, QUICK = Effort(), Effort(1 << 26, (512,), (512, 256))


@dataclass(frozen=True)
class Machine:
    """Rates of this machine, best of several; operations count a multiply-add as two.

    Attributes:
        dtype: Element type.
        threads: Of every measurement.
        processor: Its name.
        registers: Operations a second on registers.
        gemms: Operations a second of GEMMs by name.
        reads: Bytes a second by pattern.
    """

    dtype: str
    threads: int
    processor: str
    registers: float
    gemms: dict[str, float]
    reads: dict[str, float]

    @property
    def flops(self) -> float:
        """Of the best GEMM."""
        return max(self.gemms.values())

    @property
    def bandwidth(self) -> float:
        """Of the best way to read."""
        return max(self.reads.values())

    def limit(self, flops: float, weight_bytes: float) -> float:
        """Seconds that the work takes at least."""
        return max(flops / self.flops, weight_bytes / self.bandwidth)


def measure(dtype: str, threads: int, target: str, tell: Callable[[str], None], effort: Effort = FULL) -> Machine:
    """Measures for element type ``dtype`` with ``threads`` threads; about ten seconds.

    Raises:
        MoecError: This processor has none of the cpu backend's instruction sets.
    """
    isa = isa_of(target)
    if isinstance(isa, str):
        raise MoecError(f"nothing to measure: {isa}")
    probes = Probes(isa)
    registers, gemms, reads = 0.0, {}, dict[str, float]()
    for turn in range(2):  # before and after the products: one of them may meet somebody else's work
        tell("arithmetic on registers, and reading")
        registers = max(registers, probes.flops_per_s(dtype, threads))
        for name, rate in probes.reads(threads, effort.read_bytes).items():
            reads[name] = max(reads.get(name, 0.0), rate)
        if turn == 0:
            with torch.no_grad():
                gemms = _gemms(dtype, target, tell, effort)
    return Machine(dtype, threads, _processor(), registers, gemms, reads)


def _gemms(dtype: str, target: str, tell: Callable[[str], None], effort: Effort) -> dict[str, float]:
    kind = DTYPES[dtype]
    found: dict[str, float] = {}
    rate = 0.0
    for n in (256, *effort.gemms):
        if rate and 2 * n**3 / rate > _GEMM_SECONDS:
            tell(f"torch.mm of {n} in {dtype} would take too long and is left out")
            break
        tell(f"torch.mm of {n}")
        a, b = torch.randn(n, n).to(kind), torch.randn(n, n).to(kind)
        rate = 2 * n**3 / _best(partial(torch.mm, a, b))
        if n in effort.gemms:
            found[f"torch.mm {n}"] = rate
    tell("one dense layer of the cpu backend")
    width, tokens = effort.dense
    dense = Shape("dense", width, width, 1, 1)
    x, w = draw_tokens(dense, tokens, kind)
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    (call,) = moec_calls("cpu", target, dtype, dense, make_weights(dense, kind, 1))
    batch = Batch(x, ids, ids.to(torch.int32), w)
    found["cpu backend, dense layer"] = dense.flops(tokens) / _best(lambda: call(batch))
    return found


def _best(call: Callable[[], object]) -> float:
    """Fewest seconds of several calls after a warm one; a slow one is called less often."""
    call()
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < _GEMM_SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
