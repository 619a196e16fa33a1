"""Generating from a checkpoint that stays as it lies: sharded, with experts one by one; tokens are transformers'."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch

import moec
from moec.aot.blob import write_blob
from moec.aot.code import Constant
from moec.cli.app import main
from tests.support import models

COUNT = 64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of one family stay beside the artifact, those of the others go into it."""
    beside = name == "mixtral"
    model = models.build(name, layers=2 if beside else 1)
    folder, path = tmp_path / "checkpoint", tmp_path / "model.moec"
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size="150KB")
    prompt = models.inputs(name, 1, 5)["input_ids"]
    want = model.generate(prompt, max_new_tokens=COUNT, do_sample=False, use_cache=True)
    options = ["--dynamic", f"batch=1,seq=1..{5 + COUNT}", *(["--weights", "beside"] if beside else [])]
    with pytest.raises(SystemExit) as stop:
        main(["compile", str(folder), "-o", str(path), "--generate", *options])
    assert not stop.value.code, capsys.readouterr().err
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["run", str(path), "--tokens", ",".join(map(str, prompt[0].tolist())), "--generate", str(COUNT)])
    assert [int(t) for t in capsys.readouterr().out.split(",")] == want[0].tolist()
    loaded = moec.load(path)
    assert torch.equal(loaded.generate(prompt, COUNT), want)
    if beside:
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 3
        _holds_no_weights(path, shards)
        _limits(loaded, prompt)
        _missing(path, shards)


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
