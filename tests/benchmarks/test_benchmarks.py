"""The benchmark scripts run, at sizes that say nothing about speed, and their numbers mean what their columns say."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moec.backends.cpu.isa import isa_of

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TOY = ("--quick", "--rotate", "0", "--seconds", "0.01", "--threads", "1")

needs_cpu = pytest.mark.skipif(isinstance(isa_of("cpu"), str), reason="no instruction set of the cpu backend")


def run(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-W", "ignore", str(FOLDER / script), *words]
    made = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    return made


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Imports a file of the folder as its scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@needs_cpu
@pytest.mark.slow
def test_layer(tmp_path: Path) -> None:
    file, picture = tmp_path / "layer.json", tmp_path / "layer.png"
    words = ["--shapes", "64:32:4:2", "--tokens", "1,300", "--peers", "transformers,vllm", "--json", str(file), *TOY]
    if importlib.util.find_spec("matplotlib"):
        words += ["--picture", str(picture)]
    made = run("moe_layer.py", *words, MOEC_BENCH_VLLM=str(tmp_path))
    assert "vllm is left out: nothing in" in made.stderr
    found = json.loads(file.read_text())
    machine, cells = found["machine"], found["cells"]
    assert [c["tokens"] for c in cells] == [1, 300]
    for cell in cells:
        assert set(cell["median"]) == {"cpu", "aten", "transformers"}
        assert all(0 <= e < 3e-2 for e in cell["errors"].values())
        assert cell["flops"] == cell["tokens"] * 2 * 3 * 2 * 64 * 32
        assert cell["bytes"] == cell["touched"] * 3 * 64 * 32 * 2
        best = max(machine["gemms"].values())
        assert cell["limit"] == max(cell["flops"] / best, cell["bytes"] / max(machine["reads"].values()))
    ratios = [c["median"]["transformers"] / c["median"]["cpu"] for c in cells]
    assert found["summary"]["peers"]["transformers"]["mean"] == pytest.approx((ratios[0] * ratios[1]) ** 0.5)
    assert found["summary"]["peers"]["transformers"]["large_mean"] == pytest.approx(ratios[1])
    assert found["summary"]["limit"]["small_worst"] == pytest.approx(cells[0]["median"]["cpu"] / cells[0]["limit"])
    assert picture.exists() == ("--picture" in words)


@needs_cpu
def test_skew(tmp_path: Path) -> None:
    file = tmp_path / "skew.json"
    run("moe_layer.py", "--shapes", "64:32:4:2", "--tokens", "64", "--skew", "compare", "--json", str(file), *TOY)
    (cell,) = json.loads(file.read_text())["cells"]
    assert cell["ratio"]["cpu"] == pytest.approx(cell["skewed"]["cpu"] / cell["even"]["cpu"])
    assert 1 / 4 < cell["busiest"] <= 1


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("moe_layer", "--peers vlm", "choose of transformers"),
        ("moe_layer", "--skew compare --picture a.png", "makes none"),
        ("model", "--variants onnx", "choose of inductor"),
        ("model", "--tokens 3", "at least 64"),
        ("warm_start", "--doors jit", "choose of inductor"),
    ],
)
def test_words_that_mean_nothing(module, monkeypatch, capsys, script: str, words: str, says: str) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sys, "argv", [script, *words.split()])
    with pytest.raises(SystemExit):
        module(script).arguments()
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"), [("olmo", "olmoe"), ("64:32:4", "H:I:E:k"), ("64:32:4:5", "5 of 4"), ("8:8:0:0", "unknown")]
)
def test_shapes_that_do_not_exist(module, text: str, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit, match=says):
        module("shapes").parse_shapes(text)
    with pytest.raises(SystemExit, match="counts from 1 up"):
        module("shapes").parse_tokens("1,0")


def test_wrong_results_are_noticed(module) -> None:  # type: ignore[no-untyped-def]
    timing, routing, ours, shapes = (module(n) for n in ("timing", "routing", "ours", "shapes"))
    shape = shapes.Shape("toy", 16, 8, 4, 2)
    (weights,) = ours.make_weights(shape, torch.float32, 1)
    ids = routing.draw_ids(shape, 5, 0.0)
    x, w = routing.draw_tokens(shape, 5, torch.float32)
    batch = routing.Batch(x, ids, ids.int(), w)
    (call,) = ours.moec_calls("aten", "cpu", "f32", shape, [weights])
    right = call(batch)
    assert timing.verdict(timing.error_of(right, batch, weights), torch.float32) is None
    for wrong in (right * 1.01, right.flip(1), torch.full_like(right, float("nan"))):
        assert timing.verdict(timing.error_of(wrong, batch, weights), torch.float32) is not None


def test_experts_rotate(module) -> None:  # type: ignore[no-untyped-def]
    """A call's experts were not read by the calls before, as long as others are left; the histogram stays."""
    routing = module("routing")
    deck = routing.Deck(copies=2, experts=8)
    ids = torch.tensor([[0, 5], [5, 0], [0, 7]])
    last: dict[tuple[int, int], int] = {}
    for turn in range(40):
        copy, dealt = deck.deal(ids)
        assert sorted(Counter(dealt.flatten().tolist()).values()) == [1, 2, 3]
        assert len({tuple(r.tolist()) for r in (dealt == dealt[0, 0]).nonzero()}) == 3
        for expert in dealt.unique().tolist():
            # 3 of 16 a call: at least four calls, which read 12, lie between two uses.
            assert turn - last.get((copy, expert), -9) >= 4
            last[copy, expert] = turn


def test_copies(module) -> None:  # type: ignore[no-untyped-def]
    copies_for = module("routing").copies_for
    assert copies_for(800, 1000, 1, 1e9) == 4  # half of the three others is 1200
    assert copies_for(2000, 1000, 1, 1e9) == 1
    assert copies_for(800, 1000, 4, 7000) == 2  # memory
    assert copies_for(800, 1000, 4, -5.0) == 1


def test_even_rows_cost_the_same(module) -> None:  # type: ignore[no-untyped-def]
    routing, shapes = module("routing"), module("shapes")
    ids = routing.draw_ids(shapes.Shape("toy", 16, 8, 32, 4), 100, 1.2)
    even = routing.even_ids(ids)
    assert even.shape == ids.shape
    assert torch.equal(even.unique(), ids.unique())
    counts = even.flatten().bincount(minlength=32)[ids.unique()]
    assert counts.max() - counts.min() <= 1
    assert ids.flatten().bincount().max() > 2 * counts.max()
    assert all(len(set(row.tolist())) == 4 for row in even)


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("--train",)], ids=["inference", "training"])
def test_model(mode: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    words = ["--size", "tiny", "--tokens", "64", "--context", "4", "--batches", "2", "--seconds", "0.01"]
    run("model.py", *words, "--variants", "cpu", "--inner", "eager", "--json", str(file), *mode)
    tasks = json.loads(file.read_text())["tasks"]
    assert [t["tokens"] for t in tasks] == ([64] if mode else [64, 2])
    for task in tasks:
        assert set(task["median"]) == {"eager", "cpu"}
        assert task["errors"]["cpu"] < (1e-3 if mode else 3e-2)
        assert task["tokens_per_second"]["cpu"] == pytest.approx(task["tokens"] / task["median"]["cpu"])


@needs_cpu
@pytest.mark.slow
def test_warm_start() -> None:
    words = ["--shapes", "64:32:4:2", "--repeats", "1", "--skip", "models"]
    found = json.loads(run("warm_start.py", *words).stdout.splitlines()[-1])
    assert found["kernels"]["warm"]["64:32:4:2"] < found["kernels"]["cold"]["64:32:4:2"]
    words = ["--step", "cpu", "--size", "tiny", "--tokens", "8", "--inner", "eager"]
    found = json.loads(run("warm_start.py", *words).stdout.splitlines()[-1])
    assert found["start"] == pytest.approx(found["first"] - found["second"])


def test_memory() -> None:
    found = json.loads(run("memory.py", "--door", "eager", "--small", "--tokens", "8").stdout.splitlines()[-1])
    assert set(found) == {"weights", "prefill", "decode"}


@pytest.mark.slow
def test_compile_time() -> None:
    made = run("compile_time.py", "--door", "moec", "--layers", "1", "--experts", "8")
    assert json.loads(made.stdout.splitlines()[-1])["error"] < 1e-3
