"""Which MoE families the installed transformers has. There is no list: a new release shows up as new rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moec.coverage.source import ClassSource, read_classes
from moec.ir.errors import MoecError, nearest

_PACKAGE = "transformers.models"

# What to build, best first: the plain language model; the text part of a model that also sees or hears; then any.
_PREFERRED = ("ForCausalLM", "TextModel", "Model", "ForConditionalGeneration", "")


class CoverageError(MoecError):
    """``moec coverage`` cannot start: no transformers, or arguments that fit nothing."""

    code = "coverage"


@dataclass(frozen=True)
class Family:
    """A folder of transformers' models that holds an MoE.

    Attributes:
        name: The folder.
        module: Import path of the modeling file.
        decorated: Experts classes that follow the experts interface.
        undecorated: Classes that look like experts and don't, each with the reason why it looks so.
        entries: Model classes that build any of these, best choice first.
    """

    name: str
    module: str
    decorated: tuple[str, ...]
    undecorated: tuple[tuple[str, str], ...]
    entries: tuple[str, ...]

    @property
    def experts(self) -> frozenset[str]:
        """Names of all experts classes."""
        return frozenset(self.decorated) | {name for name, _ in self.undecorated}

    def to_dict(self) -> dict[str, Any]:
        """The family as JSON types."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Family:
        """The inverse of ``to_dict``, after a way through JSON."""
        pairs = tuple((name, why) for name, why in values["undecorated"])
        return Family(values["name"], values["module"], tuple(values["decorated"]), pairs, tuple(values["entries"]))


def transformers_version() -> str:
    """The version of the installed transformers."""
    return version("transformers")


def models_folder() -> Path:
    """Where the installed transformers keeps its models, found without importing it.

    Raises:
        CoverageError: transformers is not installed.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise CoverageError("transformers is not installed", hint="pip install 'moec[hf]'")
    return Path(next(iter(spec.submodule_search_locations))) / "models"


@lru_cache(maxsize=4)
def discover(folder: Path | None = None, package: str = _PACKAGE) -> tuple[Family, ...]:
    """All MoE families, by name; read once in a process, as it takes seconds.

    Args:
        folder: Holds one folder a family; by default the installed transformers' models.
        package: Import path of ``folder``.

    Raises:
        CoverageError: transformers is not installed.
    """
    found = []
    for file in sorted((folder or models_folder()).glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "xpert" in text or "Moe" in text or "MoE" in text:  # parsing is what takes time
            family = family_of(file.parent.name, f"{package}.{file.parent.name}.{file.stem}", text)
            if family is not None:
                found.append(family)
    return tuple(found)


def family_of(name: str, module: str, text: str) -> Family | None:
    """What one modeling file holds, or None if there is no MoE that a model class builds."""
    classes = read_classes(text)
    decorated = tuple(c.name for c in classes.values() if c.decorated)
    undecorated = tuple((c.name, c.experts) for c in classes.values() if c.experts is not None and not c.decorated)
    entries = _entries(classes, {*decorated, *(n for n, _ in undecorated)})
    return Family(name, module, decorated, undecorated, entries) if entries else None


def _entries(classes: dict[str, ClassSource], experts: set[str]) -> tuple[str, ...]:
    models = [c.name for c in classes.values() if _is_model(c, classes) and experts & _reached(c.name, classes)]

    def rank(name: str) -> int:
        return next(i for i, suffix in enumerate(_PREFERRED) if name.endswith(suffix))

    return tuple(sorted(models, key=rank))  # stable: of equals, the one that the file has first


def _is_model(c: ClassSource, classes: dict[str, ClassSource]) -> bool:
    """Derives from ``PreTrainedModel``, and isn't a family's own base class of that name."""
    if c.name.lower().endswith("pretrainedmodel"):
        return False
    return any(b.endswith("PreTrainedModel") or (b in classes and _is_model(classes[b], classes)) for b in c.bases)


def _reached(name: str, classes: dict[str, ClassSource]) -> set[str]:
    """The classes of the file that building ``name`` may build: what it mentions, and what these mention."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        here = todo.pop()
        # A family's base class only names what its outputs are recorded from; it builds nothing.
        if here in seen or here not in classes or here.endswith("PreTrainedModel"):
            continue
        seen.add(here)
        todo += [*classes[here].mentions, *classes[here].bases]
    return seen


def select(families: Sequence[Family], names: str | None = None, part: str | None = None) -> list[Family]:
    """The families that the caller asked for.

    Args:
        families: All of them.
        names: Names with commas between; None for all.
        part: ``"2/3"``: every third family, from the second on; None for all.

    Raises:
        CoverageError: A name that is no MoE family, or a part that is none.
    """
    chosen = list(families)
    if names is not None:
        by_name = {f.name: f for f in families}
        wanted = [n.strip() for n in names.split(",") if n.strip()]
        for name in wanted:
            if name not in by_name:
                raise CoverageError(f"no MoE family is called {name!r}; {_near(name, by_name)}")
        chosen = [by_name[n] for n in dict.fromkeys(wanted)]
    if part is not None:
        first, _, parts = part.partition("/")
        if not (first.isdecimal() and parts.isdecimal() and 1 <= int(first) <= int(parts)):
            raise CoverageError(f"part {part!r} is none", hint="--part 2/3 is the second of three parts")
        chosen = chosen[int(first) - 1 :: int(parts)]
    return chosen


def _near(name: str, known: Iterable[str]) -> str:
    text = nearest(name, known)
    return text if text.startswith("did you mean") else "nothing is near"  # the list of all of them helps nobody
