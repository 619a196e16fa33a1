"""Reading and writing pipeline texts: ``fuse-routing,overlap{chunks=4, mode="x"}``.

Grammar::

    pipeline := [ item ("," item)* ]
    item     := name [ "{" [ option ("," option)* ] "}" ]
    option   := field "=" value
    value    := number | true | false | none | "text" | word | "[" [ value ("," value)* ] "]"

A value is read by the type of the dataclass field it is for, so a misspelt or wrongly typed option is an error with
its position, never a silent string.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from moec.ir.errors import MoecError, nearest
from moec.passes.base import Pass
from moec.passes.pipelines import PIPELINES
from moec.passes.registry import all_passes

_TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[A-Za-z0-9_.+][A-Za-z0-9_.+-]*|-[A-Za-z0-9.][A-Za-z0-9_.+-]*)"""
    r"""|(?P<punct>[{}\[\](),=])""",
    re.DOTALL,
)


class PipelineError(MoecError):
    """A pipeline text that cannot be read.

    Attributes:
        text: The whole text.
        position: Where it is wrong, a 0-based offset into ``text``.
    """

    code = "pipeline"

    def __init__(self, message: str, *, text: str, position: int, code: str = "pipeline") -> None:
        super().__init__(message)
        self.text, self.position, self.code = text, position, code

    def __str__(self) -> str:
        start = self.text.rfind("\n", 0, self.position) + 1
        line = self.text[start:].split("\n", 1)[0]
        return f"column {self.position + 1}: {self.message}\n  {line}\n  {' ' * (self.position - start)}^"


@dataclasses.dataclass(frozen=True)
class _Token:
    kind: str  # "string" | "word" | "punct" | "end"
    text: str
    position: int


def _tokens(text: str) -> list[_Token]:
    out: list[_Token] = []
    i = 0
    while i < len(text):
        if text[i].isspace():
            i += 1
            continue
        m = _TOKEN.match(text, i)
        if m is None:
            what = "a text without a closing quote" if text[i] == '"' else f"a stray {text[i]!r}"
            raise PipelineError(f"{what} in the pipeline", text=text, position=i)
        out.append(_Token(m.lastgroup or "", m.group(), i))
        i = m.end()
    out.append(_Token("end", "", len(text)))
    return out


class _Reader:
    """One pass over the tokens of one text. ``outer`` are the named pipelines being expanded, to stop cycles."""

    def __init__(self, text: str, outer: tuple[str, ...]) -> None:
        self.text, self.outer = text, outer
        self.tokens = _tokens(text)
        self.at = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def fail(self, message: str, token: _Token | None = None, code: str = "pipeline") -> NoReturn:
        raise PipelineError(message, text=self.text, position=(token or self.token).position, code=code)

    def take(self, punct: str) -> bool:
        if self.token.kind == "punct" and self.token.text == punct:
            self.at += 1
            return True
        return False

    def expect(self, punct: str, after: str) -> None:
        if not self.take(punct):
            self.fail(f"expected {punct!r} after {after}, found {self.token.text or 'the end'!r}")

    def word(self, what: str) -> _Token:
        token = self.token
        if token.kind != "word":
            self.fail(f"expected {what}, found {token.text or 'the end'!r}")
        self.at += 1
        return token

    def pipeline(self) -> list[Pass]:
        out: list[Pass] = []
        if self.token.kind == "end":
            return out
        while True:
            out += self.item()
            if self.token.kind == "end":
                return out
            self.expect(",", "a pass")

    def item(self) -> list[Pass]:
        name = self.word("the name of a pass")
        passes = all_passes()
        if name.text not in passes and name.text not in PIPELINES:
            near = nearest(name.text, [*passes, *PIPELINES])
            inside = f" in pipeline {self.outer[-1]!r}" if self.outer else ""
            self.fail(f"unknown pass {name.text!r}{inside}; {near}", name, "unknown-pass")
        if name.text in PIPELINES:
            if self.token.text == "{":
                self.fail(f"{name.text!r} is a pipeline and takes no options")
            if name.text in self.outer:
                self.fail(f"pipeline {name.text!r} contains itself: {' -> '.join((*self.outer, name.text))}", name)
            return _Reader(PIPELINES[name.text], (*self.outer, name.text)).pipeline()
        cls = passes[name.text]
        return [self.options(cls) if self.take("{") else self.build(cls, name, {})]

    def options(self, cls: type[Pass]) -> Pass:
        opening = self.tokens[self.at - 1]
        fields = {f.name for f in dataclasses.fields(cls)}
        hints = get_type_hints(cls)
        given: dict[str, Any] = {}
        while not self.take("}"):
            if given:
                self.expect(",", "an option")
            key = self.word("the name of an option")
            if key.text not in fields:
                near = nearest(key.text, fields) if fields else "it takes no options"
                self.fail(f"pass {cls.name!r} has no option {key.text!r}; {near}", key, "pass-option")
            if key.text in given:
                self.fail(f"option {key.text!r} is given twice", key, "pass-option")
            self.expect("=", f"the option {key.text!r}")
            given[key.text] = self.value(hints[key.text], f"option {key.text!r} of pass {cls.name!r}")
        return self.build(cls, opening, given)

    def build(self, cls: type[Pass], where: _Token, given: dict[str, Any]) -> Pass:
        for f in dataclasses.fields(cls):
            if f.name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                self.fail(f"pass {cls.name!r} needs its option {f.name!r}", where, "pass-option")
        try:
            return cls(**given)
        except ValueError as error:  # a pass may check its options in __post_init__
            self.fail(f"pass {cls.name!r}: {error}", where, "pass-option")

    def value(self, hint: Any, what: str) -> Any:
        token = self.token
        origin = get_origin(hint)
        if origin in (Union, types.UnionType):
            rest = [a for a in get_args(hint) if a is not type(None)]
            if token.kind == "word" and token.text == "none" and len(rest) < len(get_args(hint)):
                self.at += 1
                return None
            if len(rest) == 1:
                return self.value(rest[0], what)
            self.fail(f"{what} has the type {hint}, which cannot be written in a pipeline", token, "pass-option")
        if origin is tuple:
            return self.sequence(get_args(hint), what)
        if token.kind not in ("word", "string"):
            self.fail(f"{what} needs {_describe(hint)}, found {token.text or 'the end'!r}", token, "pass-option")
        value = _scalar(token, hint)
        if value is _WRONG:
            near = ""
            if origin is Literal:
                near = "; " + nearest(_unquote(token), [str(a) for a in get_args(hint)])
            self.fail(f"{what} needs {_describe(hint)}, found {token.text}{near}", token, "pass-option")
        self.at += 1
        return value

    def sequence(self, args: tuple[Any, ...], what: str) -> tuple[Any, ...]:
        opening = self.token
        if not (self.take("[") or self.take("(")):
            found = opening.text or "the end"
            self.fail(f"{what} needs a list such as [1, 2], found {found!r}", opening, "pass-option")
        closing = "]" if opening.text == "[" else ")"
        endless = len(args) == 2 and args[1] is Ellipsis
        out: list[Any] = []
        while not self.take(closing):
            if out:
                self.expect(",", "an element")
                if self.take(closing):
                    break
            if not endless and len(out) == len(args):
                self.fail(f"{what} takes {len(args)} elements", code="pass-option")
            out.append(self.value(args[0] if endless else args[len(out)], what))
        if not endless and len(out) != len(args):
            self.fail(f"{what} takes {len(args)} elements, found {len(out)}", opening, "pass-option")
        return tuple(out)


_WRONG = object()


def _unquote(token: _Token) -> str:
    if token.kind != "string":
        return token.text
    try:
        return str(json.loads(token.text, strict=False))
    except ValueError:
        return token.text[1:-1]


def _scalar(token: _Token, hint: Any) -> Any:
    """The token's value as ``hint`` wants it, or ``_WRONG``."""
    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            if _scalar(token, type(choice)) == choice:
                return choice
        return _WRONG
    if hint is str:
        return _unquote(token)
    if token.kind == "string":
        return _WRONG
    if hint is bool:
        return {"true": True, "false": False}.get(token.text, _WRONG)
    try:
        if hint is int:
            return int(token.text, 10)
        if hint is float:
            return float(token.text)
    except ValueError:
        return _WRONG
    return _WRONG


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return words.get(hint, str(hint))


def parse_pipeline(text: str) -> list[Pass]:
    """The passes that ``text`` names, in order; named pipelines are spelt out. An empty text is an empty pipeline.

    Raises:
        PipelineError: Unknown pass or option, wrong type, or malformed text, with its position and the nearest names.
    """
    return _Reader(text, ()).pipeline()


def _format_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_format_value, value)) + "]"
    return repr(value)


def format_option_default(f: dataclasses.Field[Any]) -> str | None:
    """The default of an option as it would be written in a pipeline, or None if the option must be given."""
    if f.default is not dataclasses.MISSING:
        return _format_value(f.default)
    if f.default_factory is not dataclasses.MISSING:
        return _format_value(f.default_factory())
    return None


def format_pipeline(passes: Sequence[Pass]) -> str:
    """The text that :func:`parse_pipeline` reads as ``passes``; options at their default are left out."""
    items: list[str] = []
    for p in passes:
        shown = [
            f"{f.name}={_format_value(getattr(p, f.name))}"
            for f in dataclasses.fields(p)
            if _format_value(getattr(p, f.name)) != format_option_default(f)
        ]
        items.append(p.name + ("{" + ", ".join(shown) + "}" if shown else ""))
    return ",".join(items)
