"""What is compiled: a module with example inputs and where its weights come from later."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from moec.aot.checkpoint import Checkpoint
from moec.aot.dynamic import Ranges, shapes
from moec.aot.errors import AotError
from moec.ir.errors import MoecError
from moec.random_weights import MadeUp
from moec.readiness import prepare

State = Mapping[str, Tensor | MadeUp]
"""Weights by name."""


class Tokens(nn.Module):
    """A causal language model as a function of its tokens alone: ``input_ids [batch, seq]`` to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits ``[batch, seq, vocabulary]``."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


@dataclass
class Source:
    """A model to compile.

    Attributes:
        text: What the user called it.
        module: Its weights' values do not matter while it is compiled; their memory may be untouched.
        args, kwargs: Example inputs.
        weights: Called once the code is compiled: tensors by their names in ``module``. None: those of ``module``.
        folder: The Hugging Face folder that it comes from.
        program: An exported program instead of a module.
        checkpoint: Where the weights lie in the folder.
        made_up: The weights are random numbers.
    """

    text: str
    module: nn.Module | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[], State] | None = None
    folder: Path | None = None
    program: ExportedProgram | None = None
    checkpoint: Checkpoint | None = None
    made_up: bool = False


def for_experts(model: nn.Module) -> nn.Module:
    """Have a model run its experts in a form that exports, in place.

    Those that follow transformers' interface become batched GEMMs on indexed weights, which torch alone runs. Modules
    of a class that ``moec.prepare`` rewrites get the rewritten forward; its GEMMs are there for the passes to raise.
    """
    prepare(model, implementation=None, regions=False)
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("batched_mm")
    return model


def export(source: Source, ranges: Ranges) -> ExportedProgram:
    """The source as an exported program.

    Raises:
        AotError: It cannot be exported; the message is torch's first line.
    """
    if source.program is not None:
        if ranges:
            raise AotError("an exported program has its dynamic sizes already", hint="leave --dynamic out")
        return source.program
    module = source.module
    assert module is not None
    dynamic = shapes(ranges, _named(module, source))
    return exported(module.eval(), source.text, source.args, source.kwargs, dynamic)


def exported(
    module: nn.Module, text: str, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> ExportedProgram:
    """``torch.export.export`` with errors told.

    Raises:
        AotError: It cannot be exported; the message is torch's first line.
    """
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except MoecError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AotError(
            f"{text} cannot be exported by torch.export: {type(error).__name__}: {first}",
            hint="run again with --traceback to see where",
        ) from error


def _named(module: nn.Module, source: Source) -> list[tuple[str, Any]]:
    """The inputs by the names of the module's parameters, in their order."""
    try:
        bound = inspect.signature(module.forward).bind(*source.args, **source.kwargs)
    except TypeError as error:
        raise AotError(f"{source.text} does not take its example inputs: {error}") from error
    return list(bound.arguments.items())
