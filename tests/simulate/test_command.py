"""``moec simulate``: a table, files, JSON, and a message for everything that can be wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from moec.cli.app import main

CONFIG = str(Path(__file__).resolve().parents[2] / "examples" / "mixtral_small.json")
BLOCK = str(Path(__file__).resolve().parents[2] / "examples" / "block.moe")

LAYER = """
graph @layer(%x: f32[T, 4], %ids: i64[T, 2], %w: f32[T, 2], %w1: f32[<a>, 6, 4], %w2: f32[<a>, 4, 6]) -> f32[T, 4] {
  %a = comm.all_gather.start %w1 {group = "ep", ranks = 2, sizes = (<s>)} : !comm.token
  %up = comm.wait %a : f32[4, 6, 4]
  %b = comm.all_gather.start %w2 {group = "ep", ranks = 2, sizes = (<s>)} : !comm.token
  %down = comm.wait %b : f32[4, 4, 6]
  %y = moe.experts %x, %ids, %w, [%up], [%down] {experts = 4, layout = "single"} {
    @activation(%h: f32[R, 6]) -> f32[R, 6] {
      %s = torch.call @aten.relu.default(%h) : f32[R, 6]
      return %s
    }
  } : f32[T, 4]
  return %y
}
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


Moec = Callable[..., Result]


@pytest.fixture
def moec(capsys: pytest.CaptureFixture[str]) -> Moec:
    def run(*args: str) -> Result:
        with pytest.raises(SystemExit) as stop:
            main(("simulate", *args))
        captured = capsys.readouterr()
        code = stop.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def layer(path: Path, *shares: tuple[int, str]) -> str:
    graphs = [
        LAYER.replace("<a>", str(own)).replace("<s>", sizes).replace("@layer", f"@layer{i}")
        for i, (own, sizes) in enumerate(shares)
    ]
    (path / "layer.moe").write_text("\n".join(graphs))
    return str(path / "layer.moe")


def test_a_table_and_files(moec: Moec, tmp_path: Path) -> None:
    words = ["--plan", "ep=2", "--tokens", "64", "--skew", "zipf:1.2", "--trace", str(tmp_path / "t.json")]
    if importlib.util.find_spec("matplotlib"):
        words += ["--picture", str(tmp_path / "t.png")]
    got = moec(layer(tmp_path, (2, "2, 2")), *words)
    assert got.code == 0, got.err
    assert "8xh100, 2 ranks, 64 tokens each, zipf:1.2" in got.out
    assert "exposed" in got.out
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1}
    assert {e["cat"] for e in events if e["ph"] == "X"} == {"compute", "comm", "wait"}
    assert all(e["dur"] > 0 for e in events if e["ph"] == "X")
    if "--picture" in words:
        assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_config_in_json_and_training(moec: Moec) -> None:
    pytest.importorskip("transformers")
    once, both = (
        json.loads(moec(CONFIG, "--plan", "ep=4", "--tokens", "32", "--json", *more).out)
        for more in ([], ["--training"])
    )
    assert len(once["ranks"]) == 4
    assert "leave 8 ranks without one" in moec(CONFIG, "--plan", "ep=16").err
    assert both["seconds"] > once["seconds"] == pytest.approx(once["compute_s"] + once["exposed_s"])


def test_attention_of_a_config(moec: Moec) -> None:
    pytest.importorskip("transformers")
    words = [CONFIG, "--plan", "ep=4", "--tokens", "64", "--attention", "16", "--layers", "2", "--micro-batches", "2"]
    found = json.loads(moec(*words, "-p", "", "-p", "interleave-layers", "--json").out)
    assert found["interleave-layers"]["exposed_s"] < found[""]["exposed_s"]
    assert "not 2 micro-batches of prompts of 16" in moec(*words, "--tokens", "60").err
    assert "the backward of attention is not simulated" in moec(*words, "--training").err
    assert "IR text holds its own attention" in moec(BLOCK, "--attention", "16").err


def test_text_runs_with_passes_and_a_plan(moec: Moec, tmp_path: Path) -> None:
    file = layer(tmp_path, (2, "2, 2"))
    gathered = json.loads(moec(file, "--tokens", "8", "--json").out)
    spread = moec(file, "--tokens", "8", "-p", "expert-parallel", "--remarks", "--json")
    assert "applied: expert-parallel: 4 experts on 2 ranks" in spread.err
    planned = json.loads(moec(file, "--tokens", "8", "--plan", "ep=2", "--json").out)
    assert planned == json.loads(spread.out)
    both = moec(file, "--tokens", "8", "--plan", "ep=2", "-p", "dce,expert-parallel,dce", "--remarks", "--json")
    assert both.err.count("applied: expert-parallel") == 1
    assert json.loads(both.out) == planned
    share = 2 * (6 * 4 + 4 * 6) * 4
    assert [r["sent"] for r in gathered["ranks"]] == [share] * 2
    assert [r["sent"] for r in planned["ranks"]] == [8 * 2 + 2 * 8 * 4 * 4] * 2  # counts; half of 16 slots, both ways


def test_several_pipelines_are_compared(moec: Moec, tmp_path: Path) -> None:
    file = layer(tmp_path, (2, "2, 2"))
    words = [file, "--tokens", "64", "-p", "", "-p", "expert-parallel"]
    if importlib.util.find_spec("matplotlib"):
        words += ["--picture", str(tmp_path / "t.png")]
    got = moec(*words)
    assert got.code == 0, got.err
    assert "none" in got.out
    assert "expert-parallel" in got.out
    assert "1.00 x" in got.out
    found = json.loads(moec(*words, "--json").out)
    assert list(found) == ["", "expert-parallel"]
    assert "a trace is of one pipeline" in moec(*words, "--trace", str(tmp_path / "t.json")).err


def test_a_graph_for_every_rank(moec: Moec, tmp_path: Path) -> None:
    file = layer(tmp_path, (3, "3, 1"), (1, "3, 1"))
    found = json.loads(moec(file, "--tokens", "8", "--plan", "ep=2", "--json").out)
    assert [r["rows"] for r in found["ranks"]] == [24, 8]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((CONFIG, "--plan", "ep=4", "--topology", "8xh10"), "unknown topology '8xh10'; did you mean '8xh100'"),
        ((CONFIG, "--plan", "ep=4,tp=2"), "tp=2 is not simulated"),
        ((CONFIG, "--plan", "ep=4,form=flatt"), "form cannot be 'flatt'"),
        ((CONFIG,), "a config.json says nothing of ranks"),
        ((CONFIG, "--plan", "ep=4", "--skew", "zipfy"), "unknown skew 'zipfy'"),
        ((CONFIG, "--plan", "ep=4", "-p", "overlapp"), "unknown pass 'overlapp'"),
        ((CONFIG, "--plan", "ep=4", "--size", "s0"), "a size is NAME=NUMBER"),
        ((BLOCK,), "the graph has no communication"),
        (("none.moe",), "none.moe cannot be read"),
    ],
)
def test_what_can_be_wrong(
    moec: Moec, words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    got = moec(*words)
    assert got.code == 2, got.err
    assert says in got.err
    assert got.out == ""


def test_what_can_be_wrong_with_text(moec: Moec, tmp_path: Path) -> None:
    assert "the graph is for 2 ranks, the plan says ep=4" in moec(layer(tmp_path, (2, "2, 2")), "--plan", "ep=4").err
    nodes = moec(layer(tmp_path, (2, "2, 2")), "--plan", "ep=2,nodes=2")
    assert "the plan says 2 nodes, 2 ranks are on 1" in nodes.err
    unwritten = moec(layer(tmp_path, (2, "2, 2")), "--trace", str(tmp_path / "layer.moe" / "t.json"))
    assert "t.json cannot be written" in unwritten.err
    assert "ranks hold different numbers of experts" in moec(layer(tmp_path, (3, "3, 1")), "--plan", "ep=2").err
    three = layer(tmp_path, (2, "2, 2"), (2, "2, 2"), (2, "2, 2"))
    assert "3 graphs for 2 ranks" in moec(three, "--plan", "ep=2").err
    odd = Path(layer(tmp_path, (2, "2, 2")))
    odd.write_text(odd.read_text().replace("T, 4]", "2*S, 4]").replace("T, 2]", "2*S, 2]"))
    got = moec(str(odd), "--plan", "ep=2")
    assert got.code == 2
    assert "S is not given" in got.err
    assert "--size S=NUMBER" in got.err
    assert moec(str(odd), "--plan", "ep=2", "--size", "S=4").code == 0


def test_a_group_of_one_rank_needs_no_network(moec: Moec, tmp_path: Path) -> None:
    text = LAYER.replace("<a>", "4").replace("<s>", "4,").replace("ranks = 2", "ranks = 1")
    (tmp_path / "one.moe").write_text(text)
    got = moec(str(tmp_path / "one.moe"), "-p", "expert-parallel")
    assert got.code == 2
    assert "has no communication" in got.err


def test_choices_are_drawn_before_passes_touch_them(moec: Moec, tmp_path: Path) -> None:
    """Two micro-batches of one layer choose by the same shares, whatever stands between argument and layer."""
    text = LAYER.replace("<a>", "2").replace("<s>", "2, 2").replace("%w1:", "%ids2: i64[T, 2], %w1:")
    head, _, tail = text.partition("  return %y\n}")
    second = head[head.index("  %y = moe.experts") :].replace("%y", "%z", 1).replace("%ids,", "%ids2,")
    file = tmp_path / "two.moe"
    file.write_text(
        f"{head}{second}  return %y, %z\n}}{tail}".replace(") -> f32[T, 4] {", ") -> (f32[T, 4], f32[T, 4]) {", 1)
    )
    found = json.loads(moec(str(file), "--plan", "ep=2", "--tokens", "500", "--skew", "zipf:3", "--json").out)
    one = layer(tmp_path, (2, "2, 2"))
    single = json.loads(moec(one, "--plan", "ep=2", "--tokens", "500", "--skew", "zipf:3", "--json").out)
    assert found["imbalance"] == pytest.approx(single["imbalance"], rel=0.05)
    assert single["imbalance"] > 1.2
