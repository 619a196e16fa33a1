"""Pipeline texts: what they mean, that they are written back, and what they say when they are wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir.core import Graph
from moec.passes import Pass, PassClass, PassContext, PassResult, format_pipeline, parse_pipeline
from moec.passes import registry as registry_module
from moec.passes.pipeline_text import PipelineError
from moec.passes.pipelines import PIPELINES
from moec.passes.registry import all_passes, register_pass


@dataclass(frozen=True)
class Optioned(Pass):
    """Has an option of every type."""

    name = "optioned"
    pass_class = PassClass.BITWISE

    chunks: int = 4
    scale: float = 1.0
    on: bool = False
    mode: str = "plain"
    sizes: tuple[int, ...] = ()
    pair: tuple[str, float] = ("a", 0.5)
    limit: int | None = None
    kind: Literal["ring", "tree"] = "ring"

    def __post_init__(self) -> None:
        if self.chunks > 1000:
            raise ValueError("chunks is at most 1000")

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        return PassResult(False)


@dataclass(frozen=True)
class Needy(Pass):
    """Needs an option."""

    name = "needy"
    pass_class = PassClass.BITWISE

    size: int

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        return PassResult(False)


@pytest.fixture(autouse=True)
def two_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    all_passes()  # fill the registry before it is copied
    monkeypatch.setattr(registry_module, "_PASSES", dict(registry_module._PASSES))
    register_pass(Optioned)
    register_pass(Needy)


def test_options_by_type() -> None:
    text = ' optioned { chunks = -3, scale=1e-3,on=true, mode="x,{}\\"\\n",'
    text += " sizes=[1,2,], pair=(b, 2), limit=none, kind=tree}"
    want = Optioned(-3, 1e-3, True, 'x,{}"\n', (1, 2), ("b", 2.0), None, "tree")
    assert parse_pipeline(text + ",dce,optioned{}") == [want, all_passes()["dce"](), Optioned()]


def test_bare_words_are_texts_and_none_is_no_text() -> None:
    assert parse_pipeline("optioned{mode=none}")[0] == Optioned(mode="none")
    assert parse_pipeline("optioned{limit=7}")[0] == Optioned(limit=7)


def test_empty() -> None:
    assert parse_pipeline("") == parse_pipeline(" \n") == []
    assert format_pipeline([]) == ""


def test_named_pipelines_are_spelt_out() -> None:
    assert [p.name for p in parse_pipeline("cleanup,dce")] == ["canonicalize", "cse", "dce", "dce"]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_named_pipeline_parses(name: str) -> None:
    assert format_pipeline(parse_pipeline(name)) == format_pipeline(parse_pipeline(PIPELINES[name]))


texts = st.text(st.characters(codec="utf-8"), max_size=8)
optioned = st.builds(
    Optioned,
    st.integers(-1000, 1000),
    st.floats(allow_nan=False),
    st.booleans(),
    texts,
    st.lists(st.integers(), max_size=3).map(tuple),
    st.tuples(texts, st.floats(allow_nan=False)),
    st.none() | st.integers(),
    st.sampled_from(["ring", "tree"]),
)


@given(st.lists(optioned | st.builds(Needy, st.integers()), max_size=3))
@settings(max_examples=100, deadline=None)
def test_written_and_read_back(passes: list[Pass]) -> None:
    text = format_pipeline(passes)
    assert parse_pipeline(text) == passes
    assert format_pipeline(parse_pipeline(text)) == text


def test_defaults_are_not_written() -> None:
    assert format_pipeline([Optioned(), Optioned(chunks=5), Needy(1)]) == "optioned,optioned{chunks=5},needy{size=1}"


@given(st.text(alphabet='optioned{}[](),=" \\chunks4-_.#\n', max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        parse_pipeline(text)
    except PipelineError as error:
        in_place = 0 <= error.position <= len(text) and "^" in str(error)
        assert in_place  # most texts are refused, some parse


@pytest.mark.parametrize(
    ("text", "column", "message", "code"),
    [
        ("dce,canonicalise", 5, "unknown pass 'canonicalise'; did you mean 'canonicalize'", "unknown-pass"),
        ("defualt", 1, "did you mean 'default'?", "unknown-pass"),
        ("optioned{chunk=4}", 10, "has no option 'chunk'; did you mean 'chunks'?", "pass-option"),
        ("dce{chunks=4}", 5, "it takes no options", "pass-option"),
        ("optioned{chunks=4.5}", 17, "option 'chunks' of pass 'optioned' needs an integer, found 4.5", "pass-option"),
        ('optioned{chunks="4"}', 17, "needs an integer", "pass-option"),
        ("optioned{chunks=9999}", 9, "chunks is at most 1000", "pass-option"),
        ("optioned{scale=fast}", 16, "needs a number", "pass-option"),
        ("optioned{on=1}", 13, "needs true or false", "pass-option"),
        ("optioned{kind=rign}", 15, "needs one of 'ring', 'tree', found rign; did you mean 'ring'", "pass-option"),
        ("optioned{sizes=3}", 16, "needs a list", "pass-option"),
        ("optioned{sizes=[1,x]}", 19, "needs an integer, found x", "pass-option"),
        ("optioned{pair=[a]}", 15, "takes 2 elements, found 1", "pass-option"),
        ("optioned{pair=[a,1,2]}", 20, "takes 2 elements", "pass-option"),
        ("optioned{chunks=1,chunks=2}", 19, "given twice", "pass-option"),
        ("needy", 1, "needs its option 'size'", "pass-option"),
        ("needy{}", 6, "needs its option 'size'", "pass-option"),
        ("cleanup{}", 8, "is a pipeline and takes no options", "pipeline"),
        ("dce cse", 5, "expected ',' after a pass, found 'cse'", "pipeline"),
        ("dce,", 5, "expected the name of a pass, found 'the end'", "pipeline"),
        ("dce{", 5, "expected the name of an option", "pipeline"),
        ("optioned{chunks}", 16, "expected '='", "pipeline"),
        ("optioned{chunks=1 on=true}", 19, "expected ','", "pipeline"),
        ('optioned{mode="x}', 15, "without a closing quote", "pipeline"),
        ("dce;cse", 4, "a stray ';'", "pipeline"),
    ],
)
def test_errors_point_at_the_place(text: str, column: int, message: str, code: str) -> None:
    with pytest.raises(PipelineError) as info:
        parse_pipeline(text)
    shown = str(info.value)
    assert message in shown
    assert (info.value.position + 1, info.value.code) == (column, code)
    assert shown.split("\n")[-1] == "  " + " " * (column - 1) + "^"


def test_a_pipeline_inside_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIPELINES, "one", "dce,two")
    monkeypatch.setitem(PIPELINES, "two", "one")
    with pytest.raises(PipelineError, match="contains itself: one -> two"):
        parse_pipeline("one")


def test_a_pipeline_naming_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIPELINES, "bad", "dec")
    with pytest.raises(PipelineError, match="unknown pass 'dec' in pipeline 'bad'; did you mean 'dce'"):
        parse_pipeline("bad")
