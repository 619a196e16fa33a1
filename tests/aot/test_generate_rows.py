"""Rows side by side: padding before shorter prompts, every row's own end, and what does not fit, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.aot.errors import AotError
from moec.aot.generation import export_pair
from moec.aot.source import Source, Tokens
from moec.artifact import manifest as m
from moec.artifact.errors import InputError
from moec.artifact.generate import continued, generate, side_by_side
from moec.artifact.load import LoadedArtifact, LoadedEntry
from moec.cli.app import main
from tests.aot.artifacts import forged

END, PAD, LENGTH = 20, 99, 24


class Counting:
    """Stands for code: the next token of a row is one more than its last, whatever came before."""

    def __init__(self, seen: list[dict[str, Tensor]], spec: m.Entry) -> None:
        self.seen, self.names = seen, [s.name for s in spec.inputs]

    def boxed_run(self, inputs: list[Tensor]) -> list[Tensor]:
        given = dict(zip(self.names, inputs, strict=True))
        self.seen.append({name: value.clone() for name, value in given.items()})
        given["caches_0"] += 1
        following = (given["input_ids"][:, -1:] + 1) % 100
        return [torch.nn.functional.one_hot(following, 100).float()]


def artifact(batch: tuple[int, int] = (1, 4)) -> tuple[LoadedArtifact, list[dict[str, Tensor]]]:
    """An artifact that counts, and the list of what its entries are called with."""
    rows: int | str = "batch" if batch[0] < batch[1] else batch[0]
    dims = {"batch": batch} if rows == "batch" else {}
    seen: list[dict[str, Tensor]] = []
    entries = {}
    for name, seq in (("prefill", "seq"), ("decode", 1)):
        inputs = [
            m.TensorSpec("input_ids", "i64", (rows, seq)),
            m.TensorSpec("position", "i64", ()),
            m.TensorSpec("caches_0", "f32", (rows, 2, LENGTH, 4)),
        ]
        if batch[1] > 1:
            inputs.append(m.TensorSpec("padding", "i64", (rows,)))
        spec = m.Entry(tuple(inputs), (), {**dims, **({"seq": (1, LENGTH)} if seq == "seq" else {})})
        weights: Any = None
        entries[name] = LoadedEntry(name, spec, Counting(seen, spec), weights)
    facts = {"cache": (LENGTH,), "end": (END, 50), "pad": (PAD,)}
    manifest = m.Manifest("", "", "cpu", "", "", {}, {}, (), m.Weights("inside"), {}, (), facts)
    return LoadedArtifact(manifest, entries), seen


def test_every_row_has_its_own_end() -> None:
    """The first ends at once, the second after four tokens, the third not at all."""
    loaded, seen = artifact()
    prompts = [[7, 19], [16], [1, 2, 3]]
    assert generate(loaded, prompts, 6).tolist() == [
        [PAD, 7, 19, 20, PAD, PAD, PAD, PAD, PAD],
        [PAD, PAD, 16, 17, 18, 19, 20, PAD, PAD],
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]
    assert continued(loaded, prompts, 6) == [[7, 19, 20], [16, 17, 18, 19, 20], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert len(continued(loaded, prompts[:2], 6)) == 2 and len(seen) == 6 + 6 + 4  # no call after the last end


def test_what_the_entries_are_given() -> None:
    loaded, seen = artifact()
    generate(loaded, [[5], [1, 2, 3]], 3)
    first, second, third = seen
    assert first["padding"].tolist() == third["padding"].tolist() == [2, 0]
    assert [int(call["position"]) for call in seen] == [0, 3, 4]
    assert second["input_ids"].tolist() == [[6], [4]]
    assert first["caches_0"].shape == (2, 2, LENGTH, 4) and float(third["caches_0"].max()) == 2.0


def test_a_mask_is_padding() -> None:
    loaded, seen = artifact()
    tokens, padding = side_by_side([[5], [1, 2, 3]])
    assert tokens.tolist() == [[0, 0, 5], [1, 2, 3]] and padding.tolist() == [2, 0]
    generate(loaded, tokens, 1, torch.tensor([[0, 0, 1], [1, 1, 1]]))
    generate(loaded, tokens, 1, torch.tensor([[False, True, True], [True, True, True]]))
    generate(loaded, tokens, 1)
    assert [call["padding"].tolist() for call in seen] == [[2, 0], [1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("batch", "prompts", "mask", "message"),
    [
        ((1, 4), [[1]] * 5, None, r"the batch is 5, and the artifact was compiled for batch=1\.\.4"),
        ((2, 4), [[1]], None, r"the batch is 1, and the artifact was compiled for batch=2\.\.4"),
        ((3, 3), [[1]] * 2, None, "the batch is 2, and the artifact was compiled for batch=3"),
        ((1, 4), [], None, "at least one token"),
        ((1, 4), [[1], []], None, "at least one token"),
        ((1, 4), [[1] * 20, [1]], None, "20 tokens and 5 more do not fit into the cache of 24"),
        ((1, 4), torch.ones(3, dtype=torch.int64), None, r"takes tokens \[batch, prompt\]"),
        ((1, 4), torch.ones(0, 3, dtype=torch.int64), None, r"takes tokens \[batch, prompt\]"),
        ((1, 4), torch.ones(1, 3, dtype=torch.int64), [[1, 1, 0]], "padding goes before a prompt"),
        ((1, 4), torch.ones(1, 3, dtype=torch.int64), [[1, 0, 1]], "padding goes before a prompt"),
        ((1, 4), torch.ones(1, 3, dtype=torch.int64), [[0, 0, 0]], "padding goes before a prompt"),
        ((1, 4), torch.ones(1, 3, dtype=torch.int64), [[1, 1]], r"the mask is \[1, 2\], and the tokens are \[1, 3\]"),
        ((1, 1), torch.ones(1, 3, dtype=torch.int64), [[0, 1, 1]], "takes a single prompt, without padding"),
    ],
)
def test_what_does_not_fit(batch: tuple[int, int], prompts: Any, mask: Any, message: str) -> None:
    loaded, seen = artifact(batch)
    with pytest.raises(InputError, match=message):
        generate(loaded, prompts, 5, None if mask is None else torch.tensor(mask))
    assert not seen


def test_the_next_step_names_a_range_that_fits() -> None:
    loaded, _ = artifact((2, 4))
    with pytest.raises(InputError) as told:
        generate(loaded, [[1]] * 6, 5)
    assert told.value.hint == f"compile again with --dynamic batch=2..6,seq=1..{LENGTH}"


class _NoPositions(torch.nn.Module):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, logits_to_keep: int = 0) -> Tensor:
        raise AssertionError("nothing is run")


def test_a_model_that_cannot_be_told_positions() -> None:
    source = Source("model", Tokens(_NoPositions()), (torch.ones(1, 2, dtype=torch.int64),))
    with pytest.raises(AotError, match="takes no position_ids, which prompts of different lengths need"):
        export_pair(source, {"batch": (1, 4), "seq": (1, 8)})


def test_sequences_of_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(forged(tmp_path / "a.moec"))
    for words, message in (
        (["--tokens", "1,2", "--tokens", "3"], "sequences of one call have the same length"),
        (["--tokens", "1,2", "--tokens", "3,x", "--generate", "4"], "write numbers"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["run", path, *words])
        assert stop.value.code == 2 and message in capsys.readouterr().err
