"""What Python code calls: compile a model, explain a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.missed import add_missed
from moec.options import CompileOptions
from moec.predicted import add_predictions
from moec.report import Report
from moec.runtime.checks import MoecWarning
from moec.session import recording


def compile(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | None = None,
    passes: str | None = None,
    prepare: bool = True,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> Any:
    """Compile a model through the ``torch.compile`` door.

    Args:
        model: Any module; a transformers model is readied first (:func:`moec.prepare`).
        args: Example inputs. With them (or ``kwargs``) the model is called once, so that it is compiled on return.
        kwargs: Example keyword inputs.
        target: Target text (``"cpu"``).
        passes: Pipeline text or name.
        prepare: Ready the model before capture. The model is changed by it; ``moec.prepare(model).undo()`` undoes it.
        dynamic: As in ``torch.compile``.
        fullgraph: As in ``torch.compile``: a graph break is an error.
        **options: Further fields of :class:`moec.options.CompileOptions`.

    Returns:
        The compiled module, to be called as the model is.

    Raises:
        MoecError: Bad options.
    """
    given = {**options, **({"target": target} if target else {}), **({"passes": passes} if passes else {})}
    checks = CompileOptions.from_dict(given).checks  # a bad option is told now, not at the first call
    if prepare:
        from moec.readiness import prepare as ready
        from moec.readiness.adapters import holds_adapter
        from moec.readiness.rewriters import verdict

        report = ready(model)
        # Graphs break where these run: no graph shows the block, and nothing else would name it.
        for left in report.ignored:
            module = model.get_submodule(left.name)
            if verdict(module) is not None and holds_adapter(module) and checks != "off":
                text = f"MoE block {left.name!r} runs as PyTorch would run it: {left.reason}"
                warnings.warn(text, MoecWarning, stacklevel=2)
    compiled = torch.compile(model, backend="moec", dynamic=dynamic, fullgraph=fullgraph, options=given)
    if args or kwargs:
        with torch.no_grad():
            compiled(*args, **dict(kwargs or {}))
    return compiled


def explain(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Say what moec finds in a model and does with it, without compiling what is not MoE.

    The model is traced as ``torch.compile`` would trace it and run once, in eager mode around the MoE blocks. Experts
    modules that no traced graph shows are listed too, with the reason.

    Args:
        model: Any module.
        args: Example inputs.
        kwargs: Example keyword inputs.
        **options: Fields of :class:`moec.options.CompileOptions` (``passes``, ``backends``, ...).

    Returns:
        The report: ``.layers``, ``.remarks``, ``.to_json()``; printing it shows the table.

    Raises:
        MoecError: Bad options.
    """
    given = {"checks": "off", **options, "inner": "eager"}
    chosen = CompileOptions.from_dict(given)
    torch._dynamo.reset()
    with recording() as report, torch.no_grad():
        torch.compile(model, backend="moec", options=given)(*args, **dict(kwargs or {}))
    torch._dynamo.reset()
    add_missed(report, model)
    add_predictions(report, chosen.target, chosen.threads or torch.get_num_threads(), chosen.threads is not None)
    return report
