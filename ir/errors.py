"""The root of every error moec raises. It lives in the lowest room so that all rooms can use it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache


class MoecError(Exception):
    """One problem, told once: what is wrong, where, and what to do next.

    Attributes:
        code: Stable identifier of the kind of error, for programs (``"unknown-pass"``).
        op: The IR operation or graph node concerned, as text, if there is one.
        source: The line of the user's model that the op came from, if known.
        hint: The next step, as an imperative sentence.
    """

    code = "error"

    def __init__(
        self, message: str, *, op: str | None = None, source: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.op = op
        self.source = source
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.op:
            lines.append(f"  op: {self.op}")
        if self.source:
            lines.append(f"  source: {self.source}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class IRError(MoecError):
    """A graph, op or type that breaks the rules of the IR."""

    code = "invalid-ir"


class VerifyError(IRError):
    """The verifier found an op that does not keep its contract.

    Attributes:
        excerpt: The op within a few lines of its graph, with a mark under it; "" where the op stands alone.
    """

    code = "verify"
    excerpt = ""

    def __str__(self) -> str:
        if not self.excerpt:
            return super().__str__()
        tail = [f"  {k}: {v}" for k, v in (("source", self.source), ("hint", self.hint)) if v]
        return "\n".join([self.message, self.excerpt, *tail])


_WINDOW = 160  # characters of a long line that a ParseError shows around its column


class ParseError(IRError):
    """Malformed IR text. ``line`` and ``column`` count from 1."""

    code = "parse"

    def __init__(self, message: str, *, line: int, column: int, text_line: str, filename: str = "<text>") -> None:
        super().__init__(message)
        self.line, self.column, self.text_line, self.filename = line, column, text_line, filename

    def __str__(self) -> str:
        shift = max(0, self.column - 1 - _WINDOW // 2) if len(self.text_line) > _WINDOW else 0
        line = self.text_line[shift : shift + _WINDOW]
        if not line.isprintable():
            line = "".join(c if c.isprintable() else " " if c == "\t" else "?" for c in line)
        caret = " " * (self.column - 1 - shift) + "^"
        return f"{self.filename}:{self.line}:{self.column}: {self.message}\n  {line}\n  {caret}"


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """``"did you mean 'x' or 'y'?"`` for a misspelt name, or the list of known names when nothing is near."""
    return _nearest(name, tuple(sorted(known)), limit)


@lru_cache(maxsize=256)
def _nearest(name: str, known: tuple[str, ...], limit: int) -> str:
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known) if known else "none is registered"
