"""Options: every wrong name or value gives one message that names what exists."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moec.ir.errors import MoecError
from moec.options import ENVIRONMENT, CompileOptions, OptionError


def make(options: dict[str, Any] | None = None, **environ: str) -> CompileOptions:
    return CompileOptions.from_dict(options, environ=environ)


def test_defaults() -> None:
    assert make() == make({}) == CompileOptions()
    assert CompileOptions().backends == ("cpu", "aten")


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().inner = "eager"  # type: ignore[misc]


def test_all_taken() -> None:
    def callback(report: object) -> None:
        pass

    got = make(
        {
            "inner": "eager",
            "passes": "fuse-routing",
            "backends": ["reference"],
            "target": "cpu:avx512",
            "threads": 2,
            "checks": "strict",
            "dump_dir": "d",
            "print_ir_after_all": True,
            "time_passes": 1,
            "stats": "on",
            "fuel": 3,
            "verify": False,
            "report": callback,
        }
    )
    assert got == CompileOptions(
        "eager",
        "fuse-routing",
        ("reference",),
        "cpu:avx512",
        2,
        "strict",
        Path("d"),
        True,
        True,
        True,
        3,
        False,
        callback,
    )
    assert got.target_description.name == "cpu:avx512"


def test_threads_are_part_of_the_target_that_backends_get() -> None:
    assert make({"threads": "3"}).backend_target == "cpu,cores=3"
    assert make({}).backend_target == "cpu"
    for wrong in (0, -1, "many", True, 1.5):
        with pytest.raises(OptionError, match="threads"):
            make({"threads": wrong})
    with pytest.raises(MoecError, match="fixed number of cores"):
        make({"threads": 2, "target": "cuda:sm90"})


def test_backends_as_text() -> None:
    assert make({"backends": "reference, aten"}).backends == ("reference", "aten")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iner": "eager"}, "unknown option 'iner'; did you mean 'inner'"),
        ({"inner": "inducto"}, "cannot be 'inducto'; did you mean 'inductor'"),
        ({"inner": []}, "cannot be"),
        ({"checks": "strikt"}, "did you mean 'strict'"),
        ({"passes": "fuse-rooting"}, "did you mean 'fuse-routing'"),
        ({"passes": 3}, "pipeline text"),
        ({"backends": ["atenn"]}, "did you mean 'aten'"),
        ({"backends": ["aten", "aten"]}, "twice"),
        ({"backends": 1}, "list of names"),
        ({"target": "cuda:sm9"}, "did you mean 'cuda:sm90'"),
        ({"target": None}, "target text"),
        ({"fuel": -1}, "fuel"),
        ({"fuel": True}, "fuel"),
        ({"fuel": "many"}, "fuel"),
        ({"verify": "maybe"}, "flag"),
        ({"dump_dir": 4}, "folder"),
        ({"report": "yes"}, "function"),
        ({"routing": 4}, "path of a file"),
        ({"routing": "no/such.json"}, "there is no routing profile"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MoecError) as caught:
        make(options)
    assert message in str(caught.value)


def test_environment_and_its_precedence() -> None:
    assert make(MOEC_FUEL="7", MOEC_TIME_PASSES="1", MOEC_VERIFY="0", MOEC_DUMP_DIR="x") == CompileOptions(
        fuel=7, time_passes=True, verify=False, dump_dir=Path("x")
    )
    assert make({"fuel": 2}, MOEC_FUEL="7").fuel == 2
    assert make({"fuel": None}, MOEC_FUEL="7").fuel is None
    assert make(MOEC_FUEL="").fuel is None


def test_environment_errors_name_the_variable() -> None:
    with pytest.raises(OptionError, match="MOEC_FUEL"):
        make(MOEC_FUEL="x")


def test_every_environment_variable_is_an_option() -> None:
    names = {f.name for f in dataclasses.fields(CompileOptions)}
    assert {option for option, _ in ENVIRONMENT.values()} <= names
