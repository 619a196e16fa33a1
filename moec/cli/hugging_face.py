"""Builds transformers models from local files. Nothing is ever downloaded, and no code from the folder is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from moec.cli.conversion import checkpoint_of
from moec.cli.model import ModelError
from moec.cli.quantized import in_fp8, load_all, method_of, quantize
from moec.ir.errors import nearest
from moec.random_weights import fill_random, random_transformer
from moec.readiness import prepare

GENERATION = "generation_config.json"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise ModelError("transformers is not installed", hint="pip install 'moec[hf]'") from e
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def config_from(settings: dict[str, Any], file: Path, trusted: Path | None = None) -> Any:
    """The configuration object that ``settings`` (a parsed ``config.json``) describe.

    Args:
        settings: The parsed file.
        file: For messages.
        trusted: A folder whose own code may be run, or None: no code from a folder is run.

    Raises:
        ModelError: transformers is missing, does not know the model type, or refuses the values.
    """
    transformers = _transformers()
    known = transformers.CONFIG_MAPPING
    kind = settings["model_type"]
    if trusted is not None and "auto_map" in settings:
        return transformers.AutoConfig.from_pretrained(trusted, trust_remote_code=True, local_files_only=True)
    if kind not in known and "auto_map" in settings:
        raise ModelError(
            f"{file}: model_type {kind!r} comes with code of its own, which is not run",
            hint="if you trust it, moec compile takes --trust-remote-code",
        )
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


def _class_for(config: Any, file: Path, trusted: bool = False) -> Any:
    transformers = _transformers()
    if trusted and getattr(config, "auto_map", None):
        return transformers.AutoModelForCausalLM
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


def _dtype_for(config: Any, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or getattr(config, "dtype", None) or torch.float32


def on_meta(config: Any, dtype: torch.dtype | None, file: Path) -> torch.nn.Module:
    """A model without values, whatever its size.

    Raises:
        ModelError: The class refuses the configuration.
    """
    auto = _class_for(config, file)
    try:
        with torch.device("meta"):
            model: torch.nn.Module = auto.from_config(config, dtype=_dtype_for(config, dtype))
    except Exception as e:
        raise ModelError(f"{file}: the model cannot be built: {_first_line(e)}") from e
    return model


def random_model(config: Any, dtype: torch.dtype | None, file: Path) -> torch.nn.Module:
    """A model with made-up weights, built without the slow initialisation.

    Raises:
        ModelError: The weights do not fit in this machine's memory, or the class refuses the configuration.
    """
    narrow = in_fp8(config, file)
    element = _dtype_for(config, dtype)
    sketch = quantize(outline(config, element, file), config) if narrow else on_meta(config, dtype, file)
    need = sum(p.numel() * p.element_size() for p in sketch.parameters())
    have = _available_bytes()
    if need > have:
        raise ModelError(
            f"the weights of this model take {need / 1e9:.1f} GB and {have / 1e9:.1f} GB of memory are free",
            hint="lower num_hidden_layers in a copy of the config.json: one layer shows as much",
        )
    if narrow:
        return _runnable(fill_random(sketch))
    return random_transformer(_class_for(config, file), config, element)


def outline(config: Any, dtype: torch.dtype, file: Path, trusted: bool = False) -> torch.nn.Module:
    """A model whose weights are memory that nobody has touched: it takes no memory yet, whatever its size.

    Raises:
        ModelError: The class refuses the configuration.
    """
    auto = _class_for(config, file, trusted)
    from transformers.initialization import no_init_weights

    options = {"trust_remote_code": True} if trusted else {}
    try:
        with no_init_weights():
            model = auto.from_config(config, dtype=dtype, **options)
        if (file.parent / GENERATION).is_file():  # where a checkpoint says which tokens end a text
            settings = _transformers().GenerationConfig.from_pretrained(file.parent, local_files_only=True)
            model.generation_config = settings
    except Exception as e:
        raise ModelError(f"{file}: the model cannot be built: {_first_line(e)}") from e
    model.tie_weights()
    return model


def check_safetensors(folder: Path) -> None:
    """Refuse a folder without safetensors: other formats are pickles, which run code when they are read.

    Raises:
        ModelError: It holds none.
    """
    if next(folder.glob("*.safetensors"), None) is None:
        pickles = next(folder.glob("*.bin"), None)
        what = f"{folder} holds its weights as pickles ({pickles.name})" if pickles else f"{folder} holds no weights"
        hint = "save the model again with save_pretrained" if pickles else "add --random-weights"
        raise ModelError(what, hint=hint)


def stored_model(folder: Path, config: Any, dtype: torch.dtype | None, trusted: bool = False) -> torch.nn.Module:
    """The model with the weights that lie in ``folder``; those in fp8 stay so.

    Raises:
        ModelError: The weights cannot be read or do not fit the configuration.
    """
    if in_fp8(config, folder):
        model = quantize(outline(config, _dtype_for(config, dtype), folder / "config.json", trusted), config)
        return _runnable(load_all(model, checkpoint_of(folder, model, "")))
    auto = _class_for(config, folder, trusted)
    options = {"trust_remote_code": True} if trusted else {}
    try:
        return auto.from_pretrained(folder, config=config, dtype=dtype or "auto", local_files_only=True, **options)
    except Exception as e:
        method = method_of(config)
        hint = f"they are quantized ({method}): save them in bf16, where transformers can load them" if method else None
        raise ModelError(f"{folder}: the weights cannot be loaded: {_first_line(e)}", hint=hint) from e


def _runnable(model: torch.nn.Module) -> torch.nn.Module:
    """A model in fp8 that runs here: transformers' own forwards want kernels that are downloaded for a GPU."""
    prepare(model, implementation=None, regions=False)
    return model


def _available_bytes() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return float("inf")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
