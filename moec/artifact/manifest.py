"""The manifest: what an artifact holds, as JSON that is read strictly.

It is the same for every target. What a target needs besides is a blob: a member of the archive, and the name of its
kind.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from moec.artifact.errors import ArtifactError

FORMAT = "moec-artifact"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TensorSpec:
    """An input or output. Sizes are numbers, or names and expressions of ``Entry.dims``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Entry:
    """A function of the artifact.

    Attributes:
        inputs, outputs: In the order that the blob takes and gives them.
        dims: Least and largest value of every named size.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Blob:
    """Code for one target.

    Attributes:
        kind: Who runs it: ``aotinductor``.
        member: In the archive.
        entries: Which entries it holds, and for every constant of one the weight that it is: a key of ``Weights``.
    """

    target: str
    kind: str
    member: str
    entries: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Tensor:
    """A weight.

    Attributes:
        dtype, shape, stride: Of the tensor; the stride counts elements.
        file: Key of ``Weights.files``.
        offset, size: Bytes in that file.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class Table:
    """A constant of addresses: of tensors that stay where they lie. Each is ``"<file>@<offset>"``."""

    addresses: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class File:
    """A file that holds weights.

    Attributes:
        member: ``archive member!member of that`` inside the artifact, or "" for a file beside it.
        path: Of a file beside the artifact: relative to the artifact, or absolute.
        size: Bytes.
        sha256: Of the whole file; "" inside, where the archive member has one.
    """

    member: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Weights:
    """Where the constants of the entries are."""

    where: str
    files: dict[str, File] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """A member of the archive, besides the manifest."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Licence:
    """Under what terms a part may be used."""

    part: str
    licence: str
    member: str = ""


@dataclass(frozen=True)
class Manifest:
    """Everything that is said about an artifact.

    Attributes:
        model: The text MODEL it was compiled from.
        passes: Pipeline text with all options.
        options: What else the compile was told.
        generate: Of prefill and decode entries: ``cache``, how many tokens fit, and ``end``, which tokens end a text.
    """

    moec_version: str
    torch_version: str
    target: str
    model: str
    passes: str
    options: dict[str, str]
    entries: dict[str, Entry]
    blobs: tuple[Blob, ...]
    weights: Weights
    members: dict[str, Member]
    licences: tuple[Licence, ...] = ()
    generate: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as text."""
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"


def read_manifest(text: str, where: str) -> Manifest:
    """The manifest in ``text``.

    Args:
        text: JSON.
        where: The artifact's name, for messages.

    Raises:
        ArtifactError: No manifest, a newer format, or a field that is missing or of another type.
    """
    try:
        tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{where}: the manifest is no JSON: {error}", hint=_AGAIN) from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ArtifactError(f"{where} is no moec artifact: its manifest does not say {FORMAT!r}", hint=_AGAIN)
    version = tree.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ArtifactError(f"{where}: the manifest has no format version", hint=_AGAIN)
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{where} has format version {version}; this moec reads versions up to {FORMAT_VERSION}",
            hint=f"install moec {tree.get('moec_version', '')} or newer, or compile the model again",
        )
    values = {k: v for k, v in tree.items() if k not in ("format", "format_version")}
    made: Manifest = _build(Manifest, values, f"{where}: manifest")
    return made


_AGAIN = "compile the model again"


def _build(type_: Any, value: Any, where: str) -> Any:
    """``value`` of JSON as ``type_``, or an error that names the place."""
    if is_dataclass(type_) and isinstance(type_, type):
        return _record(type_, value, where)
    origin, args = typing.get_origin(type_), typing.get_args(type_)
    if origin is tuple and isinstance(value, list):
        if args[-1] is Ellipsis:
            return tuple(_build(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_build(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {k: _build(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    elif origin is types.UnionType:
        if type(value) in args:
            return value
    elif isinstance(type_, type) and type(value) is type_:
        return value
    raise ArtifactError(f"{where} holds {json.dumps(value)[:80]}, not a {_name(type_)}", hint=_AGAIN)


def _record(type_: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ArtifactError(f"{where} holds {json.dumps(value)[:80]}, not a {type_.__name__}", hint=_AGAIN)
    hints = typing.get_type_hints(type_)
    known = {f.name: hints[f.name] for f in fields(type_)}
    missing, unknown = sorted(known.keys() - value.keys()), sorted(value.keys() - known.keys())
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has an unknown field {unknown[0]!r}"
        raise ArtifactError(f"{where} {what}", hint=_AGAIN)
    return type_(**{name: _build(t, value[name], f"{where}.{name}") for name, t in known.items()})


def _name(type_: Any) -> str:
    return type_.__name__ if isinstance(type_, type) else str(type_)
