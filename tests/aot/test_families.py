"""Artifacts of four families equal eager: with torch alone, through moec.load, from C++, and on lesser instructions."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import moec
from moec.artifact.archive import Archive
from tests.aot.artifacts import PACKAGE, TOLERANCE, compiled, cpp_example, expected, run_alone, run_cpp, torch_alone
from tests.aot.commands import check_commands
from tests.support.models import SHARED_EXPERTS

LAYERS = {"mixtral": 2, "qwen3_moe": 4, "deepseek_v3": 1, "gpt_oss": 1}
"""Four are enough to share their code."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("name", LAYERS)
def test_equal_to_eager_with_torch_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.moec"
    model, built = compiled(name, path, LAYERS[name])
    assert [b.fused for b in built.report.layers] == [True] * LAYERS[name]
    # A router, an experts' layer and maybe a shared expert, however many layers there are.
    assert built.kernels == 2 + (name in SHARED_EXPERTS)
    with zipfile.ZipFile(path) as archive:
        package = Path(archive.extract(PACKAGE, tmp_path))
    cases = expected(name, model)
    loaded, python, program = moec.load(path), torch_alone(tmp_path / "alone"), cpp_example()
    for (tokens, want), alone in zip(cases, run_alone(python, package, [t for t, _ in cases], tmp_path), strict=True):
        torch.testing.assert_close(alone, want, rtol=TOLERANCE, atol=TOLERANCE)
        got = loaded(tokens)
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, alone, rtol=0, atol=0)
        following, logits = run_cpp(program, package, tokens, tmp_path)
        torch.testing.assert_close(logits.view(want.shape), alone, rtol=0, atol=0)
        assert following == want[:, -1].argmax(-1).tolist()
    if name == "mixtral":
        _lesser_instructions(python, package, cases, tmp_path)
        _ranges(loaded)
        check_commands(path, model, tmp_path, capsys)
        _changed_weights(path, tmp_path)


def _lesser_instructions(
    python: Path, package: Path, cases: list[tuple[torch.Tensor, torch.Tensor]], folder: Path
) -> None:
    """The kernels of the lowest level run where a process asks for them, and below it the message is clear."""
    tokens, want = cases[1]
    (got,) = run_alone(python, package, [tokens], folder, MOEC_ISA="avx2")
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(AssertionError, match=r"no more than 'none'.*needs 'avx2'"):
        run_alone(python, package, [tokens], folder, MOEC_ISA="none")


def _ranges(loaded: moec.artifact.load.LoadedArtifact) -> None:
    with pytest.raises(moec.MoecError, match="seq is 65, and the artifact was compiled for 1 to 64"):
        loaded(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(moec.MoecError, match="must be of type i64, not i32"):
        loaded(torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(moec.MoecError, match="has no input 'ids'"):
        loaded(ids=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(moec.MoecError, match="not compiled for generating"):
        loaded.generate(torch.zeros(1, 3, dtype=torch.int64), 4)


def _changed_weights(path: Path, folder: Path) -> None:
    """A weight's byte is changed in the file: opening is still fine, loading names the member."""
    with Archive(path) as archive:
        place = archive.offset(PACKAGE) + archive.manifest.members[PACKAGE].size // 2
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    edited = folder / "edited.moec"
    edited.write_bytes(data)
    with Archive(edited) as archive:
        assert archive.manifest.target == "cpu"
    with pytest.raises(moec.MoecError, match=f"{PACKAGE} (was changed|cannot be read)"):
        moec.load(edited)
