"""``moec inspect out.moec``: what an artifact holds. Nothing of it is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from moec.cli.console import emit, out
from moec.ir.errors import MoecError
from moec.sizes import size_text

if TYPE_CHECKING:
    from moec.artifact.archive import Archive


def inspect(
    artifact: Annotated[Path, typer.Argument(metavar="FILE.moec")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
    ir: Annotated[bool, typer.Option("--ir", help="Print the IR of the program after the passes.")] = False,
    extract: Annotated[
        Path | None, typer.Option(help="Write the members to this folder, which must be empty or new.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the hashes of everything, weights too.")] = False,
) -> None:
    """Say what an artifact holds, without running anything of it."""
    from moec.artifact.archive import Archive

    with Archive(artifact) as archive:
        if verify:
            from moec.artifact.weights import check_all

            check_all(archive, again=True)
        if extract is not None:
            _extract(archive, extract)
        if as_json:
            emit(archive.manifest.to_json())
        elif ir:
            for name in archive.manifest.entries:
                emit(archive.read(f"ir/{name}.after.moe").decode("utf-8", errors="replace"))
        else:
            _show(archive)
        if verify:
            emit("every hash is right")


def _extract(archive: Archive, folder: Path) -> None:
    """Write members below ``folder``; their names were checked when the archive was opened."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise MoecError(f"{folder} is not empty", hint="give a new folder")
        for name in archive.manifest.members:
            archive.check(name)
            to = folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            archive.copy(name, to)
    except OSError as error:
        raise MoecError(f"{folder} cannot be written: {error.strerror or error}") from error


def _show(archive: Archive) -> None:
    from moec.artifact.load import shape_text

    manifest = archive.manifest
    for label, text in (
        ("model", manifest.model),
        ("target", manifest.target),
        ("made by", f"moec {manifest.moec_version}, torch {manifest.torch_version}"),
        ("passes", manifest.passes),
    ):
        out().print(Text.assemble((f"{label}: ", "bold"), text), soft_wrap=True)
    for name, entry in manifest.entries.items():
        takes = ", ".join(f"{s.name}: {shape_text(s)}" for s in entry.inputs)
        gives = ", ".join(shape_text(s) for s in entry.outputs)
        dims = ", ".join(f"{d} {low} to {high}" for d, (low, high) in entry.dims.items())
        line = f"{takes} -> {gives}{f'; {dims}' if dims else ''}"
        out().print(Text.assemble((f"entry {name}: ", "bold"), line), soft_wrap=True)
    weights = manifest.weights
    total = sum(t.size for t in weights.tensors.values()) + sum(
        t.size * len(t.addresses) for t in weights.tables.values()
    )
    count = len(weights.tensors) + len(weights.tables)
    where = "left out" if weights.where == "none" else weights.where
    line = f"{count} tensors, {size_text(total)}, {where}"
    out().print(Text.assemble(("weights: ", "bold"), line), soft_wrap=True)
    for file in weights.files.values():
        if file.path:
            out().print(f"  {file.path}, {size_text(file.size)}", markup=False, soft_wrap=True)
    for licence in manifest.licences:
        where = f" ({licence.member})" if licence.member else ""
        out().print(Text.assemble(("licence of ", "bold"), f"{licence.part}: {licence.licence}{where}"), soft_wrap=True)
    for blob in manifest.blobs:
        if blob.kind == "triton":
            from moec.artifact.gpu import read_kernels
            from moec.cli.gpu_tables import kernel_table, launch_table

            told = read_kernels(archive, blob)
            out().print(launch_table([(p["name"], p["launches"]) for p in told["programs"] if p["launches"]]))
            out().print(kernel_table(told))
    table = Table(title="members", title_justify="left", title_style="bold")
    table.add_column("name", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("sha256", overflow="fold")
    for name, member in manifest.members.items():
        table.add_row(Text(name), size_text(member.size), member.sha256[:16])
    out().print(table)
