"""``moec run out.moec``: an artifact on tokens or on arrays from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.console import emit
from moec.ir.errors import MoecError

if TYPE_CHECKING:
    from torch import Tensor

    from moec.artifact.manifest import TensorSpec


class RunError(MoecError):
    """What ``moec run`` was given does not fit together."""

    code = "run"


def run(
    artifact: Annotated[Path, typer.Argument(metavar="FILE.moec")],
    tokens: Annotated[
        list[str] | None, typer.Option(help="Token ids with commas between: one sequence. Once for every sequence.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--input", help="An .npz with an array for every input.")] = None,
    generate: Annotated[int | None, typer.Option(min=1, help="Add so many tokens, each the most likely one.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the outputs to this .npz.")] = None,
) -> None:
    """Run an artifact."""
    import torch

    from moec.artifact.generate import continued
    from moec.artifact.load import load

    if bool(tokens) == (file is not None):
        raise RunError("moec run takes either --tokens or --input")
    if generate is not None and not tokens:
        raise RunError("--generate continues --tokens")
    prompts = [_tokens(text) for text in tokens or ()]
    if generate is None and len(set(map(len, prompts))) > 1:
        raise RunError(
            "sequences of one call have the same length", hint="--generate takes prompts of different lengths"
        )
    loaded = load(artifact)
    if generate is not None:
        for row in continued(loaded, prompts, generate):
            emit(",".join(map(str, row)))
        return
    if prompts:
        made = loaded(torch.tensor(prompts))
    else:
        assert file is not None
        entry = loaded.entries.get("model")
        if entry is None:
            raise RunError(f"{artifact} was compiled for generating", hint="use --tokens and --generate")
        made = entry(*_arrays(file, entry.spec.inputs))
    outputs = {f"output{i}": o for i, o in enumerate(made if isinstance(made, tuple) else (made,))}
    if output is not None:
        _save(output, outputs)
    for name, value in outputs.items():
        emit(_line(name, value))
    if prompts and (first := next(iter(outputs.values()))).dim() == 3:
        emit(f"next token: {', '.join(str(int(t)) for t in first[:, -1].argmax(-1))}")


def _tokens(text: str) -> list[int]:
    words = [w.strip() for w in text.split(",")]
    if not all(w.isdecimal() for w in words):
        raise RunError(f"--tokens cannot be {text!r}", hint="write numbers from 0 up: 1,2,3")
    return [int(w) for w in words]


def _arrays(path: Path, specs: tuple[TensorSpec, ...]) -> list[Tensor]:
    """The inputs from an ``.npz``; no pickled object in it is read."""
    import numpy as np
    import torch

    from moec.artifact.weights import DTYPES

    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} cannot be read as .npz: {error}") from error
    missing = [s.name for s in specs if s.name not in found]
    if missing:
        raise RunError(f"{path} has no array {missing[0]!r}", hint="arrays in it: " + ", ".join(sorted(found)))
    return [torch.from_numpy(found[s.name]).to(DTYPES[s.dtype]) for s in specs]


def _save(path: Path, outputs: dict[str, Tensor]) -> None:
    import numpy as np

    def plain(value: Any) -> Any:
        return value.float().numpy() if value.is_floating_point() else value.numpy()  # numpy has no bf16

    try:
        with path.open("wb") as f:
            np.savez(f, **{name: plain(value) for name, value in outputs.items()})
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def _line(name: str, value: Any) -> str:
    from moec.artifact.weights import NAMES

    shape = ", ".join(map(str, value.shape))
    if not value.numel():
        return f"{name}: {NAMES[value.dtype]}[{shape}]"
    wide = value.double()
    return f"{name}: {NAMES[value.dtype]}[{shape}], mean {wide.mean():.6g}, largest {wide.abs().max():.6g}"
