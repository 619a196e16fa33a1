"""Tokens of the text form, matched one at a time by a single regular expression.

The lexer is driven by the parser: dimension expressions have a grammar of their own (there ``//`` divides, elsewhere
it starts a comment), so the parser hands the text over at ``[`` and takes it back at ``]``.
"""

from __future__ import annotations

import re
from typing import NoReturn

from moec.ir.errors import ParseError

MAX_NESTING = 48  # of nested graphs, and of nested attribute values
CLIP = 40  # longest piece of the user's text that an error message repeats

_TOKEN = re.compile(
    r"""(?:[ \t\r\n]++|//[^\n]*+)*+(?:
    (?P<value>%[A-Za-z0-9_]++)
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*+(?:\.[A-Za-z_][A-Za-z0-9_]*+)*+)
    |(?P<number>\d++(?:\.\d*+)?+(?:[eE][+-]?\d++)?)
    |(?P<string>"(?:[^"\\\n]|\\[^\n])*+")
    |(?P<at>@[A-Za-z_][A-Za-z0-9_]*+(?:\.[A-Za-z0-9_]++)*+)
    |(?P<punct>->|[-(){}\[\]<>,:=@!#$])
    )?""",
    re.VERBOSE | re.ASCII,
)
_ESCAPE = re.compile(r"\\(?:([nrt0\\\"])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_SIMPLE = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "\\": "\\", '"': '"'}


def clip(text: str) -> str:
    """``repr`` of user text, shortened for an error message."""
    return repr(text if len(text) <= CLIP else text[: CLIP - 3] + "...")


def quote(text: str) -> str:
    """A string literal of the text form. Unprintable characters and lone surrogates are escaped."""
    out = []
    for c in text:
        if c in '\\"':
            out.append("\\" + c)
        elif c.isprintable():
            out.append(c)
        elif c in "\n\r\t":
            out.append({"\n": "\\n", "\r": "\\r", "\t": "\\t"}[c])
        else:
            code = ord(c)
            out.append(f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")
    return '"' + "".join(out) + '"'


class Lexer:
    """The current token: ``kind`` (value, name, number, string, at, punct, or "" for end and rubbish) and ``text``."""

    def __init__(self, source: str, filename: str = "<text>") -> None:
        self.source = source
        self.filename = filename
        self.end = 0
        self.last_end = 0
        self.advance()

    def advance(self) -> None:
        """Step to the next token."""
        self.last_end = self.end
        m = _TOKEN.match(self.source, self.end)
        assert m is not None  # every part of the pattern is optional
        kind = m.lastgroup
        if kind is not None:
            self.kind, self.text, self.start, self.end = kind, m[kind], m.start(kind), m.end()
        else:
            self.kind, self.text, self.start = "", "", m.end()
            self.end = self.start
            if self.start < len(self.source):
                self._rubbish()

    def seek(self, pos: int) -> None:
        """Continue behind ``pos``, where another grammar stopped."""
        self.end = pos
        self.advance()

    def _rubbish(self) -> NoReturn:
        c = self.source[self.start]
        if c == '"':
            self.fail("unterminated string")
        if c == "%":
            self.fail("expected a value's name after '%'")
        self.fail(f"unexpected character {c!r}")

    def error(self, message: str, pos: int | None = None) -> ParseError:
        """The error of that message at ``pos``, or at the current token."""
        at = self.start if pos is None else pos
        begin = self.source.rfind("\n", 0, at) + 1
        stop = self.source.find("\n", at)
        return ParseError(
            message,
            line=self.source.count("\n", 0, at) + 1,
            column=at - begin + 1,
            text_line=self.source[begin : len(self.source) if stop < 0 else stop].rstrip("\r"),
            filename=self.filename,
        )

    def fail(self, message: str, pos: int | None = None) -> NoReturn:
        """Raise :meth:`error`."""
        raise self.error(message, pos)

    def found(self) -> str:
        """The current token, for ``expected ..., found ...``."""
        return clip(self.text) if self.kind else "the end of the text"

    def is_punct(self, text: str) -> bool:
        return self.kind == "punct" and self.text == text

    def accept(self, text: str) -> bool:
        """Step over the punctuation ``text`` if it is next."""
        if self.kind == "punct" and self.text == text:
            self.advance()
            return True
        return False

    def expect(self, text: str, where: str = "") -> None:
        """Step over the punctuation ``text``.

        Raises:
            ParseError: Something else is next.
        """
        if self.kind != "punct" or self.text != text:
            self.fail(f"expected {text!r}{' ' + where if where else ''}, found {self.found()}")
        self.advance()

    def string(self) -> str:
        """The current string token's value; steps over it."""
        raw, at = self.text, self.start
        self.advance()
        if "\\" not in raw:
            return raw[1:-1]

        def replace(m: re.Match[str]) -> str:
            simple, x, u, long, wrong = m.groups()
            if simple:
                return _SIMPLE[simple]
            if wrong is not None:
                self.fail(f"unknown escape {clip(m[0])} in a string", at + 1 + m.start())
            code = int(x or u or long, 16)
            if code > 0x10FFFF:
                self.fail("escape beyond the last Unicode character", at + 1 + m.start())
            return chr(code)

        return _ESCAPE.sub(replace, raw[1:-1])
