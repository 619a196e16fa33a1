"""``moec demo``: a real-sized MoE model compiled, explained, checked and timed on this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    small: Annotated[bool, typer.Option("--small", help="A narrow model: the whole run takes under a minute.")] = False,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the prefill (512; 256 with --small).")] = None,
) -> None:
    """Build a Qwen3-30B-A3B-shaped model, compile it, explain it, check its numbers and time it."""
    from moec.demo import run

    run(small=small, tokens=tokens)
