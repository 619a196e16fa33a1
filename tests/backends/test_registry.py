"""Registering, finding and claiming: names, duplicates, entry points and refusals."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from moec.backends import registry
from moec.backends.aten import AtenBackend
from moec.backends.base import Artifact, Backend, StatusLine, Support, program_op
from moec.backends.partition import CARRIED_OPS, claim
from moec.backends.registry import BackendError, all_backends, get_backend, register_backend
from moec.ir.core import Graph, Op
from moec.ir.types import PlanType, TensorType
from tests.backends.cases import ExpertsCase, route_graph


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", dict(all_backends()))


class Picky(Backend):
    """Takes routers alone."""

    name = "picky"

    def supports(self, op: Op, target: str) -> Support:
        return Support.yes() if op.name == "moe.route" else Support.no("it only routes")

    def status(self) -> list[StatusLine]:
        return []


def test_the_built_in_ones_are_found() -> None:
    assert {"aten", "reference"} <= set(all_backends())
    assert isinstance(get_backend("aten"), AtenBackend)


def test_a_misspelt_name_gets_the_nearest() -> None:
    with pytest.raises(BackendError, match="did you mean 'aten'"):
        get_backend("atem")


def test_two_of_one_name_are_an_error() -> None:
    class Aten(Picky):
        name = "aten"

    with pytest.raises(BackendError, match="registered twice"):
        register_backend(Aten)
    assert isinstance(get_backend("aten"), AtenBackend)


def test_registering_again_is_no_error() -> None:
    register_backend(Picky)
    register_backend(Picky)
    assert isinstance(get_backend("picky"), Picky)


def test_a_backend_needs_a_name() -> None:
    class Nameless(Picky):
        name = ""

    with pytest.raises(BackendError, match="has no name"):
        register_backend(Nameless)


def test_entry_points_that_fail_are_told() -> None:
    def load(value: str) -> None:
        registry._load_entry_point(EntryPoint("x", value, registry.ENTRY_POINT_GROUP))

    with pytest.raises(BackendError, match="does not import"):
        load("no_such_module_at_all:Backend")
    with pytest.raises(BackendError, match="neither a Backend subclass nor a module"):
        load("math:pi")
    load("moec.backends.aten:AtenBackend")
    load("moec.backends.aten")


def test_the_first_that_supports_an_op_gets_it() -> None:
    register_backend(Picky)
    route, experts = route_graph(4, k=2), ExpertsCase().graph()
    assert claim(route, ["picky", "aten"])[program_op(route)].name == "picky"
    claims = claim(experts, ["picky", "aten"])
    assert claims[program_op(experts)].name == "aten"
    assert claims.reasons(program_op(experts)) == ["picky: it only routes"]


def test_what_nobody_wants_is_left_with_its_reasons() -> None:
    register_backend(Picky)
    graph = ExpertsCase().graph()
    claims = claim(graph, ["picky"])
    assert not claims
    assert [r.reason for r in claims.refusals] == ["it only routes"]


def test_only_carried_ops_are_offered() -> None:
    graph = Graph("g")
    x = graph.add_arg(TensorType.of("f32", "T", 4))
    ids = graph.add_arg(TensorType.of("i64", "T", 2))
    graph.append(Op("moe.dispatch", [x, ids], [x.type, PlanType(4)], attrs={"experts": 4}))
    assert not claim(graph, ["reference"])
    assert "moe.dispatch" not in CARRIED_OPS


def test_an_unknown_name_in_the_order() -> None:
    with pytest.raises(BackendError, match="unknown backend"):
        claim(ExpertsCase().graph(), ["nobody"])


def test_integer_weights_are_refused_by_aten() -> None:
    case = ExpertsCase()
    graph = case.graph()
    graph.args[3].type = TensorType.of("i8", *case.shapes()["up"][0])
    support = AtenBackend().supports(program_op(graph), "cpu")
    assert not support.ok
    assert "i8" in support.reason


def test_the_default_lowering_keeps_the_program() -> None:
    graph = ExpertsCase().graph()
    artifact = AtenBackend().lower(graph, "cpu")
    assert (artifact.backend, artifact.target, artifact.graph) == ("aten", "cpu", graph)
    assert isinstance(artifact, Artifact)
