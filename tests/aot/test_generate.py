"""Generating from a checkpoint that stays as it lies: sharded, with experts one by one; tokens are transformers'."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.aot.blob import write_blob
from moec.aot.code import Constant
from moec.cli.app import main
from tests.support import models

COUNT = 64
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [30, 40, 50]]
BATCHES = {"mixtral": "1", "qwen3_moe": "1..4", "deepseek_v3": "1..4", "gpt_oss": "3"}
"""A single prompt, as many as a caller likes, and always the same number."""
LAYERS = {"mixtral": 2, "qwen3_moe": 3}
"""Three share their code. Of the others there is one."""


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCHES)
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of one family stay beside the artifact, those of the others go into it."""
    beside = name == "mixtral"
    model = models.build(name, layers=LAYERS.get(name, 1))
    folder, path = tmp_path / "checkpoint", tmp_path / "model.moec"
    prompts = PROMPTS[:1] if beside else PROMPTS
    want, alone = _greedy(model, prompts)
    model.save_pretrained(folder, max_shard_size="150KB")
    options = ["--dynamic", f"batch={BATCHES[name]},seq=1..{5 + COUNT}", *(["--weights", "beside"] if beside else [])]
    with pytest.raises(SystemExit) as stop:
        main(["compile", str(folder), "-o", str(path), "--generate", *options])
    assert not stop.value.code, capsys.readouterr().err
    capsys.readouterr()
    words = [word for prompt in prompts for word in ("--tokens", ",".join(map(str, prompt)))]
    with pytest.raises(SystemExit):
        main(["run", str(path), *words, "--generate", str(COUNT)])
    assert [[int(t) for t in line.split(",")] for line in capsys.readouterr().out.splitlines()] == alone
    loaded = moec.load(path)
    assert torch.equal(loaded.generate(prompts, COUNT), want)
    if BATCHES[name] == "1..4":
        (one,) = loaded.generate(prompts[1:2], COUNT).tolist()
        assert one == alone[1]
    if beside:
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 3
        _holds_no_weights(path, shards)
        _limits(loaded, torch.tensor(prompts))
        _missing(path, shards)


def _greedy(model: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, list[list[int]]]:
    """What transformers generates of prompts side by side, and of each by itself, up to a token that one row meets.

    The token is what the last row adds as its ninth; that it ends a text stands in ``generation_config.json`` alone.
    """
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = model.generate(
            tokens, attention_mask=mask, max_new_tokens=COUNT, do_sample=False, use_cache=True, pad_token_id=0
        )
        assert isinstance(found, torch.Tensor)
        return found

    whole = torch.ones(1, len(prompts[-1]), dtype=torch.int64)
    if len(prompts) > 1:
        model.generation_config.eos_token_id = int(generate(torch.tensor(prompts[-1:]), whole)[0, len(prompts[-1]) + 8])
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    alone = [generate(torch.tensor([p]), torch.ones(1, len(p), dtype=torch.int64))[0].tolist() for p in prompts]
    assert len(prompts) == 1 or len({len(a) - len(p) for a, p in zip(alone, prompts, strict=True)}) > 1
    return generate(tokens, mask), alone


def _holds_no_weights(path: Path, shards: list[Path]) -> None:
    """The artifact refers to the shards by hash; every expert is an address in one of them."""
    from moec.artifact.archive import Archive

    with Archive(path) as archive:
        weights = archive.manifest.weights
    assert {f.path for f in weights.files.values() if f.path} == {os.path.join("checkpoint", s.name) for s in shards}
    assert sorted(len(t.addresses) for t in weights.tables.values()) == [8, 8, 16, 16]  # two layers of eight experts
    inside = sum(t.size for t in weights.tensors.values() if t.file == "inside")
    assert inside < 4096  # the rotary frequencies


def _limits(loaded: moec.artifact.load.LoadedArtifact, prompt: torch.Tensor) -> None:
    with pytest.raises(moec.MoecError, match="do not fit into the cache of 69"):
        loaded.generate(prompt, COUNT + 1)
    with pytest.raises(moec.MoecError, match="the batch is 2, and the artifact was compiled for batch=1"):
        loaded.generate([[5], [6]], 1)
    with pytest.raises(moec.MoecError, match="takes a single prompt, without padding"):
        loaded.generate(prompt, 1, torch.tensor([[0, 1, 1, 1, 1]]))
    with pytest.raises(moec.MoecError, match="compiled for generating: it has prefill, decode"):
        loaded(prompt)


def _missing(path: Path, shards: list[Path]) -> None:
    """A shard that is changed, of another size, or gone is named."""
    before = shards[1].read_bytes()
    shards[1].write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(moec.MoecError, match=f"{shards[1].name} were changed"):
        moec.load(path)
    shards[1].write_bytes(before + b"x")
    with pytest.raises(moec.MoecError, match=f"{shards[1].name} were changed"):
        moec.load(path)
    shards[1].unlink()
    with pytest.raises(moec.MoecError, match=f"{shards[1].name}, which is not there"):
        moec.load(path)
    shards[1].write_bytes(before)
    moec.load(path)


def test_the_index_of_shards_is_not_needed(tmp_path: Path) -> None:
    """Places come from the files' own headers: an index that says something else changes nothing."""
    from moec.cli.conversion import checkpoint_of

    model = models.build("qwen3_moe", layers=1)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "nowhere"}}))
    found = checkpoint_of(tmp_path, model, "")
    assert not found.missing
    up = found.places["model.layers.0.mlp.experts.gate_up_proj"]
    down = found.places["model.layers.0.mlp.experts.down_proj"]
    assert [len(up), len(down)] == [16, 8]
    stacked = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").detach()
    for at, place in ((3, up[3]), (3, up[11])):
        half = stacked[at].chunk(2)[0 if place is up[3] else 1]
        raw = place.file.read_bytes()[place.offset : place.offset + place.size]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32).view(place.shape), half)
    blob = io.BytesIO()  # and --weights inside copies them to where the stacked weight has them
    constant = Constant("up", "f32", tuple(stacked.shape), stacked.stride(), 0, stacked.nbytes)
    write_blob(blob, [constant], {}, {"up": up})
    assert blob.getvalue() == stacked.numpy().tobytes()
