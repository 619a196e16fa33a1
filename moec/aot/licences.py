"""Under what terms the parts of an artifact may be used: what is not known is called unknown."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from moec.aot.source import Source
from moec.artifact.manifest import Licence

_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
_TAG = re.compile(r"^license:\s*[\"']?([\w.+-]+)[\"']?\s*$", re.MULTILINE)
_MOST_BYTES = 1 << 20


INDUCTOR = Licence("AOTInductor's code", "BSD-3-Clause")
KERNELS = Licence("moec's kernels", "Apache-2.0")


def licences_of(
    source: Source, add: Callable[[str, bytes], None], code: tuple[Licence, ...] = (INDUCTOR,)
) -> tuple[Licence, ...]:
    """The licences of generated code and weights.

    Args:
        source: The model.
        add: Puts the model's own licence text into the archive.
        code: Of what code there is besides moec's kernels.
    """
    code = (KERNELS, *code)
    if source.made_up:
        return (*code, Licence("weights", "none: random numbers"))
    if source.folder is None:
        return (*code, Licence("weights", "unknown"))
    member = ""
    for name in _FILES:
        path = source.folder / name
        if path.is_file() and path.stat().st_size <= _MOST_BYTES:
            member = f"licences/{name}"
            add(member, path.read_bytes())
            break
    return (*code, Licence("weights", _tag(source.folder) or ("see the text" if member else "unknown"), member))


def _tag(folder: Path) -> str:
    """The licence that the model card's front matter names."""
    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > _MOST_BYTES:
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return ""
    found = _TAG.search(text[3:].partition("\n---")[0])
    return found[1] if found else ""
