"""``moec.load``: an artifact as functions. The code comes from the archive, weights stay on the file's pages."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.artifact.archive import Archive, aligned_member, hashed_copy
from moec.artifact.errors import ArtifactError, InputError
from moec.artifact.generate import Prompts, generate
from moec.artifact.manifest import Blob, Entry, Manifest, TensorSpec
from moec.artifact.weights import NAMES, Mapped, check_all
from moec.cache import cache_dir
from moec.ir.errors import nearest


class LoadedEntry:
    """A function of a loaded artifact.

    Attributes:
        spec: Its inputs, outputs and sizes.
    """

    def __init__(self, name: str, spec: Entry, loader: Any, weights: Mapped) -> None:
        self.name, self.spec, self._loader = name, spec, loader
        self._weights = weights  # the loader keeps addresses alone

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run it.

        Args:
            *args: Inputs in their order.
            **kwargs: Inputs by name.

        Returns:
            The output, or all of them if there are several.

        Raises:
            InputError: An input is missing, unknown, of another type, or of a size outside the declared range.
        """
        inputs = self._bind(args, kwargs)
        check_inputs(self.spec, inputs)
        outputs = self.run(inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run it on inputs that fit; nothing is checked."""
        made: list[Tensor] = self._loader.boxed_run(list(inputs))
        return made

    def _bind(self, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> list[Tensor]:
        names = [s.name for s in self.spec.inputs]
        if len(args) > len(names):
            raise InputError(f"{self.name} takes {len(names)} inputs ({', '.join(names)}), {len(args)} were given")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names:
                raise InputError(f"{self.name} has no input {name!r}; {nearest(name, names)}")
            if name in given:
                raise InputError(f"{self.name}: input {name!r} is given twice")
            given[name] = value
        if missing := [n for n in names if n not in given]:
            raise InputError(f"{self.name} lacks the input {missing[0]!r}", hint="inputs: " + ", ".join(names))
        return [given[n] for n in names]


class LoadedArtifact:
    """A loaded artifact; calling it calls its entry ``model``.

    Attributes:
        manifest: What it says it holds.
        entries: Its functions by name.
    """

    def __init__(self, manifest: Manifest, entries: dict[str, LoadedEntry]) -> None:
        self.manifest, self.entries = manifest, entries

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        if "model" not in self.entries:
            names = ", ".join(self.entries)
            raise InputError(
                f"this artifact was compiled for generating: it has {names}", hint="call .generate(tokens)"
            )
        return self.entries["model"](*args, **kwargs)

    def generate(self, prompts: Prompts, count: int, mask: Tensor | None = None) -> Tensor:
        """Greedy continuation.

        Args:
            prompts: i64 [batch, prompt], or rows of different lengths.
            count: How many tokens to add at most.
            mask: [batch, prompt], zero where a row of a tensor begins with padding.

        Returns:
            i64 [batch, prompt + added]: shorter prompts have padding before them, rows that ended have some behind.

        Raises:
            InputError: The artifact has no decode entry, was compiled for fewer rows, or its cache is too short.
        """
        return generate(self, prompts, count, mask)


def load(path: str | Path, *, check: bool = True) -> LoadedArtifact:
    """Load a ``.moec`` artifact for this machine.

    Args:
        path: The artifact.
        check: Compare the hashes of everything, weights too. What was compared once is not read again while its size
            and time of change stay the same. Otherwise that of the code is compared when it is first used.

    Raises:
        MoecError: The artifact is damaged, was edited, is too new, has no code for this machine, or lacks its weights.
    """
    path = Path(path)
    with Archive(path) as archive:
        blob = _blob(archive.manifest, path)
        if check:
            check_all(archive)
        weights = Mapped(archive)
        if blob.kind != "aotinductor":
            return LoadedArtifact(archive.manifest, _runners(archive, blob, weights))
        code = _code_package(archive, blob, checked=check)
        entries = {}
        for name, constants in blob.entries.items():
            loader = _loader(code, name, path, archive.manifest)
            missing = [key for key in constants.values() if key not in weights.tensors]
            if missing or name not in archive.manifest.entries:
                what = f"the weight {missing[0]}" if missing else f"the entry {name}"
                raise ArtifactError(f"{path}: the manifest does not list {what}", hint="compile the model again")
            if constants:
                loader.load_constants({c: weights.tensors[k] for c, k in constants.items()}, False, True, True, False)
            entries[name] = LoadedEntry(name, archive.manifest.entries[name], loader, weights)
        return LoadedArtifact(archive.manifest, entries)


def _runners(archive: Archive, blob: Blob, weights: Mapped) -> dict[str, LoadedEntry]:
    """The entries of a blob for a GPU."""
    from moec.artifact.gpu import load_runners

    specs = archive.manifest.entries
    made = load_runners(archive, blob, weights.tensors)
    return {name: LoadedEntry(name, specs[name], runner, weights) for name, runner in made.items()}


def _blob(manifest: Manifest, path: Path) -> Blob:
    for blob in manifest.blobs:
        if blob.kind == "aotinductor" and blob.target.partition(":")[0] == "cpu":
            return blob
    for blob in manifest.blobs:
        if blob.kind == "triton":
            return blob
    kinds = ", ".join(f"{b.target} ({b.kind})" for b in manifest.blobs) or "nothing"
    raise ArtifactError(f"{path} holds code for {kinds}: none of it runs here")


def _loader(code: Path, name: str, path: Path, manifest: Manifest) -> Any:
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(code), name, False, 1, -1)
    except RuntimeError as error:
        text = str(error)
        if "CPU ISA level" in text:
            raise ArtifactError(
                f"{path} was built for processors with more instructions than this one has",
                hint="compile it again with --target cpu:avx2",
            ) from error
        first = (text.strip().splitlines() or ["unknown"])[0]
        made, here = manifest.torch_version, torch.__version__
        hint = f"it was compiled with torch {made}, and this is torch {here}" if made != here else None
        raise ArtifactError(f"{path}: its code cannot be loaded: {first}", hint=hint) from error


def _code_package(archive: Archive, blob: Blob, checked: bool) -> Path:
    """The blob as a package without weights in the cache directory; the loader of torch unpacks packages whole."""
    manifest = archive.manifest
    weights = {f.member.partition("!")[2] for f in manifest.weights.files.values() if f.member.startswith(blob.member)}
    key = hashlib.sha256(f"{manifest.members[blob.member].sha256}\0{sorted(weights)}".encode()).hexdigest()[:40]
    path = cache_dir() / "artifacts" / f"{key}.pt2"
    if path.exists():
        return path
    if not checked:
        archive.check(blob.member)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        made = Path(folder) / "code.pt2"
        try:
            with (
                archive.open_member(blob.member) as member,
                zipfile.ZipFile(member) as package,
                zipfile.ZipFile(made, "w") as out,
            ):
                for info in package.infolist():
                    if info.filename not in weights:
                        with package.open(info) as f, aligned_member(out, info.filename) as to:
                            hashed_copy(f, to)
        except zipfile.BadZipFile as error:
            raise ArtifactError(f"{archive.path}: {blob.member} is damaged: {error}", hint="compile again") from error
        made.replace(path)
    return path


def check_inputs(spec: Entry, inputs: list[Tensor]) -> None:
    """Compare inputs with an entry's types and sizes.

    Raises:
        InputError: They differ; sizes out of range are told with the range.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for want, got in zip(spec.inputs, inputs, strict=True):
        if not isinstance(got, Tensor):
            raise InputError(f"input {want.name!r} must be a tensor, not a {type(got).__name__}")
        if NAMES.get(got.dtype) != want.dtype:
            raise InputError(f"input {want.name!r} must be of type {want.dtype}, not {NAMES.get(got.dtype, got.dtype)}")
        if got.dim() != len(want.shape):
            raise InputError(f"input {want.name!r} must be {shape_text(want)}, not of shape {list(got.shape)}")
        for size, have in zip(want.shape, got.shape, strict=True):
            if isinstance(size, int):
                if size != have:
                    raise InputError(f"input {want.name!r} must be {shape_text(want)}, not of shape {list(got.shape)}")
                continue
            if size not in spec.dims:
                continue  # an expression of sizes that are checked themselves
            low, high = spec.dims[size]
            if not low <= have <= high:
                raise InputError(
                    f"{size} is {have}, and the artifact was compiled for {low} to {high}",
                    hint=f"compile again with --dynamic {size}={min(low, have)}..{max(high, have)}",
                )
            other, owner = sizes.setdefault(size, (have, want.name))
            if other != have:
                raise InputError(f"{size} is {other} in {owner!r} and {have} in {want.name!r}")


def shape_text(spec: TensorSpec) -> str:
    """``i64[batch, seq]``."""
    return f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"
