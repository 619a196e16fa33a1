"""The command line: results to stdout, one block per problem to stderr, exit codes, never a raw traceback."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from moec.backends.registry import all_backends
from moec.cli.app import main
from moec.passes.pipelines import PIPELINES
from moec.passes.registry import all_passes

ROOT = Path(__file__).resolve().parents[2]
BLOCK = str(ROOT / "examples" / "block.moe")
CONFIG = str(ROOT / "examples" / "mixtral_small.json")


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def moec(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*args: str) -> Result:
        with pytest.raises(SystemExit) as stop:
            main(args)
        captured = capsys.readouterr()
        code = stop.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


Moec = Callable[..., Result]


def test_version_and_help(moec: Moec) -> None:
    assert moec("--version").out.startswith("moec 0.")
    commands = ("demo", "compile", "run", "inspect", "bench", "explain", "opt", "passes", "backends", "doctor")
    assert all(c in moec("--help").out for c in commands)
    assert all(moec(c, "--help").code == 0 for c in commands)


def test_wrong_usage(moec: Moec) -> None:
    assert moec("nonsense").code == 2
    assert moec("opt").code == 2


# --- opt


def test_opt_runs_passes(moec: Moec) -> None:
    got = moec("opt", BLOCK, "-p", "fuse-routing,fuse-experts,dce", "--remarks")
    assert got.code == 0
    assert "moe.experts" in got.out
    assert "moe.dispatch" not in got.out
    assert got.err.splitlines()[0].startswith("applied: fuse-routing")


def test_opt_watching_leaves_stdout_alone(moec: Moec, tmp_path: Path) -> None:
    plain = moec("opt", BLOCK, "-p", "fuse-routing,dce")
    watched = moec(
        "opt", BLOCK, "-p", "fuse-routing,dce", "--print-ir-after-all", "--time-passes", "--stats",
        "--dump-dir", str(tmp_path / "dump"),
    )  # fmt: skip
    assert watched.out == plain.out
    assert plain.err == ""
    assert "after dce" in watched.err
    assert [p.name for p in sorted((tmp_path / "dump").iterdir())] == [
        "000_input.moe",
        "001_fuse-routing.moe",
        "002_dce.moe",
    ]


def test_opt_output_file(moec: Moec, tmp_path: Path) -> None:
    out = tmp_path / "out.moe"
    assert moec("opt", BLOCK, "-o", str(out)) == (0, "", "")
    assert moec("opt", str(out)).out == out.read_text()


def test_opt_fuel(moec: Moec, tmp_path: Path) -> None:
    file = tmp_path / "dead.moe"
    dead = "graph @a(%x: f32[T]) -> f32[T] {\n  %y = torch.call @aten.silu.default(%x) : f32[T]\n  return %x\n}\n"
    file.write_text(dead)
    assert moec("opt", str(file), "-p", "dce", "--fuel", "0").out == dead
    assert "silu" not in moec("opt", str(file), "-p", "dce", "--fuel", "1").out


def test_opt_reads_stdin(moec: Moec, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "graph @a(%x: f32[T]) -> f32[T] {\n  return %x\n}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert moec("opt", "-") == (0, text, "")


def test_opt_verify_only(moec: Moec) -> None:
    assert moec("opt", BLOCK, "--verify-only") == (0, "", "")


@pytest.mark.parametrize(
    ("args", "text", "message"),
    [
        ((), "graph @a(%x: f32[T", "error[parse]"),
        ((), "graph @a(%x: f99[T]) -> f32[T] {\n return %x\n}", "f99"),
        ((), "graph @a(%x: f32[T]) -> f32[T] {\n return %y\n}", "%y"),
        ((), "graph @a(%x: f32[T]) -> bf16[T] {\n return %x\n}", "bf16[T]"),
        (("-p", "fuse-rooting"), "", "did you mean 'fuse-routing'"),
        (("-p", "fuse-routing{k=3}"), "", "fuse-routing"),
        (("--target", "cpux"), "", "did you mean 'cpu'"),
    ],
)
def test_opt_errors_are_one_block(moec: Moec, tmp_path: Path, args: tuple[str, ...], text: str, message: str) -> None:
    file = tmp_path / "in.moe"
    file.write_text(text)
    got = moec("opt", str(file), *args)
    assert got.code == 2
    assert got.out == ""
    assert message in got.err
    assert got.err.count("error[") == 1
    assert "Traceback" not in got.err


def test_parse_errors_show_line_column_and_caret(moec: Moec, tmp_path: Path) -> None:
    file = tmp_path / "in.moe"
    file.write_text("graph @a(%x: f32[T]) -> f32[T] {\n  retrun %x\n}\n")
    lines = moec("opt", str(file)).err.splitlines()
    assert f"{file}:2:" in lines[0]
    column = int(lines[0].split(":2:")[1].split(":")[0])
    assert lines[1].strip() == "retrun %x"
    assert lines[2].index("^") == lines[1].index("retrun") - 2 + column - 1


@pytest.mark.parametrize("content", [None, b"\xff\xfe graph"])
def test_opt_unreadable_input(moec: Moec, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "in.moe"
    if content is not None:
        file.write_bytes(content)
    got = moec("opt", str(file))
    assert (got.code, got.err.count("error[file]")) == (2, 1)


def test_opt_unwritable_output(moec: Moec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for args in (("-o", str(tmp_path / "file" / "o.moe")), ("-p", "dce", "--dump-dir", str(tmp_path / "file"))):
        got = moec("opt", BLOCK, *args)
        assert (got.code, got.err.count("error[file]")) == (2, 1)


def test_traceback_only_on_demand(moec: Moec) -> None:
    assert "Traceback" not in moec("opt", "nothing.moe").err
    got = moec("opt", "nothing.moe", "--traceback")
    assert got.code == 2
    assert "Traceback" in got.err


def test_a_fault_of_moec_is_told_as_one(moec: Moec, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str, filename: str) -> None:
        raise RuntimeError("deep inside\nsecond line")

    monkeypatch.setattr("moec.ir.parser.parse", broken)
    got = moec("opt", BLOCK)
    assert got.code == 1
    assert "internal error: RuntimeError: deep inside\n" in got.err
    assert "--traceback" in got.err
    assert "Traceback" not in got.err


# --- passes, backends, doctor


def test_passes_lists_and_describes_every_one(moec: Moec) -> None:
    listed = moec("passes").out
    for name in [*all_passes(), *PIPELINES]:
        assert name in listed
        described = moec("passes", name)
        assert described.code == 0
        assert described.out.startswith(f"{name}: ")
    got = moec("passes", "fuse-expert")
    assert got.code == 2
    assert "did you mean 'fuse-experts'" in got.err


def test_backends_lists_and_describes_every_one(moec: Moec) -> None:
    listed = moec("backends").out
    for name in all_backends():
        assert name in listed
        assert "on this machine:" in moec("backends", name).out
    got = moec("backends", "attn")
    assert got.code == 2
    assert "did you mean 'aten'" in got.err


def test_doctor(moec: Moec) -> None:
    got = moec("doctor", "--json")
    assert got.code == 0
    checks = {c["name"]: c for c in json.loads(got.out)["checks"]}
    assert checks["torch"]["state"] == "ok"
    assert {"python", "C++ compiler", "cpu", "cache directory", "extra hf", "extra triton"} <= set(checks)
    assert all(c["hint"] for c in checks.values() if c["state"] == "warn")
    assert moec("doctor").code == 0


# --- explain


def test_explain_a_config(moec: Moec) -> None:
    got = moec("explain", CONFIG, "--random-weights", "--json", "--dtype", "fp32", "--batch", "2", "--seq", "5")
    assert got.code == 0, got.err
    layers = json.loads(got.out)["layers"]
    assert [(b["num_experts"], b["top_k"], b["dtype"], b["fused"]) for b in layers] == [(8, 2, "f32", True)] * 2
    assert "%x: f32[10, 64]" in layers[0]["ir_before"] or "f32[10, 64]" in layers[0]["ir_before"]


def test_explain_a_factory(moec: Moec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    got = moec("explain", "examples.factory:olmoe", "--ir")
    assert got.code == 0, got.err
    assert "softmax top-2" in got.out
    assert "moe.experts" in got.out


def test_explain_a_stored_model(moec: Moec, tmp_path: Path) -> None:
    from examples.factory import olmoe

    model, _, _ = olmoe()
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    got = moec("explain", str(tmp_path / "model"), "--json")
    assert got.code == 0, got.err
    assert len(json.loads(got.out)["layers"]) == 2


FACTORIES = """
import torch
def dense(): return torch.nn.Linear(4, 4), (torch.ones(2, 4),)
def broken(): raise ValueError("no weights here")
def alone(): return torch.nn.Linear(4, 4)
def number(): return 3
def wrong_input(): return torch.nn.Linear(4, 4), (torch.ones(2, 5),)
value = 4
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no/such/folder", "there is no file or folder"),
        ("nothing.json", "there is no file or folder"),
        ("no_such_module:make", "there is no module 'no_such_module'"),
        ("cli_factories:", "names no factory"),
        ("cli_factories:dens", "did you mean 'dense'"),
        ("cli_factories:value", "not a function"),
        ("cli_factories:broken", "raises ValueError: no weights here"),
        ("cli_factories:alone", "return (module, args)"),
        ("cli_factories:number", "returns a int"),
        ("cli_factories:wrong_input", "cannot be run on its example input"),
        ("cli_factories:dense", "error[no-moe]"),
        ("cli_broken:dense", "raises ZeroDivisionError"),
    ],
)
def test_explain_errors(moec: Moec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    (tmp_path / "cli_factories.py").write_text(FACTORIES)
    (tmp_path / "cli_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    got = moec("explain", text)
    assert got.code == 2
    assert message in got.err
    assert "Traceback" not in got.err


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        ('{"model_type": "mixtral"}', (), "add --random-weights"),
        ('{"model_type": "mixtrl"}', ("--random-weights",), "did you mean 'mixtral'"),
        ('{"model_type": "my-own-thing-entirely"}', ("--random-weights",), "package.module:factory"),
        ('{"vocab_size": 3}', ("--random-weights",), "no model_type"),
        ("{,}", ("--random-weights",), "line 1, column 2"),
        ('{"model_type": "vit"}', ("--random-weights",), "no text model"),
        ('{"model_type": "mixtral"}', ("--random-weights", "--dtype", "bf61"), "did you mean 'bf16'"),
        ('{"model_type": "mixtral", "hidden_size": "wide"}', ("--random-weights",), "error[model]"),
        ('{"model_type": "mixtral", "hidden_size": 65536}', ("--random-weights",), "memory are free"),
    ],
)
def test_explain_bad_configs(moec: Moec, tmp_path: Path, content: str, args: tuple[str, ...], message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    for path in (tmp_path, tmp_path / "config.json"):
        got = moec("explain", str(path), *args)
        assert got.code == 2
        assert message in got.err
        assert "Traceback" not in got.err


def test_explain_a_folder_without_config(moec: Moec, tmp_path: Path) -> None:
    assert "has no config.json" in moec("explain", str(tmp_path)).err


def test_explain_without_transformers(moec: Moec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    got = moec("explain", CONFIG, "--random-weights")
    assert (got.code, "pip install 'moec[hf]'" in got.err) == (2, True)
