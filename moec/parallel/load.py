"""Weights from safetensors, of which a rank reads its share alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moec.aot.checkpoint import Checkpoint, Stored, read_headers
from moec.artifact.weights import DTYPES
from moec.parallel.plan import ParallelError


class Reader:
    """The tensors of a folder (or one file) of safetensors under a model's own names.

    Args:
        path: The folder or file.
        model: Whose weights they are; one of transformers is read under transformers' names for checkpoints.
    """

    def __init__(self, path: Path, model: torch.nn.Module) -> None:
        self.path = path
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise ParallelError(f"{path} holds no safetensors", hint="save the model with save_pretrained")
        self.found: Mapping[str, tuple[Stored, ...]]
        if path.is_dir() and hasattr(model, "base_model_prefix"):
            from moec.cli.conversion import checkpoint_of  # it needs transformers, which others do without

            checkpoint: Checkpoint = checkpoint_of(path, model, "")
            self.found, self.missing = checkpoint.places, checkpoint.missing
        else:
            self.found, self.missing = {n: (t,) for n, t in read_headers(files).items()}, {}

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of a weight; nothing else of it is read.

        Args:
            name: The model's own name.
            shape: Of the whole weight.
            dtype: What it becomes.
            start, stop: Part of the first dimension.

        Raises:
            ParallelError: It is not there, or of another shape.
        """
        places = self.found.get(name)
        if places is None:
            raise ParallelError(f"{self.path}: {self.missing.get(name, 'it has no tensor')}: {name}")
        stop = shape[0] if stop is None and shape else stop
        if len(places) == 1:
            if places[0].shape != tuple(shape):
                raise ParallelError(f"{self.path}: {name} is {list(places[0].shape)}, the model has {list(shape)}")
            return _read(places[0], start, stop).to(dtype)
        parts = len(places) // shape[0]  # gates of all experts before the ups
        experts = range(start, stop or 0)
        if not experts:
            return torch.empty((0, *shape[1:]), dtype=dtype)
        rows = [torch.cat([_read(places[p * shape[0] + e]) for p in range(parts)]) for e in experts]
        return torch.stack(rows).to(dtype)


def _read(place: Stored, start: int = 0, stop: int | None = None) -> Tensor:
    rows = place.shape[0] if place.shape else 1
    each = place.size // max(1, rows)
    stop = rows if stop is None else stop
    shape = (stop - start, *place.shape[1:]) if place.shape else ()
    if not stop - start or not each:
        return torch.empty(shape, dtype=DTYPES[place.dtype])
    pages = np.memmap(place.file, np.uint8, "r", place.offset + start * each, ((stop - start) * each,))
    return torch.from_numpy(np.array(pages)).view(DTYPES[place.dtype]).view(shape)
