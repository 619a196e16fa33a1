"""What a GPU architecture allows and can do: the numbers that launch parameters are chosen by.

Limits are those of NVIDIA's CUDA C++ Programming Guide (table "Technical Specifications per Compute Capability") and of
AMD's "CDNA 3 instruction set architecture" guide and white paper; clocks, multiprocessors and caches those of the chip
that ``moec.targets`` names.

Bytes a cycle of the last cache: 5120 on sm80 (NVIDIA's A100 white paper) and 17.2 TB/s on gfx942 (AMD's CDNA 3 white
paper, Infinity Cache) are the vendors'. NVIDIA gives none for later chips. sm90's 4472 are measured on H800 PCIe, the
same die with 114 multiprocessors (arXiv:2402.13499, table V; XLA's cost model counts with 6.65 TB/s, 3634 a cycle,
"measured H100"). sm89's 2048 are near what loads past the first cache get of an RTX 4090 (1946). sm100's are taken to
be A100's for each of its two dies: loads of tiles that 4 to 16 multiprocessors of a B200 share get 7533 to 8612, though
each waits for all of its loads before it asks for more (SemiAnalysis, github.com/SemiAnalysisAI/microbench-blackwell,
``tma2dmcast_throughput``).

Of that a unit is taken to get 64 bytes a cycle at most. On B200 it gets more: there CUTLASS multiplies 128 x 128 x 64
elements of bf16 in 206 ns of a multiprocessor, which brings 32 KiB, 81 bytes a cycle at its highest clock
(``cutlass_gemm_mainloop``, ibid.). The same measurements have ``tcgen05`` at 8153 operations a cycle for 128 x 256 and
4078 for 64 x 256 (``umma_throughput``), and a load through a descriptor that waits for memory at 900 to 1258 cycles for
0.5 to 8 KiB (``tma2d_throughput``). A hit of the cache takes 262 cycles on A100 and 263 on H800 (arXiv:2402.13499,
table IV), and about 150 ns on B200 within a die (Chips and Cheese, "Nvidia's B200: Keeping the CUDA Juggernaut
Rolling").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from moec.targets import Target, TargetError, described_as, known_targets, parse_target

KINDS = ("cuda", "hip")
KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Mma:
    """A matrix instruction.

    Attributes:
        name: How assembly begins it: ``wgmma.mma_async``.
        rows: Rows of a tile that one group of warps multiplies; a tile with fewer cannot use it.
        warps: Warps in such a group.
        rate: Part of the device's peak that it reaches.
        shared: Operands are read from shared memory, not through registers.
    """

    name: str
    rows: int
    warps: int
    rate: float = 1.0
    shared: bool = False


@dataclass(frozen=True)
class Device:
    """One GPU architecture; a unit is a multiprocessor (NVIDIA) or a compute unit (AMD).

    Attributes:
        target: As ``parse_target`` gives it: peaks, bandwidth, number of units.
        arch: Triton's name: 90 or ``"gfx942"``.
        warp: Threads of a warp.
        clock: Hz at which the peaks of ``target`` are reached.
        registers: 32-bit registers of a unit.
        thread_registers: Most that a thread may use without spilling.
        warps: Most resident warps of a unit.
        blocks: Most resident blocks of a unit.
        shared: Bytes of shared memory of a unit.
        shared_block: Most bytes of one block.
        shared_reserved: Bytes that the system takes of every block.
        tensor_columns: Columns of tensor memory of a unit (128 rows of 4 bytes); 0 where there is none.
        cache: Bytes of the cache that all units share, the last before memory.
        cache_cycle: Bytes a cycle that it gives to all units together.
        link: Bytes a cycle that a unit gets of it at most.
        hit: Cycles from a load's issue to its data in it.
        delay: Seconds from a load's issue to its data from memory, under load.
        mma: Its matrix instructions, best first.
        fingerprint: Of the device that is here, for what was measured on it; empty for a description.
    """

    target: Target
    arch: int | str
    warp: int
    clock: float
    registers: int
    thread_registers: int
    warps: int
    blocks: int
    shared: int
    shared_block: int
    shared_reserved: int
    tensor_columns: int
    cache: int
    cache_cycle: int
    link: int
    hit: int
    delay: float
    mma: tuple[Mma, ...]
    fingerprint: str = ""

    @property
    def units(self) -> int:
        """Multiprocessors or compute units."""
        return self.target.cores

    @property
    def hip(self) -> bool:
        """It is AMD's."""
        return self.target.kind == "hip"

    def unit_flops(self, dtype: str) -> float:
        """Operations of matrix products of a unit in a cycle."""
        return self.target.flops_per_s(dtype) / (self.units * self.clock)

    def mma_for(self, rows: int, warps: int) -> Mma:
        """The best instruction for a tile of ``rows`` rows and a block of ``warps`` warps; the last takes any."""
        return next((m for m in self.mma if rows >= m.rows and warps >= m.warps), self.mma[-1])

    def resident(self, shared: int, registers: int, warps: int) -> int:
        """Blocks that are resident on a unit at once: occupancy.

        Args:
            shared: Bytes of a block.
            registers: Of a thread; hardware hands them out eight at a time.
            warps: Of a block.
        """
        taken = -(-max(registers, 1) // 8) * 8 * self.warp * warps
        by_shared = self.shared // (shared + self.shared_reserved) if shared + self.shared_reserved else self.blocks
        return min(self.blocks, self.warps // warps, by_shared, self.registers // taken)


_DELAY = 0.55e-6
"""Twice the 479 cycles at 1.755 GHz that a load takes on an idle H800 (arXiv:2402.13499, table IV)."""
_HIT = 263
_SYNC = Mma("mma.sync", 16, 1)
# On Hopper the older instruction reaches 62 % of the peak (arXiv:2402.13499, section IV). On Blackwell it is taken to
# multiply as much in a cycle as Ampere's, a quarter of what tcgen05 does. An instruction of 64 rows fills half the
# lanes of tensor memory (PTX ISA, data path layouts of tcgen05) and lasts as long as one of 128.
_HOPPER_SYNC = Mma("mma.sync", 16, 1, 0.62)
_BLACKWELL_SYNC = Mma("mma.sync", 16, 1, 0.25)


def _device(target: Target) -> Device:
    name = described_as(target.name).partition(":")[2]
    if target.kind == "hip":
        return Device(
            target, "gfx942", 64, 2.1e9, 4 * 512 * 64, 512, 32, 32, 64 * KIB, 64 * KIB, 0, 0, 256 * MIB, 8192, 64, _HIT,
            0.8e-6, (Mma("v_mfma", 16, 1),),
        )  # fmt: skip
    if name == "sm80":
        return _nvidia(target, 80, 1.41e9, 64, 32, 164, 40, 5120, (_SYNC,))
    if name == "sm89":
        return _nvidia(target, 89, 2.52e9, 48, 24, 100, 48, 2048, (_SYNC,))
    if name == "sm90":
        hopper = (Mma("wgmma.mma_async", 64, 4, 1.0, True), _HOPPER_SYNC)
        return _nvidia(target, 90, 1.83e9, 64, 32, 228, 50, 4472, hopper)
    mma = (Mma("tcgen05.mma", 128, 4, 1.0, True), Mma("tcgen05.mma", 64, 4, 0.5, True), _BLACKWELL_SYNC)
    return _nvidia(target, 100, 1.856e9, 64, 32, 228, 126, 10240, mma, 512, 80, 278)


def _nvidia(
    target: Target, arch: int, clock: float, warps: int, blocks: int, shared: int, cache: int, cycle: int,
    mma: tuple[Mma, ...], columns: int = 0, link: int = 64, hit: int = _HIT,
) -> Device:  # fmt: skip
    return Device(
        target, arch, 32, clock, 65536, 255, warps, blocks, shared * KIB, (shared - 1) * KIB, KIB, columns,
        cache * MIB, cycle, link, hit, _DELAY, mma,
    )  # fmt: skip


@lru_cache(maxsize=64)
def device_of(target: str) -> Device:
    """The architecture of a target.

    Raises:
        TargetError: It is no GPU, or none that there are numbers for.
    """
    parsed = parse_target(target)
    if parsed.kind not in KINDS:
        hint = "targets: " + ", ".join(filter(is_gpu, known_targets()))
        raise TargetError(f"{parsed.name} is no GPU", hint=hint)
    name = parsed.name.partition(":")[2]
    return replace(_device(parsed), arch=name if parsed.kind == "hip" else int(name.removeprefix("sm")))


def is_gpu(target: str) -> bool:
    """Whether a target's text names a GPU, known or not."""
    return target.partition(":")[0] in KINDS


def gpu_targets() -> list[str]:
    """The names of targets that have numbers of their own here."""
    return [name for name in known_targets() if is_gpu(name) and described_as(name) == name]
