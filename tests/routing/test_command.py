"""``moec profile --routing``: tokens in, table and file out, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moec.cli import main
from moec.cli.routing import TokensError, read_tokens
from moec.routing.store import load_routing
from tests.compile.blocks import EXPERTS, HIDDEN
from tests.routing.test_profile import Sequences


def factory() -> Any:
    """A model and its input, as ``moec`` asks for them."""
    return Sequences(), (torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(0)),)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["profile", "--routing", *words])
    return int(stop.value.code or 0)


def test_a_factory_is_recorded_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "routing.json"
    assert run("tests.routing.test_command:factory", "--out", str(file), "--ranks", "2") == 0
    shown = capsys.readouterr().out
    assert "24 tokens in 2 sequences" in shown
    assert "layers.layers.1" in shown
    profile = load_routing(file)
    assert [layer.experts for layer in profile.layers] == [EXPERTS, EXPERTS]
    assert [c.ranks for c in profile.layers[0].clusters] == [0, 2]


def test_tokens_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("1 2,3\n\n4, 5 6\n")
    assert read_tokens(file).tolist() == [[1, 2, 3], [4, 5, 6]]
    for text, says in (("1 2\n3\n", "sequences of 2 lengths"), ("1 x", "token numbers"), ("", "of 0 lengths")):
        file.write_text(text)
        with pytest.raises(TokensError, match=says):
            read_tokens(file)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("examples/mixtral_small.json", "--random-weights"), "made-up tokens"),
        (("tests.routing.test_command:factory", "--ranks", "2,x"), "'x' is no number of ranks"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert says in capsys.readouterr().err
