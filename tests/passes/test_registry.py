"""Registering passes: built in, by decorator, by entry point; and what is refused."""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

import moec.passes
from moec.ir.core import Graph
from moec.passes import Pass, PassClass, PassContext, PassResult, all_passes, get_pass
from moec.passes import registry as registry_module
from moec.passes.docs import reference_markdown
from moec.passes.pipelines import PIPELINES
from moec.passes.registry import RegistryError, UnknownPassError, load_entry_point, register_pass


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    all_passes()  # fill the registry before it is copied
    monkeypatch.setattr(registry_module, "_PASSES", dict(registry_module._PASSES))


@dataclass(frozen=True)
class Extra(Pass):
    """Does nothing | at all.

    And more about it.
    """

    name = "extra"
    pass_class = PassClass.REORDERS
    tolerance = 1e-5

    chunks: int = 4
    names: tuple[str, ...] = ("a",)

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        return PassResult(False)


def point(value: str, name: str = "plug-in") -> EntryPoint:
    return EntryPoint(name, value, "moec.passes")


def test_the_built_in_passes_are_found() -> None:
    assert {"functionalize", "canonicalize", "cse", "dce"} <= set(all_passes())
    assert list(all_passes()) == sorted(all_passes())


def test_every_built_in_class_is_registered() -> None:
    modules = {m.name for m in pkgutil.walk_packages(moec.passes.__path__, "moec.passes.")}
    built_in = {c for c in _subclasses(Pass) if c.__module__ in modules and not inspect.isabstract(c)}
    assert built_in == {c for c in all_passes().values() if c.__module__ in modules}


def _subclasses(cls: type[Pass]) -> set[type[Pass]]:
    return {c for s in cls.__subclasses__() for c in ({s} | _subclasses(s))}


def test_registering_gives_a_summary_and_a_name() -> None:
    register_pass(Extra)
    assert get_pass("extra") is Extra
    assert Extra.summary == "Does nothing | at all."


def test_registering_the_same_class_again_is_fine() -> None:
    register_pass(Extra)
    register_pass(Extra)
    assert get_pass("extra") is Extra


def test_a_taken_name_is_refused() -> None:
    @dataclass(frozen=True)
    class Other(Extra):
        name = "dce"

    with pytest.raises(RegistryError, match=r"'dce' is registered twice: by moec.passes.dce.*and by .*Other"):
        register_pass(Other)
    assert get_pass("dce").__module__ == "moec.passes.dce"


def test_the_name_of_a_pipeline_is_refused() -> None:
    with pytest.raises(RegistryError, match="has the name of a pipeline"):
        register_pass(type("P", (Extra,), {"name": next(iter(PIPELINES))}))


@pytest.mark.parametrize("name", ["", "Upper", "under_score", "-x", "x-", None])
def test_bad_names_are_refused(name: str | None) -> None:
    with pytest.raises(RegistryError, match="no name for a pass"):
        register_pass(type("P", (Extra,), {"name": name}))


def test_a_pass_without_a_class_is_refused() -> None:
    with pytest.raises(RegistryError, match="does not declare its pass_class"):
        register_pass(type("P", (Pass,), {"name": "classless"}))


def test_an_annotation_that_is_no_field_is_refused() -> None:
    class Forgot(Pass):
        """The decorator @dataclass is missing."""

        name = "forgot"
        pass_class = PassClass.BITWISE
        chunks: int = 4

    with pytest.raises(RegistryError, match="'chunks' is no dataclass field"):
        register_pass(Forgot)


def test_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(UnknownPassError, match=r"unknown pass 'cannonicalize'; did you mean 'canonicalize'"):
        get_pass("cannonicalize")


class Loaded(EntryPoint):
    """An entry point whose object is at hand already."""

    def load(self) -> object:
        return Extra


def test_entry_point_of_a_class_and_of_a_module() -> None:
    load_entry_point(Loaded("plug-in", "somewhere:Extra", "moec.passes"))
    assert get_pass("extra") is Extra
    load_entry_point(point("moec.passes.dce"))
    assert get_pass("dce").__module__ == "moec.passes.dce"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("moec.passes.nothing_here", "does not load: ModuleNotFoundError"),
        ("moec.passes.dce:Nothing", "does not load: AttributeError"),
        ("moec.passes.pipelines:PIPELINES", "is a dict, neither a Pass subclass nor a module"),
    ],
)
def test_a_broken_entry_point_is_named(value: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message) as info:
        load_entry_point(point(value))
    assert "'plug-in'" in str(info.value)


def test_the_reference_tells_every_pass_and_option() -> None:
    register_pass(Extra)
    text = reference_markdown()
    for name in [*all_passes(), *PIPELINES]:
        assert f"`{name}`" in text
    assert "| `chunks` | `int` | `4` |" in text
    assert '| `names` | `tuple[str, ...]` | `["a"]` |' in text
    assert "| reorders, 1e-05 | Does nothing \\| at all. |" in text
    assert "And more about it." in text
