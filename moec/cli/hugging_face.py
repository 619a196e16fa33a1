"""Builds transformers models from local files. Nothing is ever downloaded, and no code from the folder is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from moec.cli.model import ModelError
from moec.ir.errors import nearest
from moec.random_weights import random_transformer


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise ModelError("transformers is not installed", hint="pip install 'moec[hf]'") from e
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def config_from(settings: dict[str, Any], file: Path) -> Any:
    """The configuration object that ``settings`` (a parsed ``config.json``) describe.

    Raises:
        ModelError: transformers is missing, does not know the model type, or refuses the values.
    """
    transformers = _transformers()
    known = transformers.CONFIG_MAPPING
    kind = settings["model_type"]
    if kind not in known:
        raise ModelError(
            f"{file}: model_type {kind!r} is unknown to transformers {transformers.__version__}; {_near(kind, known)}",
            hint="for a model of your own use package.module:factory",
        )
    values = {k: v for k, v in settings.items() if k not in ("model_type", "transformers_version")}
    try:
        return known[kind].from_dict(values)
    except Exception as e:
        raise ModelError(f"{file}: transformers refuses this configuration: {_first_line(e)}") from e


def _near(kind: object, known: Any) -> str:
    text = nearest(str(kind), known.keys())
    return text if text.startswith("did you mean") else "nothing is near"  # the list of all of them helps nobody


def _class_for(config: Any, file: Path) -> Any:
    transformers = _transformers()
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        if type(config) in auto._model_mapping:
            return auto
    raise ModelError(
        f"{file}: transformers has no text model for model_type {config.model_type!r}",
        hint="use package.module:factory and return (module, args, kwargs)",
    )


def vocabulary(config: Any, file: Path) -> int:
    """How many token ids the model knows."""
    text_config = config.get_text_config()
    size = getattr(text_config, "vocab_size", None)
    if not isinstance(size, int):
        raise ModelError(f"{file} has no vocab_size", hint="use package.module:factory")
    return size


def random_model(config: Any, dtype: torch.dtype | None, file: Path) -> torch.nn.Module:
    """A model with made-up weights, built without the slow initialisation.

    Raises:
        ModelError: The weights do not fit in this machine's memory, or the class refuses the configuration.
    """
    auto = _class_for(config, file)
    wanted = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            outline = auto.from_config(config, dtype=wanted)
    except Exception as e:
        raise ModelError(f"{file}: the model cannot be built: {_first_line(e)}") from e
    need = sum(p.numel() * p.element_size() for p in outline.parameters())
    have = _available_bytes()
    if need > have:
        raise ModelError(
            f"the weights of this model take {need / 1e9:.1f} GB and {have / 1e9:.1f} GB of memory are free",
            hint="lower num_hidden_layers in a copy of the config.json: one layer shows as much",
        )
    return random_transformer(auto, config, wanted)


def stored_model(folder: Path, config: Any, dtype: torch.dtype | None) -> torch.nn.Module:
    """The model with the weights that lie in ``folder``.

    Raises:
        ModelError: The weights cannot be read or do not fit the configuration.
    """
    auto = _class_for(config, folder)
    try:
        return auto.from_pretrained(folder, config=config, dtype=dtype or "auto", local_files_only=True)
    except Exception as e:
        raise ModelError(f"{folder}: the weights cannot be loaded: {_first_line(e)}") from e


def _available_bytes() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return float("inf")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
