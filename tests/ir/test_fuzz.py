"""Whatever the text: it parses, or raises a MoecError; what parses and verifies, prints and parses again."""

from __future__ import annotations

import pytest

from moec.ir.compare import structurally_equal
from moec.ir.errors import MoecError
from moec.ir.parser import parse
from moec.ir.printer import print_graph
from moec.ir.verifier import verify
from tests.ir.fuzzing import SEEDS, texts


def survive(text: str) -> bool:
    """True if ``text`` parsed and verified. Lets every error through that is not a MoecError."""
    try:
        graphs = parse(text)
        for graph in graphs:
            verify(graph)
    except MoecError as e:
        str(e).encode()  # no lone surrogate reaches a terminal
        return False
    for graph in graphs:
        (again,) = parse(print_graph(graph))
        assert structurally_equal(graph, again) is None
    return True


def test_seeds_parse() -> None:
    for text in SEEDS:
        assert survive(text), text


def test_ten_thousand_texts() -> None:
    good = sum(survive(text) for text in texts(1, 10_000))
    assert 100 < good < 9_000  # both ways are exercised


@pytest.mark.slow
def test_hundred_thousand_texts() -> None:
    for text in texts(2, 100_000):
        survive(text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "graph @g(" + "[" * 100_000,
        "graph @g() { return template " + "(" * 100_000,
        "graph @g() attrs {a = " + "{a = " * 100_000,
        "graph @g(%x: f32[" + "(" * 100_000,
        "graph @g(%x: f32[" + "-" * 100_000,
        "graph @g(%x: f32[" + "Max(" * 50_000,
        "graph @g(%x: f32[" + "2**" * 100_000 + "2]) {}",
        "graph @g(%x: f32[" + "T+" * 100_000 + "T]) {}",
        "graph @g(%x: f32[9" + "9" * 100_000 + "]) {}",
        "graph @g(%x: f32[2**999999999]) {}",
        "graph @g(%x: f32[(((2*x)**900)**900)**900]) {}",
        "graph @g(%x: f32[((x + y)**900 + z)**900 // ((x+y)**3)]) {}",
        "graph @g(%x: f32[" + ", ".join("x" * 9 + str(i) for i in range(5000)) + "]) {}",
        "graph @g() attrs {a = " + "9" * 100_000 + "} {}",
        "graph @" + "g" * 1_000_000,
        "mo" * 500_000,
        '"' + "\\" * 1_000_000,
        " " * 1_000_000 + "x",
        "//" * 1_000_000,
        "graph @g() { " + "{ (" * 10_000,
        "graph @g(%x: f32[8]) { " + "%a = moe.activation [%x] { (%x: f32[8]) { " * 1_000,
        "\x00",
        "\ud800",
        'graph @"\ud800"(%x: f32[T]) { return %y }',
        "graph @g() { %a, " * 10_000,
    ],
    ids=lambda t: t[:30].encode("ascii", "backslashreplace").decode(),
)
def test_bombs(text: str) -> None:
    survive(text)
