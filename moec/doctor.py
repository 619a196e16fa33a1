"""What of moec works on this machine, and what would make more of it work. Fast: nothing heavy is imported for it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from moec import __version__
from moec.cache import check_dir, wanted_dir
from moec.ir.errors import MoecError
from moec.targets import cpu_cores, cpu_flags, detect_level

# The same range as in pyproject.toml (a test compares them).
TORCH_FROM = (2, 11)
TORCH_BELOW = (2, 14)
PYTHON_FROM = (3, 11)

_COMPILER_TIMEOUT_S = 8
_PROBE = '#include <cstdio>\nint main() { std::printf("moec"); return 0; }\n'
_NOTABLE_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd")

#: extra -> (modules or programs it brings, what it is good for)
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "hf": (("transformers",), "Hugging Face models in explain and demo"),
    "triton": (("triton",), "kernels for GPUs"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "ONNX export and ONNX Runtime"),
    "mlir": (("torch_mlir",), "torch-mlir export"),
    "bench": (("matplotlib",), "pictures of benchmarks and profiles"),
    "ascend": (("ascendnpuir",), "code for Ascend NPUs (the BiSheng IR tools)"),
}
_DISTRIBUTIONS = {"torch_mlir": "torch-mlir", "ascendnpuir": "ascendnpu-ir"}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's answer. ``state`` is ``"ok"``, ``"warn"`` (it hampers) or ``"missing"`` (an extra)."""

    name: str
    state: str
    detail: str
    hint: str = ""


def run_checks() -> list[Check]:
    """Every check, in the order to read them."""
    checks: list[Callable[[], Iterator[Check]]] = [
        _python,
        _moec,
        _torch,
        _entry_point,
        _compiler,
        _cpu,
        _cache,
        _extras,
        _backends,
        _gpu,
    ]
    return [line for check in checks for line in check()]


def _python() -> Iterator[Check]:
    ok = sys.version_info[:2] >= PYTHON_FROM
    hint = "" if ok else f"use Python {_dots(PYTHON_FROM)} or newer"
    yield Check("python", "ok" if ok else "warn", f"{platform.python_version()} ({platform.system()})", hint)


def _moec() -> Iterator[Check]:
    yield Check("moec", "ok", f"{__version__} in {Path(__file__).parent}")


def _torch() -> Iterator[Check]:
    import torch

    text = torch.__version__
    number = tuple(int(p) for p in text.split("+")[0].split(".")[:2] if p.isdigit())
    ok = TORCH_FROM <= number < TORCH_BELOW
    wanted = f"torch>={_dots(TORCH_FROM)},<{_dots(TORCH_BELOW)}"
    yield Check("torch", "ok" if ok else "warn", text, "" if ok else f"untested version; pip install '{wanted}'")
    yield Check("threads", "ok", f"{torch.get_num_threads()} of {cpu_cores()} cores")


def _entry_point() -> Iterator[Check]:
    found = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "moec"]
    if not found:
        hint = 'install moec (pip install -e .); until then `import moec` before torch.compile(..., backend="moec")'
        yield Check("torch.compile backend", "warn", "the entry point is not visible", hint)
        return
    try:
        found[0].load()
    except (ImportError, AttributeError) as e:
        yield Check("torch.compile backend", "warn", f"{found[0].value} does not load: {e}", "install moec again")
        return
    yield Check("torch.compile backend", "ok", 'torch.compile(model, backend="moec")')


def compiler() -> str | None:
    """The C++ compiler that Inductor would use, as a path, or None."""
    candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def _compiler() -> Iterator[Check]:
    path = compiler()
    hint = 'install g++ or clang++, or set CXX; until then use options={"inner": "eager"}'
    if path is None:
        yield Check("C++ compiler", "warn", "none found; Inductor needs one on the CPU", hint)
        return
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        source, program = Path(folder) / "probe.cpp", Path(folder) / "probe"
        source.write_text(_PROBE)
        try:
            made = subprocess.run(
                [path, str(source), "-o", str(program)], capture_output=True, text=True, timeout=_COMPILER_TIMEOUT_S
            )
            works = made.returncode == 0 and subprocess.run([program], capture_output=True).stdout == b"moec"
        except (OSError, subprocess.TimeoutExpired) as e:
            yield Check("C++ compiler", "warn", f"{path} does not run: {e}", hint)
            return
    if works:
        yield Check("C++ compiler", "ok", path)
    else:
        first = (made.stderr.strip().splitlines() or ["its program does not run"])[0]
        yield Check("C++ compiler", "warn", f"{path} does not work: {first}", hint)


def _cpu() -> Iterator[Check]:
    flags = [f for f in _NOTABLE_FLAGS if f in cpu_flags()]
    level = detect_level()
    yield Check("cpu", "ok", f"cpu:{level}, {cpu_cores()} cores; {' '.join(flags) or 'no vector features known'}")


def _cache() -> Iterator[Check]:
    path = wanted_dir()
    state = check_dir(path)
    if state.reason is None:
        yield Check("cache directory", "ok", f"{path}{'' if path.exists() else ' (made when needed)'}")
    else:
        hint = "chmod go-w it, or" if state.unsafe else "mend it, or"
        what = "refused" if state.unsafe else "unusable"
        yield Check("cache directory", "warn", f"{what}: {state.reason}", f"{hint} set MOEC_CACHE_DIR")


def _extras() -> Iterator[Check]:
    for extra, (modules, use) in EXTRAS.items():
        absent = [m for m in modules if not _present(m)]
        if absent:
            yield Check(f"extra {extra}", "missing", f"{', '.join(absent)}: {use}", f"pip install 'moec[{extra}]'")
        else:
            yield Check(f"extra {extra}", "ok", ", ".join(f"{m} {_version(m)}" for m in modules))


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(module: str) -> str:
    try:
        return version(_DISTRIBUTIONS.get(module, module))
    except PackageNotFoundError:
        return "(version unknown)"


def _backends() -> Iterator[Check]:
    from moec.backends.registry import all_backends

    try:
        found = all_backends()
    except MoecError as e:  # a third-party package that does not import must not silence the doctor
        yield Check("backends", "warn", e.message, e.hint or "")
        return
    for backend in found.values():
        for line in backend.status():
            state = "ok" if line.works else "missing"
            detail = line.detail or ("works" if line.works else "does not work")
            yield Check(f"backend {backend.name}: {line.stage}", state, detail)


def _gpu() -> Iterator[Check]:
    from moec.backends.triton.compiled.cross import refusal
    from moec.backends.triton.launches.device import is_gpu
    from moec.targets import known_targets

    if why := refusal():
        yield Check("compile for a GPU", "missing", why, "pip install 'moec[triton]'")
    else:
        targets = ", ".join(filter(is_gpu, known_targets()))
        yield Check("compile for a GPU", "ok", f"moec compile --target T without one; T is {targets}")
    import torch

    if not torch.cuda.is_available():
        hint = "TRITON_INTERPRET=1 runs kernels on the CPU, slowly: moec selfcheck --target cuda"
        yield Check("GPU", "missing", "PyTorch sees none: code for GPUs can be made and inspected, not run", hint)
        return
    from moec.backends.triton.launcher import target_of
    from moec.backends.triton.launches.here import known_kind

    here = target_of(torch.device("cuda", torch.cuda.current_device()))
    like = "" if known_kind(here) == here else f", described as {known_kind(here)} with its own sizes"
    detail = f"{torch.cuda.get_device_name()}, {here}{like}"
    yield Check("GPU", "ok", detail, "moec selfcheck --target cuda compares every kernel with the reference")


def _dots(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
