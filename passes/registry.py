"""The registry of passes: built-in ones are found by walking ``moec.passes``, others through entry points.

An entry point of the group ``moec.passes`` names a :class:`~moec.passes.base.Pass` subclass, or a module that
registers its passes when it is imported. The pipeline texts themselves are read in :mod:`moec.passes.pipeline_text`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import ClassVar, TypeVar, get_origin, get_type_hints

from moec.ir.errors import MoecError, nearest
from moec.passes.base import Pass, PassClass
from moec.passes.pipelines import PIPELINES

ENTRY_POINT_GROUP = "moec.passes"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\Z")
_PASSES: dict[str, type[Pass]] = {}
P = TypeVar("P", bound=Pass)


class RegistryError(MoecError):
    """A pass cannot be registered: a bad declaration, a taken name, or a plug-in that does not load."""

    code = "pass-registry"


class UnknownPassError(MoecError):
    """No pass or pipeline has that name."""

    code = "unknown-pass"


def register_pass(cls: type[P]) -> type[P]:
    """Class decorator that enters a pass into the registry.

    Raises:
        RegistryError: The name is missing, malformed or taken, or an option is not a dataclass field.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.match(name):
        raise RegistryError(
            f"{cls.__module__}.{cls.__qualname__}: {name!r} is no name for a pass",
            hint="set the class attribute `name`: lower-case words joined by hyphens",
        )
    if not isinstance(getattr(cls, "pass_class", None), PassClass):
        raise RegistryError(f"pass {name!r} does not declare its pass_class", hint="set it to a PassClass member")
    _check_options_declared(cls)
    if name in PIPELINES:
        raise RegistryError(f"pass {name!r} has the name of a pipeline", hint="choose another name")
    other = _PASSES.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise RegistryError(
            f"pass {name!r} is registered twice: by {other.__module__}.{other.__qualname__} "
            f"and by {cls.__module__}.{cls.__qualname__}",
            hint="rename one of them, or uninstall the package that brings it",
        )
    if not cls.summary:
        cls.summary = (inspect.getdoc(cls) or "").split("\n", 1)[0].strip()
    _PASSES[name] = cls
    return cls


def _check_options_declared(cls: type[Pass]) -> None:
    """Refuse annotated attributes that are no dataclass field: they would look like options and be ignored."""
    declared = {f.name for f in dataclasses.fields(cls)}
    for attr, hint in get_type_hints(cls).items():
        if hint is not ClassVar and get_origin(hint) is not ClassVar and attr not in declared:
            raise RegistryError(
                f"pass {cls.name!r}: {attr!r} is no dataclass field, so it cannot be an option",
                hint="decorate the class with @register_pass above @dataclass(frozen=True)",
            )


@cache
def _load_all() -> None:
    package = importlib.import_module("moec.passes")
    for module in pkgutil.walk_packages(package.__path__, "moec.passes."):
        importlib.import_module(module.name)
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        load_entry_point(point)


def load_entry_point(point: EntryPoint) -> None:
    """Register what one entry point brings.

    Raises:
        RegistryError: It does not load, or is neither a pass nor a module.
    """
    where = f"entry point {point.name!r} ({point.value}) of the group {ENTRY_POINT_GROUP}"
    try:
        loaded = point.load()
    except MoecError:
        raise
    except Exception as error:
        raise RegistryError(
            f"{where} does not load: {type(error).__name__}: {error}", hint="repair or uninstall that package"
        ) from error
    if isinstance(loaded, type) and issubclass(loaded, Pass):
        register_pass(loaded)
    elif not isinstance(loaded, ModuleType):
        raise RegistryError(
            f"{where} is a {type(loaded).__name__}, neither a Pass subclass nor a module",
            hint="point it at the pass class",
        )


def all_passes() -> dict[str, type[Pass]]:
    """Every registered pass class by name, sorted."""
    _load_all()
    return dict(sorted(_PASSES.items()))


def get_pass(name: str) -> type[Pass]:
    """The pass class called ``name``.

    Raises:
        UnknownPassError: The message names the nearest passes and pipelines.
    """
    passes = all_passes()
    try:
        return passes[name]
    except KeyError:
        raise UnknownPassError(f"unknown pass {name!r}; {nearest(name, [*passes, *PIPELINES])}") from None


def parse_pipeline(text: str) -> list[Pass]:
    """The passes that a pipeline text names (see :func:`moec.passes.pipeline_text.parse_pipeline`)."""
    from moec.passes import pipeline_text  # it looks passes up here

    return pipeline_text.parse_pipeline(text)


def format_pipeline(passes: list[Pass]) -> str:
    """The text that names ``passes`` (see :func:`moec.passes.pipeline_text.format_pipeline`)."""
    from moec.passes import pipeline_text  # it looks passes up here

    return pipeline_text.format_pipeline(passes)
