"""Models that cannot be compiled ahead of time: one message each, before anything long is done."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from moec.aot.build import AotOptions, build
from moec.aot.checkpoint import read_headers
from moec.aot.dynamic import example_size, parse_dynamic, shapes
from moec.aot.errors import AotError
from moec.aot.source import Source
from moec.cli.app import main
from moec.options import CompileOptions
from tests.support import models

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "mixtral_small.json"


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def compile_(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    def run(*args: str) -> Result:
        with pytest.raises(SystemExit) as stop:
            main(["compile", *args, *([] if "-o" in args else ["-o", str(tmp_path / "out.moec")])])
        captured = capsys.readouterr()
        assert not list(tmp_path.glob("*out.moec*")), "something half-written stayed"
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run


Compile = Callable[..., Result]


def refused(result: Result, message: str) -> None:
    assert result.code == 2, result
    assert message in result.err, result.err
    assert result.err.count("error[") == 1 and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "there is no file or folder 'nowhere'"),
        ([str(CONFIG)], "is a configuration, without weights"),
        ([str(CONFIG), "--random-weights", "--weights", "inside-out"], "--weights cannot be 'inside-out'"),
        ([str(CONFIG), "--random-weights", "--weights", "beside"], "is for a folder of safetensors"),
        (
            [str(CONFIG), "--random-weights", "--target", "ascend:910b"],
            "no ahead-of-time code for target 'ascend:910b'",
        ),
        ([str(CONFIG), "--random-weights", "--target", "cpu:avx1024"], "unknown target"),
        ([str(CONFIG), "--random-weights", "--dtype", "f8"], "unknown dtype 'f8'"),
        ([str(CONFIG), "--random-weights", "--passes", "fuse-everything"], "unknown pass"),
        ([str(CONFIG), "--random-weights", "--dynamic", "batch:4"], "--dynamic cannot read 'batch:4'"),
        ([str(CONFIG), "--random-weights", "--dynamic", "batch=4..1,seq=8"], "the low end first"),
        ([str(CONFIG), "--random-weights", "--dynamic", "batch=4"], "names 1 sizes; tokens have two"),
        ([str(CONFIG), "--random-weights", "-o", "no/such/folder/out.moec"], "there is no folder no/such/folder"),
        (["tests.aot.factories:raises"], "raises RuntimeError: the disk with the weights is gone"),
        (["tests.aot.factories:dense"], "has no MoE block that moec finds"),
        (["tests.aot.factories:control_flow"], "cannot be exported by torch.export"),
        (["tests.aot.factories:dense", "--generate"], "--generate is for causal language models"),
    ],
)
def test_one_message_each(args: list[str], message: str, compile_: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    refused(compile_(*args), message)


def test_a_family_without_moe(compile_: Compile, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(compile_(str(tmp_path / "config.json"), "--random-weights"), "has no MoE block that moec finds")


def test_code_of_a_folder_is_not_run(compile_: Compile, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit('the code of the folder ran')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = compile_(str(tmp_path / "config.json"), "--random-weights")
    refused(found, "comes with code of its own, which is not run")
    assert "--trust-remote-code" in found.err


def test_pickled_weights_are_not_read(compile_: Compile, tmp_path: Path) -> None:
    model = models.build("mixtral", layers=1)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refused(compile_(str(tmp_path)), "holds its weights as pickles (pytorch_model.bin)")


def test_a_checkpoint_that_is_cut_off(compile_: Compile, tmp_path: Path) -> None:
    models.build("mixtral", layers=1).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    refused(compile_(str(tmp_path), "--weights", "beside"), "is cut off")
    file.write_bytes(b"\xff" * 64)
    refused(compile_(str(tmp_path), "--weights", "beside"), "is no safetensors file")


def test_weights_of_another_type_stay_not_beside(compile_: Compile, tmp_path: Path) -> None:
    models.build("mixtral", layers=1).save_pretrained(tmp_path)
    found = compile_(str(tmp_path), "--weights", "beside", "--dtype", "bf16")
    refused(found, "it is f32 on disk, and the model is compiled for bf16")


def test_an_exported_program_with_an_op_of_its_own(compile_: Compile, tmp_path: Path) -> None:
    with torch.library._scoped_library("moec_test_aot", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")

        class Doubles(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = torch.ops.moec_test_aot.double(x)
                return out

        path = tmp_path / "program.pt2"
        torch.export.save(torch.export.export(Doubles(), (torch.ones(2),), strict=False), path)
        found = compile_(str(path))
    refused(found, "calls moec_test_aot::double, which torch alone does not have")


def test_what_is_no_exported_program(compile_: Compile, tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    path.write_bytes(b"no program")
    refused(compile_(str(path)), "is no exported program")
    refused(compile_(str(path), "--dtype", "bf16"), "has its types already")


# --- writing


def writing(folder: Path, told: Callable[[str], None]) -> None:
    """Only the last stage of a compile, on code that is none."""
    from moec.aot.code import Code, Constant
    from moec.aot.write import EntryParts, Parts, write_artifact

    code = folder / "code.zip"
    with zipfile.ZipFile(code, "w") as z:
        z.writestr("code/library.so", b"no library")
        z.writestr("frame/version", b"0")
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    constants = (Constant("weight", "f32", (2, 2), (2, 1), 0, 64),)
    parts = EntryParts(program, Code(code, constants, "w.blob"), "before", "after")
    state = dict(program.state_dict)
    all_parts = Parts(Source("made up", None), CompileOptions(), "inside", {"model": parts}, state)
    write_artifact(folder / "out.moec", all_parts, told)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def told(stage: str) -> None:
        if stage == "weights":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(AotError, match="cannot be written: No space left on device"):
        writing(tmp_path, told)
    assert [p.name for p in tmp_path.iterdir()] == ["code.zip"]


def test_a_killed_compile_leaves_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "out.moec").write_bytes(b"the one before")
    child = os.fork()
    if child == 0:
        writing(tmp_path, lambda stage: os._exit(9) if stage == "weights" else None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "out.moec").read_bytes() == b"the one before"


def test_a_whole_one_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "out.moec").write_bytes(b"the one before")
    writing(tmp_path, lambda stage: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["code.zip", "out.moec"]
    assert zipfile.ZipFile(tmp_path / "out.moec").testzip() is None


# --- parts


def test_ranges() -> None:
    assert parse_dynamic("batch=1..64, seq=16") == {"batch": (1, 64), "seq": (16, 16)}
    assert parse_dynamic("") == {}
    for text in ("batch=0..4", "batch=1..4,batch=2", "1..4", "batch=1...4", "batch=-1"):
        with pytest.raises(AotError):
            parse_dynamic(text)
    assert [example_size(span, 12) for span in ((1, 64), (1, 4), (1, 1), (20, 30))] == [12, 4, 1, 20]


def test_shapes_follow_the_first_input() -> None:
    a, b = torch.zeros(2, 5), torch.zeros(2, 7)
    found: Any = shapes({"batch": (1, 8), "seq": (5, 5)}, [("a", a), ("b", b), ("flag", True)])
    assert set(found["a"]) == set(found["b"]) == {0} and found["flag"] is None
    assert isinstance(found["a"][0], type(Dim("batch")))
    with pytest.raises(AotError, match="the example input has 2 there"):
        shapes({"batch": (3, 8)}, [("a", a)])
    with pytest.raises(AotError, match="names 3 dimensions"):
        shapes({"x": (1, 8), "y": (1, 8), "z": (1, 8)}, [("a", a)])


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "__metadata__": {}},
        {"w": {"dtype": "F9", "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"shape": [4]}},
        {"w": []},
        [],
    ],
)
def test_headers_that_lie(header: object, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(AotError):
        read_headers([tmp_path / "a.safetensors"])


def test_an_exported_program_keeps_its_ranges(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    source = Source("program", None, program=program)
    with pytest.raises(AotError, match="has its dynamic sizes already"):
        build(source, tmp_path / "out.moec", AotOptions(dynamic={"batch": (1, 4)}))
