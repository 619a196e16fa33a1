"""Programs: keys by content, the file that any process can read, and kernels loaded once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from moec.backends import registry
from moec.backends.aten import AtenBackend
from moec.backends.base import Artifact, Kernel
from moec.backends.reference import run_graph
from moec.ir.core import Graph
from moec.ir.types import TensorType, as_dim
from moec.runtime import programs
from moec.runtime.programs import ProgramError
from tests.backends.cases import ExpertsCase, route_graph

CASE = ExpertsCase(bias=True)


def _with_tokens(graph: Graph, tokens: int | str) -> Graph:
    """The same program as captured for another symbol, or for a fixed number of tokens."""
    for value in (*graph.args[:3], *graph.ops[0].results):
        assert isinstance(value.type, TensorType)
        value.type = value.type.with_(shape=(as_dim(tokens), *value.type.shape[1:]))
    return graph


def test_a_key_is_an_identifier() -> None:
    program = programs.register(CASE.graph(), "aten", label='quote " and \n newline')
    assert program.key.isidentifier()
    assert len(program.key) == 1 + programs.KEY_DIGITS
    assert programs.lookup(program.key) is program


def test_equal_content_has_an_equal_key() -> None:
    first = programs.register(CASE.graph(), "aten", label="a")
    assert programs.register(CASE.graph(), "aten", label="a") is first
    others = [
        programs.register(CASE.graph(), "reference", label="a"),
        programs.register(CASE.graph(), "aten", target="cpu:other", label="a"),
        programs.register(CASE.graph(), "aten", label="b"),
        programs.register(CASE.graph(), "aten", label="a", checks="off"),
        programs.register(ExpertsCase(bias=True, layout="interleaved").graph(), "aten", label="a"),
    ]
    assert len({p.key for p in (first, *others)}) == 6


@pytest.mark.parametrize("tokens", ["s27", "u0", 16])
def test_the_token_count_is_no_part_of_the_key(tokens: int | str) -> None:
    want = programs.register(CASE.graph(), "aten").key
    assert programs.register(_with_tokens(CASE.graph(), tokens), "aten").key == want


def test_names_of_values_are_no_part_of_the_key() -> None:
    graph = CASE.graph()
    want = programs.register(graph, "aten").key
    for i, value in enumerate((*graph.args, *graph.ops[0].regions[0].args)):
        value.name = f"linear_{i}"
    graph.ops[0].regions[0].name = "other"
    assert programs.register(graph, "aten").key == want


def test_registering_leaves_the_graph_alone() -> None:
    graph = _with_tokens(CASE.graph(), "s27")
    before = str(graph)
    assert programs.register(graph, "aten").graph is not graph
    assert str(graph) == before


def test_labels_share_a_kernel() -> None:
    a, b = (programs.register(CASE.graph(), "aten", label=label) for label in ("layers.0", "layers.1"))
    assert a.key != b.key
    assert a.kernel() is b.kernel()


def test_a_program_comes_back_from_its_file() -> None:
    for graph in (CASE.graph(), ExpertsCase(layout="rows", post=True, captures=True).graph(), route_graph(8, k=2)):
        program = programs.register(graph, "aten", label="layers.0")
        programs.clear()
        again = programs.lookup(program.key)
        assert again is not program
        assert (again.text, again.backend, again.label) == (program.text, "aten", "layers.0")
        assert str(again.graph) == str(program.graph)


def test_another_process_runs_it(tmp_path: Path) -> None:
    program = programs.register(CASE.graph(), "aten")
    inputs = CASE.inputs(5)
    torch.save(inputs, tmp_path / "in.pt")
    code = (
        "import sys, torch, moec.runtime.ops\n"
        "i = torch.load(sys.argv[1])\n"
        "torch.save(torch.ops.moec.experts(*i[:3], i[3:], sys.argv[2]), sys.argv[3])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in.pt"), program.key, str(tmp_path / "out.pt")]
    root = str(Path(programs.__file__).parents[2])
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": root})
    assert torch.equal(torch.load(tmp_path / "out.pt"), run_graph(CASE.graph(), inputs)[0])


def test_a_changed_file_is_refused() -> None:
    program = programs.register(CASE.graph(), "aten")
    path = programs.program_file(program.key)
    assert path is not None
    path.write_text(path.read_text().replace("experts = 5", "experts = 4"))
    programs.clear()
    with pytest.raises(ProgramError, match="was changed") as error:
        programs.lookup(program.key)
    assert error.value.hint


def test_an_unknown_key_is_told_with_a_hint() -> None:
    with pytest.raises(ProgramError, match="no file of it") as error:
        programs.lookup("m" + "0" * programs.KEY_DIGITS)
    assert "compile the model again" in str(error.value)


def test_without_a_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "cache_dir", lambda: None)
    program = programs.register(CASE.graph(), "aten")
    assert programs.lookup(program.key) is program
    programs.clear()
    with pytest.raises(ProgramError, match="no cache directory"):
        programs.lookup(program.key)


@pytest.mark.parametrize("bad", ["", "x", "m../../etc/passwd", "m/0", "../m0"])
def test_a_key_is_no_path(bad: str) -> None:
    with pytest.raises(ProgramError, match="no program key"):
        programs.lookup(bad)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(programs, "__version__", "0.0.1")
        program = programs.register(CASE.graph(), "aten")
    programs.clear()
    with pytest.raises(ProgramError, match=r"made by moec 0\.0\.1"):
        programs.lookup(program.key)


def test_kernels_are_loaded_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    class Slow(AtenBackend):
        name = "slow_to_load"

        def load(self, artifact: Artifact) -> Kernel:
            loads.append(artifact.target)
            time.sleep(0.05)
            return super().load(artifact)

    registry.all_backends()
    monkeypatch.setitem(registry._BACKENDS, "slow_to_load", Slow())
    program = programs.register(CASE.graph(), "slow_to_load")
    assert not loads, "nothing is loaded before it runs"
    found: list[Kernel] = []
    threads = [threading.Thread(target=lambda: found.append(program.kernel())) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(loads) == 1
    assert len({id(k) for k in found}) == 1
