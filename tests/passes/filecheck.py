"""The filecheck harness: runs the pipeline that a ``.moe`` file names over its graphs, and checks text and remarks.

A file ``<pass>.moe`` (or ``<pass>.<topic>.moe``) reads::

    // RUN: -p functionalize,<pass>
    // CASE: positive what happens
    // CHECK: text of a line         the next line, at or after the last match, that holds this text
    // CHECK-NEXT: text              the line right after the last match holds this text
    // CHECK-NOT: text               no line between the matches around it holds this text
    // REMARK: text                  some remark ("missed: <pass>: why") holds this text
    // REMARK-NOT: text              no remark does
    // NUMERIC: T=5|T=1              sizes for the numeric check ("off" and a reason to leave it out; "whole" before
                                     the sizes makes floats whole numbers)
    graph @x(...) {...}
    // -----
    // CASE: negative what stays as it is
    ...

Inside a text, ``{{regex}}`` matches a regular expression, ``[[NAME:regex]]`` binds what it matches, and ``[[NAME]]``
stands for what was bound. Runs of spaces are one space. In a negative case the pass must leave the graph as it was, to
the letter, and say so; in a positive one it must change it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moec.ir.core import Graph
from moec.ir.parser import parse_graph
from moec.passes import Pass, PassContext, PassManager, PassResult, parse_pipeline
from moec.passes.instruments import Instrument

FOLDER = Path(__file__).parent / "filecheck"
_DIRECTIVE = re.compile(r"\s*//\s*(RUN|CASE|CHECK|CHECK-NEXT|CHECK-NOT|REMARK|REMARK-NOT|NUMERIC):\s*(.*?)\s*$")
_SPLIT = re.compile(r"^// -----\s*$", re.MULTILINE)
_HOLE = re.compile(r"\{\{(.+?)\}\}|\[\[([A-Za-z_]\w*):(.+?)\]\]|\[\[([A-Za-z_]\w*)\]\]")
KINDS = ("positive", "negative")


class CheckFailure(AssertionError):
    """A directive that does not hold, with the output it was held against."""


@dataclass
class Case:
    """One graph of a file with its directives."""

    file: Path
    line: int
    pipeline: str
    text: str
    kind: str = ""
    title: str = ""
    checks: list[tuple[str, str, int]] = field(default_factory=list)
    numeric: str = ""

    @property
    def subject(self) -> str:
        """Name of the pass that the file is about."""
        return self.file.stem.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file.stem}:{self.line}:{self.kind}:{self.title}".replace(" ", "-")


def read_cases(path: Path) -> list[Case]:
    """All cases of a file.

    Raises:
        CheckFailure: A case without kind, title, graph or check, or a file without RUN.
    """
    cases: list[Case] = []
    pipeline, start = "", 1
    for part in _SPLIT.split(path.read_text(encoding="utf-8")):
        case = Case(path, start, pipeline, part)
        for i, line in enumerate(part.split("\n")):
            m = _DIRECTIVE.match(line)
            if m is None:
                continue
            key, value = m.groups()
            if key == "RUN":
                pipeline = case.pipeline = re.sub(r"^-p\s+", "", value).strip("'")
            elif key == "CASE":
                case.kind, _, case.title = value.partition(" ")
            elif key == "NUMERIC":
                case.numeric = value
            else:
                case.checks.append((key, value, start + i))
        start += part.count("\n")
        where = f"{path.name}:{case.line}"
        if case.kind not in KINDS or not case.title:
            raise CheckFailure(f"{where}: a case needs '// CASE: positive|negative <title>'")
        if not case.pipeline:
            raise CheckFailure(f"{where}: no '// RUN: -p <pipeline>' above it")
        if not case.checks:
            raise CheckFailure(f"{where}: the case checks nothing")
        cases.append(case)
    return cases


def all_files() -> list[Path]:
    """Every filecheck file, sorted."""
    return sorted(FOLDER.glob("*.moe"))


@dataclass
class _Watch(Instrument):
    """What the subject pass said it did, and what it did."""

    subject: str
    before: str = ""
    said: bool = False
    did: bool = False
    seen: bool = False

    def before_pass(self, graph: Graph, pass_: Pass) -> None:
        self.before = str(graph)

    def after_pass(self, graph: Graph, pass_: Pass, result: PassResult, seconds: float) -> None:
        changed = str(graph) != self.before
        if changed and not result.modified:
            raise CheckFailure(f"pass {pass_.name!r} changed the graph and says modified=False")
        if pass_.name == self.subject:
            self.seen = True
            self.said |= result.modified
            self.did |= changed


def run_case(case: Case) -> str:
    """Run one case and hold it against its directives; the text after the pipeline comes back.

    Raises:
        CheckFailure: The first directive that does not hold.
    """
    graph = parse_graph(case.text, f"{case.file.name}:{case.line}")
    passes: Sequence[Pass] = parse_pipeline(case.pipeline)
    watch = _Watch(case.subject)
    ctx = PassContext()
    PassManager(passes, instruments=[watch], repro=None).run(graph, ctx)
    out = str(graph)
    where = f"{case.file.name}:{case.line}: {case.title}"
    if not watch.seen:
        raise CheckFailure(f"{where}: the pipeline {case.pipeline!r} does not run {case.subject!r}")
    expected = case.kind == "positive"
    if watch.did != expected or watch.said != expected:
        raise CheckFailure(
            f"{where}: a {case.kind} case, but the pass {'changed' if watch.did else 'left'} the graph "
            f"and says modified={watch.said}\n{out}"
        )
    check_text(case, out)
    check_remarks(case, [str(r) for r in ctx.remarks])
    return out


def check_text(case: Case, out: str) -> None:
    """Hold ``out`` against the CHECK lines."""
    lines = [" ".join(line.split()) for line in out.split("\n")]
    at = -1
    bound: dict[str, str] = {}
    banned: list[tuple[str, int]] = []

    def fail(line: int, message: str) -> CheckFailure:
        return CheckFailure(f"{case.file.name}:{line}: {message}\nthe output was\n{out}")

    def check_banned(start: int, stop: int) -> None:
        for pattern, line in banned:
            for i in range(start, stop):
                if _search(pattern, lines[i], dict(bound)):
                    raise fail(line, f"CHECK-NOT {pattern!r} is there: {lines[i]}")
        banned.clear()

    for key, pattern, line in case.checks:
        if key == "CHECK-NOT":
            banned.append((pattern, line))
        elif key == "CHECK-NEXT":
            if at + 1 >= len(lines) or not _search(pattern, lines[at + 1], bound):
                found = lines[at + 1] if at + 1 < len(lines) else "the end"
                raise fail(line, f"CHECK-NEXT {pattern!r} does not match the next line: {found}")
            at += 1
            banned.clear()
        elif key == "CHECK":
            hit = next((i for i in range(at + 1, len(lines)) if _search(pattern, lines[i], bound)), None)
            if hit is None:
                raise fail(line, f"CHECK {pattern!r} is not found after line {at + 1} of the output")
            check_banned(at + 1, hit)
            at = hit
    check_banned(at + 1, len(lines))


def check_remarks(case: Case, remarks: list[str]) -> None:
    """Hold the remarks against the REMARK lines."""
    for key, pattern, line in case.checks:
        if not key.startswith("REMARK"):
            continue
        found = any(_search(pattern, r, {}) for r in remarks)
        if found != (key == "REMARK"):
            said = "\n".join(remarks) or "(none)"
            raise CheckFailure(f"{case.file.name}:{line}: {key} {pattern!r} does not hold; the remarks were\n{said}")


def _search(pattern: str, line: str, bound: dict[str, str]) -> bool:
    """True if ``pattern`` occurs in ``line``; new bindings go into ``bound``."""
    regex, last = "", 0
    pattern = " ".join(pattern.split())
    for m in _HOLE.finditer(pattern):
        regex += re.escape(pattern[last : m.start()])
        plain, name, named, use = m.groups()
        if plain is not None:
            regex += f"(?:{plain})"
        elif name is not None:
            regex += f"(?P<{name}>{named})"
        else:
            regex += re.escape(bound.get(use, "\0unbound"))
        last = m.end()
    found = re.search(regex + re.escape(pattern[last:]), line)
    if found is None:
        return False
    bound.update(found.groupdict())
    return True
