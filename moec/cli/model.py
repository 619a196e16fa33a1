"""Turns the text MODEL of a command line into a model and an example input, or says clearly why it cannot."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moec.ir.errors import MoecError, nearest

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_DTYPE_ALIASES = {"fp32": "f32", "float32": "f32", "bfloat16": "bf16", "fp16": "f16", "float16": "f16"}
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class ModelError(MoecError):
    """The text MODEL does not lead to a model."""

    code = "model"


@dataclass
class LoadedModel:
    """A model in eval mode and the example input to trace it with."""

    model: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def load_model(
    text: str, *, batch: int = 1, seq: int = 16, dtype: str | None = None, random_weights: bool = False
) -> LoadedModel:
    """The model that ``text`` names.

    Args:
        text: A Hugging Face folder, a ``config.json``, or ``package.module:factory``. The factory takes no arguments
            and returns a module, ``(module, args)`` or ``(module, args, kwargs)``; a module alone gets random token ids
            as ``input_ids``.
        batch: Sequences in the example input.
        seq: Tokens a sequence.
        dtype: ``f32``, ``bf16``, ``f16``; None keeps the model's own.
        random_weights: Make the weights up.

    Raises:
        ModelError: Says what is wrong with ``text`` and what to do.
    """
    element = dtype_of(dtype)
    path = Path(text).expanduser()
    if path.exists():
        return _from_path(path, batch, seq, element, random_weights)
    if _FACTORY.match(text):
        loaded = _from_factory(text, batch, seq)
        loaded.model = loaded.model.eval() if element is None else loaded.model.eval().to(element)
        return loaded
    if ":" in text and os.sep not in text:
        raise ModelError(f"{text!r} names no factory", hint="write package.module:factory")
    raise ModelError(
        f"there is no file or folder {text!r}",
        hint="MODEL is a local Hugging Face folder, its config.json (with --random-weights), or "
        "package.module:factory; nothing is downloaded",
    )


def dtype_of(name: str | None) -> torch.dtype | None:
    """The element type called ``name``.

    Raises:
        ModelError: There is none.
    """
    if name is None:
        return None
    short = _DTYPE_ALIASES.get(name, name)
    if short not in DTYPES:
        raise ModelError(f"unknown dtype {name!r}; {nearest(name, DTYPES)}", hint="dtypes: " + ", ".join(DTYPES))
    return DTYPES[short]


def _from_factory(text: str, batch: int, seq: int) -> LoadedModel:
    module_name, _, attribute = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # like `python -m`: modules beside the user are found
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name and (module_name == e.name or module_name.startswith(e.name + ".")):
            raise ModelError(
                f"there is no module {e.name!r}", hint="run moec where it can be imported, or set PYTHONPATH"
            ) from e
        raise ModelError(f"module {module_name!r} needs {e.name!r}, which is not installed") from e
    except Exception as e:
        raise ModelError(f"importing {module_name!r} raises {type(e).__name__}: {e}", hint=_USE_TRACEBACK) from e
    for part in attribute.split("."):
        if not hasattr(owner, part):
            names = [n for n in vars(owner) if not n.startswith("_") and callable(getattr(owner, n))]
            raise ModelError(f"{module_name!r} has no {part!r}; {nearest(part, names)}")
        owner = getattr(owner, part)
    if not callable(owner):
        raise ModelError(f"{text} is a {type(owner).__name__}, not a function that makes a model")
    try:
        made = owner()
    except Exception as e:
        raise ModelError(f"{text}() raises {type(e).__name__}: {e}", hint=_USE_TRACEBACK) from e
    return _with_inputs(made, text, batch, seq)


_USE_TRACEBACK = "run again with --traceback to see where"


def _with_inputs(made: Any, text: str, batch: int, seq: int) -> LoadedModel:
    parts = made if isinstance(made, tuple) else (made,)
    if not parts or len(parts) > 3 or not isinstance(parts[0], torch.nn.Module):
        kinds = ", ".join(type(p).__name__ for p in parts)
        raise ModelError(
            f"{text}() returns ({kinds})" if isinstance(made, tuple) else f"{text}() returns a {kinds}",
            hint="return a torch.nn.Module, (module, args) or (module, args, kwargs)",
        )
    if len(parts) == 1:
        config = getattr(parts[0], "config", None)
        vocabulary = getattr(config, "vocab_size", None)
        if not isinstance(vocabulary, int):
            raise ModelError(
                f"{text}() returns a module alone, and what to call it with is not known",
                hint="return (module, args) or (module, args, kwargs)",
            )
        return LoadedModel(parts[0], (), _token_ids(vocabulary, batch, seq))
    args = parts[1] if isinstance(parts[1], tuple | list) else (parts[1],)
    kwargs = parts[2] if len(parts) == 3 else {}
    if not isinstance(kwargs, Mapping):
        raise ModelError(f"{text}() returns keyword arguments that are a {type(kwargs).__name__}, not a dict")
    return LoadedModel(parts[0], tuple(args), dict(kwargs))


def _token_ids(vocabulary: int, batch: int, seq: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(vocabulary, (batch, seq), generator=generator)}


def _from_path(path: Path, batch: int, seq: int, dtype: torch.dtype | None, random_weights: bool) -> LoadedModel:
    folder, file = (path, path / "config.json") if path.is_dir() else (path.parent, path)
    if not file.exists():
        raise ModelError(f"{path} has no config.json", hint="give the folder of a Hugging Face model")
    settings = read_config(file)
    if not random_weights:
        has_weights = any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)
        if path.is_file() or not has_weights:
            what = f"{path} is a configuration, without weights" if path.is_file() else f"{path} holds no weights"
            raise ModelError(what, hint="add --random-weights")
    from moec.cli import hugging_face

    config = hugging_face.config_from(settings, file)
    if random_weights:
        model = hugging_face.random_model(config, dtype, file)
    else:
        model = hugging_face.stored_model(folder, config, dtype)
    inputs = _token_ids(hugging_face.vocabulary(config, file), batch, seq)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return LoadedModel(model.eval(), (), {**inputs, "use_cache": False})


def read_config(file: Path) -> dict[str, Any]:
    """A ``config.json``.

    Raises:
        ModelError: It cannot be read, or is none.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"{file} cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise ModelError(f"{file} is no text file", hint="give a Hugging Face folder or its config.json") from e
    except json.JSONDecodeError as e:
        raise ModelError(f"{file} is no JSON: line {e.lineno}, column {e.colno}: {e.msg}") from e
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ModelError(f"{file} has no model_type", hint="give the config.json of a Hugging Face model")
    return settings
