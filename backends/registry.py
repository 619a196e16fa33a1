"""The registry of backends: built-in ones (every package beside this file) and those of the entry point group."""

from __future__ import annotations

import importlib
import pkgutil
import threading
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from moec.backends.base import Backend
from moec.ir.errors import MoecError, nearest

ENTRY_POINT_GROUP = "moec.backends"

_BACKENDS: dict[str, Backend] = {}
_LOCK = threading.RLock()
_loaded = False


class BackendError(MoecError):
    """A backend that is unknown, registered twice, or fails to import."""

    code = "backend"


def _origin(cls: type[Backend]) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def register_backend(cls: type[Backend]) -> type[Backend]:
    """Class decorator that enters a backend into the registry.

    Raises:
        BackendError: Another class has that name already.
    """
    if not getattr(cls, "name", ""):
        raise BackendError(f"backend class {cls.__qualname__} has no name", hint="set the class attribute `name`")
    with _LOCK:
        other = _BACKENDS.get(cls.name)
        if other is not None and _origin(type(other)) != _origin(cls):
            raise BackendError(
                f"backend {cls.name!r} is registered twice: by {type(other).__module__} and {cls.__module__}",
                hint="rename one of them, or uninstall one of the packages",
            )
        _BACKENDS[cls.name] = cls()
    return cls


def _load_entry_point(entry: EntryPoint) -> None:
    try:
        loaded = entry.load()
    except Exception as error:
        raise BackendError(
            f"the backend package behind entry point {entry.name!r} ({entry.value}) does not import: {error}",
            hint="mend or uninstall that package",
        ) from error
    if isinstance(loaded, type) and issubclass(loaded, Backend):
        register_backend(loaded)
    elif not isinstance(loaded, ModuleType):
        raise BackendError(
            f"entry point {entry.name!r} ({entry.value}) is neither a Backend subclass nor a module",
            hint="point it at the class, or at a module that registers it on import",
        )


def _load_all() -> None:
    global _loaded
    if _loaded:
        return
    with _LOCK:
        if _loaded:
            return
        package = importlib.import_module("moec.backends")
        for module in pkgutil.iter_modules(package.__path__):
            if module.ispkg:
                importlib.import_module(f"moec.backends.{module.name}")
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            _load_entry_point(entry)
        _loaded = True


def all_backends() -> dict[str, Backend]:
    """Every registered backend by name, sorted."""
    _load_all()
    return dict(sorted(_BACKENDS.items()))


def get_backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        BackendError: Unknown backend; the message names the nearest ones.
    """
    _load_all()
    try:
        return _BACKENDS[name]
    except KeyError:
        raise BackendError(f"unknown backend {name!r}; {nearest(name, _BACKENDS)}") from None
