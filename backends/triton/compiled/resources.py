"""What a compiled kernel takes of the hardware, read from what the compiler made: registers, spills, shared memory.

NVIDIA's numbers are those of ``cuobjdump``, which Triton's wheel brings; a kernel without a stack frame has spilled
nothing. AMD's stand in the metadata that the assembly carries into the code object.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moec.backends.triton.launches.device import Device
from moec.ir.errors import MoecError

_TIMEOUT_SECONDS = 60


class ResourceError(MoecError):
    """A compiled kernel that cannot be read."""

    code = "triton-resources"


@dataclass(frozen=True)
class Resources:
    """What a kernel takes.

    Attributes:
        registers: 32-bit registers of a thread.
        spills: Bytes of a thread in memory that should have been registers.
        shared: Bytes of shared memory of a block.
        columns: Columns of tensor memory.
        occupancy: Resident blocks of a unit.
        mma: Matrix instructions by name, and how often they stand in the assembly.
    """

    registers: int
    spills: int
    shared: int
    columns: int
    occupancy: int
    mma: dict[str, int]


MMA_NAMES = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
"""Matrix instructions, as assembly names them."""


def read_resources(device: Device, binary: bytes, assembly: str, shared: int, columns: int, warps: int) -> Resources:
    """Read a kernel's resources.

    Args:
        device: What it was compiled for.
        binary: The cubin or hsaco.
        assembly: PTX or AMD's assembly.
        shared: Bytes of shared memory that its launch asks for.
        columns: Of tensor memory.
        warps: Of a block.

    Raises:
        ResourceError: The code cannot be read.
    """
    registers, spills = _hip(assembly) if device.hip else _cubin(binary)
    resident = device.resident(shared, registers, warps)
    if columns:
        resident = min(resident, device.tensor_columns // columns)
    mma = {
        name: count
        for name in MMA_NAMES
        if (count := len(re.findall(rf"^\s*(?:@\S+\s+)?{re.escape(name)}", assembly, re.M)))
    }
    return Resources(registers, spills, shared, columns, resident, mma)


def cuobjdump() -> str:
    """NVIDIA's reader of code objects, as a path."""
    from triton import knobs

    return str(knobs.nvidia.cuobjdump.path)


def _cubin(binary: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        try:
            command = [cuobjdump(), "--dump-resource-usage", str(path)]
            told = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ResourceError(f"cuobjdump cannot be run: {error}", hint="install triton again") from error
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told.stdout)
    if found is None:
        text = (told.stderr.strip() or told.stdout.strip() or "nothing").splitlines()[-1]
        raise ResourceError(f"cuobjdump does not understand the kernel: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _hip(assembly: str) -> tuple[int, int]:
    """Vector registers of a thread, and bytes that it spills."""

    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.M)
        if found is None:
            raise ResourceError(f"the assembly does not say .{name}")
        return int(found[1])

    spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return number("vgpr_count"), max(spills, number("private_segment_fixed_size"))
