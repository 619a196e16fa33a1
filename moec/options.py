"""The options of a compile: what ``torch.compile(..., backend="moec", options={...})`` may say, checked once.

Debugging options can also come from the environment (``MOEC_*``, see ``ENVIRONMENT``); what the caller writes wins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.ir.errors import MoecError, nearest
from moec.targets import Target, parse_target

if TYPE_CHECKING:
    from moec.report import Report

INNER = ("inductor", "aot_eager", "eager")
CHECKS = ("warn", "strict", "off")

#: Environment variable -> (option, what it does). Only options that help to look inside can be set this way.
ENVIRONMENT: dict[str, tuple[str, str]] = {
    "MOEC_DUMP_DIR": ("dump_dir", "folder that gets the IR after every pass, one `NNN_pass.moe` each"),
    "MOEC_PRINT_IR_AFTER_ALL": ("print_ir_after_all", "`1` prints the IR after every pass to stderr"),
    "MOEC_TIME_PASSES": ("time_passes", "`1` prints the time of every pass to stderr"),
    "MOEC_STATS": ("stats", "`1` prints what every pass changed to stderr"),
    "MOEC_FUEL": ("fuel", "number of rewrites allowed in all; the rest is left undone (for bisecting)"),
    "MOEC_VERIFY": ("verify", "`0` skips the verifier between passes"),
    "MOEC_CHECKS": ("checks", "`warn`, `strict` or `off`: what unfused blocks and NaN router logits are to the user"),
}


class OptionError(MoecError):
    """An option that does not exist, or a value it cannot take."""

    code = "option"


@dataclass(frozen=True)
class CompileOptions:
    """What one compile may be told. Every field is a key of the ``options`` dict.

    Attributes:
        inner: Who compiles what is not MoE: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        passes: Pipeline text (``"fuse-routing,fuse-experts"``), or the name of a pipeline.
        backends: Names of the backends that may claim MoE ops, in order.
        target: What to compile for, as text: ``"cpu"``, ``"cpu:avx512"``, ``"cuda:sm90,ranks=8"``.
        threads: Threads of a kernel's call on a CPU; None for as many as torch is set to when it is called.
        checks: What happens where PyTorch would go on in silence, that is where a block is left unfused (told when
            compiling) or router logits hold NaN (told when running): a warning (``"warn"``), an error (``"strict"``)
            or nothing (``"off"``). Expert ids out of range and operands that do not fit together are always errors.
        dump_dir: Folder for the IR after every pass.
        print_ir_after_all: Print the IR after every pass to stderr.
        time_passes: Print the time of every pass to stderr.
        stats: Print what every pass changed to stderr.
        fuel: Rewrites allowed in all, or None for no limit.
        verify: Run the verifier before, between and after passes.
        report: Called with the ``Report`` of every compiled graph.
        routing: File of a routing profile (``moec profile --routing``), for passes that ask what tokens choose.
    """

    inner: str = "inductor"
    passes: str = "default"
    backends: tuple[str, ...] = ("cpu", "aten")
    target: str = "cpu"
    threads: int | None = None
    checks: str = "warn"
    dump_dir: Path | None = None
    print_ir_after_all: bool = False
    time_passes: bool = False
    stats: bool = False
    fuel: int | None = None
    verify: bool = True
    report: Callable[[Report], None] | None = None
    routing: Path | None = None

    @property
    def target_description(self) -> Target:
        """The parsed target."""
        return parse_target(self.target)

    @property
    def backend_target(self) -> str:
        """The target as backends get it: with the number of threads where that is fixed."""
        return self.target if self.threads is None else f"{self.target},cores={self.threads}"

    @staticmethod
    def from_dict(
        options: Mapping[str, Any] | None = None, *, environ: Mapping[str, str] | None = None
    ) -> CompileOptions:
        """Options as the user gave them, on top of the environment, on top of the defaults.

        Args:
            options: The dict given to ``torch.compile``; None is the empty one. A value may have the natural Python
                type or be text (``"fuel": "12"``).
            environ: The environment; ``os.environ`` by default.

        Raises:
            OptionError: Unknown option or value; the message says what exists and what is nearest.
            MoecError: A pipeline, backend or target that does not exist, in its own words.
        """
        environ = os.environ if environ is None else environ
        merged: dict[str, Any] = {}
        for variable, (name, _) in ENVIRONMENT.items():
            if text := environ.get(variable, ""):
                merged[name] = _convert(name, text, variable)
        known = [f.name for f in fields(CompileOptions)]
        for name, value in (options or {}).items():
            if name not in known:
                raise OptionError(
                    f"unknown option {name!r}; {nearest(str(name), known)}", hint="options: " + ", ".join(known)
                )
            merged[name] = _convert(name, value, f"option {name!r}")
        options_made = CompileOptions(**merged)
        parse_target(options_made.backend_target)  # threads are for CPUs alone
        return options_made


def _choice(allowed: tuple[str, ...]) -> Callable[[Any, str], str]:
    def convert(value: Any, where: str) -> str:
        if value not in allowed:
            hint = "values: " + ", ".join(repr(a) for a in allowed)
            raise OptionError(f"{where} cannot be {value!r}; {nearest(str(value), allowed)}", hint=hint)
        return str(value)

    return convert


def _flag(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise OptionError(f"{where} is a flag and cannot be {value!r}", hint="give True or False")


def _fuel(value: Any, where: str) -> int | None:
    if value is None:
        return None
    try:
        count = int(value) if isinstance(value, str) else value
    except ValueError:
        count = -1
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise OptionError(f"{where} cannot be {value!r}", hint="give the number of rewrites allowed, from 0 up")
    return count


def _path(value: Any, where: str) -> Path | None:
    if value is None or isinstance(value, Path):
        return value
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise OptionError(f"{where} cannot be {value!r}", hint="give the path of a folder")
    return Path(value)


def _passes(value: Any, where: str) -> str:
    from moec.passes.registry import parse_pipeline

    if not isinstance(value, str):
        raise OptionError(f"{where} cannot be {value!r}", hint="give pipeline text such as 'fuse-routing,fuse-experts'")
    parse_pipeline(value)  # raises with the nearest names
    return value


def _backends(value: Any, where: str) -> tuple[str, ...]:
    from moec.backends.registry import get_backend

    names = tuple(n.strip() for n in value.split(",")) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise OptionError(f"{where} cannot be {value!r}", hint="give a list of names, first choice first: ['aten']")
    for name in names:
        get_backend(name)  # raises with the nearest names
    if duplicates := sorted({n for n in names if names.count(n) > 1}):
        raise OptionError(f"{where} names {duplicates[0]!r} twice", hint="list every backend once, in claim order")
    return tuple(names)


def _target(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise OptionError(f"{where} cannot be {value!r}", hint="give target text such as 'cpu' or 'cuda:sm90,ranks=8'")
    parse_target(value)
    return value


def _routing(value: Any, where: str) -> Path | None:
    from moec.routing.store import load_routing

    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise OptionError(f"{where} cannot be {value!r}", hint="give the path of a file of `moec profile --routing`")
    load_routing(Path(value))  # raises where it is none
    return Path(value)


def _threads(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not str(value).strip().isdigit() or int(value) < 1:
        raise OptionError(f"{where} cannot be {value!r}", hint="give a number from 1 up, or None for torch's setting")
    return int(value)


def _report(value: Any, where: str) -> Any:
    if value is not None and not callable(value):
        raise OptionError(f"{where} cannot be {value!r}", hint="give a function of one argument, the report, or None")
    return value


_CONVERTERS: dict[str, Callable[[Any, str], Any]] = {
    "inner": _choice(INNER),
    "passes": _passes,
    "backends": _backends,
    "target": _target,
    "routing": _routing,
    "threads": _threads,
    "checks": _choice(CHECKS),
    "dump_dir": _path,
    "print_ir_after_all": _flag,
    "time_passes": _flag,
    "stats": _flag,
    "fuel": _fuel,
    "verify": _flag,
    "report": _report,
}


def _convert(name: str, value: Any, where: str) -> Any:
    return _CONVERTERS[name](value, where)
