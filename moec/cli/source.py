"""Turns the text MODEL of ``moec compile`` into a source: a model whose weights are read once its code is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moec.aot.dynamic import DEFAULT, Ranges, example_size, parse_dynamic
from moec.aot.source import Source, State, Tokens, for_experts
from moec.backends.triton.fp8 import refusal
from moec.backends.triton.launches.device import is_gpu
from moec.cli import hugging_face
from moec.cli.conversion import checkpoint_of
from moec.cli.model import ModelError, dtype_of, load_model, read_config
from moec.cli.quantized import dequantized, in_fp8, load_other, quantize

_EXAMPLE = (2, 12)  # sequences and tokens to trace with


def source_of(
    text: str,
    *,
    dtype: str | None,
    dynamic: str | None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
    weights: str = "inside",
    target: str = "cpu",
) -> tuple[Source, Ranges]:
    """The source that ``text`` names, and the ranges of its sizes. ``weights`` are inside, beside or none.

    Weights in fp8 stay so where kernels for ``target`` multiply fp8; elsewhere they are read as what they stand for.

    Raises:
        MoecError: Says what is wrong with ``text`` and what to do.
    """
    path = Path(text).expanduser()
    if path.suffix == ".pt2" and path.is_file():
        return _exported(path, dtype), parse_dynamic(dynamic or "")
    if not path.exists():
        loaded = load_model(text, dtype=dtype)
        return Source(text, for_experts(loaded.model), loaded.args, loaded.kwargs), parse_dynamic(dynamic or "")
    ranges = parse_dynamic(DEFAULT if dynamic is None else dynamic)
    return _hugging_face(path, text, dtype, ranges, random_weights, trust_remote_code, weights, target), ranges


def _exported(path: Path, dtype: str | None) -> Source:
    if dtype is not None:
        raise ModelError("an exported program has its types already", hint="leave --dtype out")
    try:
        program = torch.export.load(path)
    except Exception as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ModelError(f"{path} is no exported program that torch {torch.__version__} can load: {first}") from e
    return Source(str(path), None, program=program)


def _hugging_face(
    path: Path,
    text: str,
    dtype: str | None,
    ranges: Ranges,
    random_weights: bool,
    trust_remote_code: bool,
    where: str,
    target: str,
) -> Source:
    folder, file = (path, path / "config.json") if path.is_dir() else (path.parent, path)
    if not file.exists():
        raise ModelError(f"{path} has no config.json", hint="give the folder of a Hugging Face model")
    settings = read_config(file)
    stored = not random_weights and where != "none"
    if stored:
        if path.is_file():
            raise ModelError(f"{path} is a configuration, without weights", hint="add --random-weights")
        hugging_face.check_safetensors(folder)
    config = hugging_face.config_from(settings, file, folder if trust_remote_code else None)
    element = dtype_of(dtype) or getattr(config, "dtype", None) or torch.float32
    model = hugging_face.outline(config, element, file, trust_remote_code)
    narrow = in_fp8(config, file)
    kept = narrow and is_gpu(target) and not refusal("", target)
    if kept:
        quantize(model, config)
    example = _tokens(hugging_face.vocabulary(config, file), ranges)

    def weights() -> State:
        if random_weights:
            from moec.random_weights import made_up

            values = {id(parameter): value for _, parameter, value in made_up(model)}
            state = model.state_dict(keep_vars=True)
            return _prefixed({name: values.get(id(kept), kept) for name, kept in state.items()})
        if narrow:
            outline = quantize(hugging_face.outline(config, element, file, trust_remote_code), config)
            return _prefixed(dequantized(outline, checkpoint_of(folder, outline, ""), element))
        return _prefixed(hugging_face.stored_model(folder, config, element, trust_remote_code).state_dict())

    wrapped = Tokens(for_experts(model.eval()))
    source = Source(text, wrapped, (example,), {}, weights, folder if stored else None)
    source.made_up = random_weights
    if stored:
        source.checkpoint = checkpoint_of(folder, model, "model.")
        if kept:
            load_other(model, source.checkpoint, "model.")
        elif source.checkpoint.missing and where != "beside":
            source.checkpoint = None  # transformers makes something new of it while it loads
        elif source.checkpoint.missing:
            name, why = next(iter(source.checkpoint.missing.items()))
            raise ModelError(
                f"--weights beside cannot use {name.removeprefix('model.')!r} as it lies in {folder}: {why}",
                hint="use --weights inside",
            )
    return source


def _prefixed(state: Any) -> State:
    return {f"model.{name}": value for name, value in state.items()}


def _tokens(vocabulary: int, ranges: Ranges) -> torch.Tensor:
    spans = list(ranges.values())
    if len(spans) != 2:
        raise ModelError(f"--dynamic names {len(spans)} sizes; tokens have two", hint=f"such as {DEFAULT}")
    sizes = [example_size(span, wanted) for span, wanted in zip(spans, _EXAMPLE, strict=True)]
    return torch.randint(vocabulary, sizes, generator=torch.Generator().manual_seed(0))
