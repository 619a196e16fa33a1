"""``moec profile`` on a stub measurement, and the measurement itself on tiny layers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moec.calibration
from moec.backends.cpu.build import compiler
from moec.backends.cpu.isa import isa_of
from moec.calibration import layers, measure, probes
from moec.calibration import times as times_module
from moec.cli.app import main
from moec.cost import MachineProfile, load_profile
from moec.cost.store import from_json, profile_path, to_json
from tests.cost.machines import round_machine

RUNS = compiler() is not None and not isinstance(isa_of("cpu"), str)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("MOEC_CACHE_DIR", str(folder))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """The calls of the stub."""
    calls: list[tuple[int, list[str]]] = []

    def stub(threads: int, dtypes: list[str], progress: Callable[[str, float], None]) -> MachineProfile:
        calls.append((threads, dtypes))
        progress("nothing", 1.0)
        return round_machine(cores=2, interrupted=0.01)

    monkeypatch.setattr(moec.calibration, "calibrate", stub)
    return calls


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["profile", *args])
    return int(stop.value.code or 0)


def test_tables_and_where_it_is_stored(measured: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dtype", "bf16", "--threads", "1") == 0
    assert measured == [(1, ["bf16"])]
    shown = capsys.readouterr().out
    assert "2.0 GB/s" in shown
    assert "4 GFLOP/s" in shown
    assert "513" not in shown  # two threads' curve, as rates: 512 rows in 256.5 ns are 4 GFLOP/s
    (stored,) = (Path(line.removeprefix("stored in ")) for line in shown.splitlines() if line.startswith("stored in "))
    assert from_json(stored.read_text()).name == "round"


def test_json_and_out(measured: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    assert run("--json", "--out", str(out)) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads(out.read_text()) == json.loads(to_json(round_machine(interrupted=0.01)))
    assert load_profile() is None
    assert "warning" not in shown.err


def test_a_busy_machine_is_told_of(
    measured: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(moec.calibration, "calibrate", lambda *a: round_machine(interrupted=0.4))
    assert run() == 0
    assert "interrupted 40% of the calls" in capsys.readouterr().err


def test_a_profile_of_other_work_is_not_stored(
    measured: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(moec.calibration, "calibrate", lambda *a: round_machine(interrupted=0.6))
    assert run() == 2
    assert "60% of the calls, so nothing is stored" in capsys.readouterr().err
    assert not profile_path().exists()
    assert run("--out", str(tmp_path / "p.json")) == 0
    assert (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--dtype", "bf61"), "did you mean 'bf16'"),
        (("--threads", "100000"), "100000 threads on"),
        (("--threads", "0"), "greater than or equal to 1"),
    ],
)
def test_wrong_options_measure_nothing(
    measured: list[object], args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*args) == 2
    assert message in capsys.readouterr().err
    assert measured == []


def test_a_picture_without_matplotlib(
    measured: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("--picture", "p.png") == 2
    assert "moec[bench]" in capsys.readouterr().err
    assert measured == []


def test_a_picture(measured: list[object], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "p.png"
    assert run("--picture", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert run("--picture", str(tmp_path / "no" / "p.png")) == 2


@pytest.mark.slow
@pytest.mark.skipif(not RUNS, reason="needs g++ and an x86 processor with AVX2")
def test_measuring_with_the_real_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "beyond_caches", lambda least: 1 << 20)
    monkeypatch.setattr(measure, "beyond_caches", lambda least: 1 << 20)
    monkeypatch.setattr(measure, "_HIDDEN", 64)
    monkeypatch.setattr(measure, "_INNER", 64)
    monkeypatch.setattr(measure, "ROWS", (1, 8, 64))
    done: list[float] = []
    before = torch.get_num_threads()
    machine = measure.calibrate(1, ["f32"], lambda what, part: done.append(part))
    assert torch.get_num_threads() == before
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert [(c.dtype, c.threads, [r for r, _ in c.points]) for c in machine.curves] == [("f32", 1, [1, 8, 64])]
    assert machine.flops_per_s("f32", machine.isa, 1) > 1e9
    assert from_json(to_json(machine)).curves == machine.curves


def test_weights_are_larger_than_any_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"index0": "48K", "index2": "1024K", "index3": "384M", "index9": "odd"}
    found = [SimpleNamespace(read_text=lambda t=text: t + "\n") for text in files.values()]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: found)
    assert probes.beyond_caches(1 << 20) == 2 * 384 << 20
    assert probes.beyond_caches(1 << 40) == 2 << 30
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])
    assert probes.beyond_caches(1 << 20) == 1 << 20


def test_nothing_to_measure_on_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "isa_of", lambda target: "this processor (riscv64) has none of avx2")
    assert run() == 2


def test_experts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    class Recorder(layers.SyntheticLayer):
        def __init__(self) -> None:
            self.shape = layers.LayerShape(4, 4, 4, experts=6, top_k=1, dtype="f32")
            self._dtype = torch.float32
            self._order, self._at = torch.arange(6), 0

        def seconds(self, x: torch.Tensor, ids: torch.Tensor) -> float:
            seen.append(torch.bincount(ids.flatten(), minlength=6).tolist())
            return float(len(seen))

    monkeypatch.setattr(times_module, "waited", lambda: 0)
    before = torch.get_num_threads()
    times = Recorder().fixed_rows(3, 4, before, 2)
    assert seen == [[3, 3, 3, 3, 0, 0], [3, 3, 0, 0, 3, 3], [0, 0, 3, 3, 3, 3]]
    assert times.clean == [2.0, 3.0]
