"""Runs every filecheck file, holds every registered pass to having one, and tests the harness itself."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from moec.ir.parser import parse_graph
from moec.passes import all_passes
from tests.passes.filecheck import FOLDER, Case, CheckFailure, all_files, check_text, read_cases, run_case
from tests.passes.numeric import assert_preserves

CASES = [case for path in all_files() for case in read_cases(path)]
BUILTIN = {name: cls for name, cls in all_passes().items() if cls.__module__.startswith("moec.passes")}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_text_and_remarks(case: Case) -> None:
    run_case(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case: Case) -> None:
    if case.numeric.startswith("off"):
        assert len(case.numeric.split(None, 1)) == 2, "say why after 'off'"
        return
    graph = parse_graph(case.text, case.file.name)
    assert_preserves(graph, case.pipeline, dims=case.numeric or None)


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_pass_has_a_file_and_a_docstring(name: str) -> None:
    assert (FOLDER / f"{name}.moe").exists(), f"pass {name!r} needs tests/passes/filecheck/{name}.moe"
    assert inspect.getdoc(BUILTIN[name]) not in (None, "", inspect.getdoc(BUILTIN[name].__mro__[1]))


@pytest.mark.parametrize("path", all_files(), ids=lambda p: p.stem)
def test_half_of_a_file_are_negatives_and_it_names_a_pass(path: Path) -> None:
    cases = read_cases(path)
    assert cases[0].subject in all_passes(), f"{path.name} is about no registered pass"
    negatives = sum(c.kind == "negative" for c in cases)
    assert 2 * negatives >= len(cases), f"{path.name}: {negatives} of {len(cases)} cases are negative"


GRAPH = """
graph @g(%x: f32[T, 4]) -> f32[T, 4] {
  %a = torch.call @aten.alias.default(%x) : f32[T, 4]
  %b = torch.call @aten.neg.default(%a) : f32[T, 4]
  return %b
}
"""


def case(kind: str, *checks: str, pipeline: str = "canonicalize") -> Case:
    parsed = [(line.split(":", 1)[0], line.split(":", 1)[1].strip(), 1) for line in checks]
    return Case(Path("canonicalize.moe"), 1, pipeline, GRAPH, kind, "a title", parsed)


def test_the_harness_accepts_what_holds() -> None:
    run_case(
        case(
            "positive",
            "CHECK: graph @g",
            "CHECK-NOT: alias",
            "CHECK: [[V:%[a-z]+]] = torch.call @aten.neg.{{default|other}}(%x)",
            "CHECK-NEXT: return [[V]]",
            "REMARK: applied: canonicalize: drop-alias",
            "REMARK-NOT: missed",
        )
    )


@pytest.mark.parametrize(
    "bad",
    [
        case("negative", "CHECK: neg"),
        case("positive", "CHECK: alias"),
        case("positive", "CHECK: return", "CHECK: neg"),
        case("positive", "CHECK: graph", "CHECK-NEXT: return"),
        case("positive", "CHECK: graph", "CHECK-NOT: neg"),
        case("positive", "CHECK: graph", "CHECK-NOT: neg", "CHECK: return"),
        case("positive", "CHECK: [[V:%x]]", "CHECK: return [[V]]"),
        case("positive", "REMARK: missed"),
        case("positive", "REMARK-NOT: applied"),
        case("positive", "CHECK: neg", pipeline="dce"),
    ],
    ids=lambda c: "-".join(k for k, _, _ in c.checks) + "-" + c.kind,
)
def test_the_harness_refuses_what_does_not(bad: Case) -> None:
    with pytest.raises(CheckFailure):
        run_case(bad)


def test_check_next_at_the_end() -> None:
    with pytest.raises(CheckFailure, match="the end"):
        check_text(case("positive", "CHECK: last", "CHECK-NEXT: more"), "first\nlast")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("// RUN: -p dce\n// CHECK: x\n" + GRAPH, "CASE"),
        ("// CASE: positive t\n// CHECK: x\n" + GRAPH, "RUN"),
        ("// RUN: -p dce\n// CASE: positive t\n" + GRAPH, "checks nothing"),
        ("// RUN: -p dce\n// CASE: maybe t\n// CHECK: x\n" + GRAPH, "CASE"),
    ],
)
def test_a_file_must_say_what_it_checks(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "dce.moe"
    path.write_text(text)
    with pytest.raises(CheckFailure, match=message):
        read_cases(path)


def test_numbers_that_differ_are_found() -> None:
    wrong = GRAPH.replace("neg", "relu")
    before, after = parse_graph(GRAPH), parse_graph(wrong)
    from tests.passes.numeric import assert_close, compute, random_inputs  # the pieces, on two unequal graphs

    inputs = random_inputs(before, 0, {"T": 3})
    with pytest.raises(AssertionError, match="not bitwise"):
        assert_close(compute(after, inputs)[0][0], compute(before, inputs)[0][0], 0.0, "output")
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(compute(after, inputs)[0][0], compute(before, inputs)[0][0], 1e-3, "output")
