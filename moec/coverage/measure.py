"""From a family to its row, stage by stage, so that what fails in one stage hides nothing of the others."""

from __future__ import annotations

import copy
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from moec.coverage.compare import GRADIENT_TOLERANCE, TOLERANCE, error_of, gradient_error, output_of, worse
from moec.coverage.families import Family
from moec.coverage.row import NO, NONE, YES, Row
from moec.coverage.study import Run, Study, layers_of, ran_in
from moec.coverage.tiny import build
from moec.missed import add_missed
from moec.runtime import counters

_LOG = logging.getLogger(__name__)
_LONGEST_REASON = 300
_SILENT = "moec gives no reason"
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/:'\"]+/)+")


def measure(family: Family, backends: tuple[str, ...] = ("cpu", "aten")) -> Iterator[Row]:
    """The row of a family, again after every stage: the last one is the whole answer.

    A stage that raises leaves its columns empty and a reason.

    Args:
        family: Which.
        backends: Which of moec's backends may claim ops.
    """
    row = Row(family.name, bool(family.decorated))
    begun = time.perf_counter()
    study = _begin(family, row, backends)
    row.seconds = time.perf_counter() - begun
    yield row
    if study is None:
        return
    stages: tuple[tuple[str, Callable[[Study, Row], None]], ...] = (
        ("prefill", _prefill),
        ("decode", _decode),
        ("training", _train),
    )
    for name, stage in stages:
        if name != "prefill" and row.fused == 0:
            return  # the rest would be PyTorch's
        try:
            study.fresh()
            stage(study, row)
        except Exception as e:  # noqa: BLE001 - Dynamo, the family and moec all run in here; the row says what failed
            row.reasons.append(f"{name}: {reason_of(e)}")
        row.seconds = time.perf_counter() - begun
        yield row


def _begin(family: Family, row: Row, backends: tuple[str, ...]) -> Study | None:
    """The small model, tried once; None, and a reason, where the family's own code fails."""
    try:
        tiny = build(family)
        row.entry, row.parameters = tiny.entry, tiny.parameters
        study = Study(tiny, backends)
        study.find_inputs()
    except Exception as e:  # noqa: BLE001 - whatever the family raises is its row's reason
        row.reasons.append(f"no small model: {reason_of(e)}")
        return None
    row.found = len(study.blocks)
    if row.found < (there := len(tiny.blocks())):
        row.reasons.append(f"{row.found} of its {there} MoE blocks run on text; the others are left out here")
    if study.ties:
        row.reasons.append(f"near ties in all inputs tried ({study.ties}): errors may be no errors")
    return study


def reason_of(error: Exception) -> str:
    """An error as one line, without the paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if first.endswith(":") and len(lines) > 1:  # "backend='moec' raised:"
        first = f"{first} {lines[1]}"
    return clean(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def clean(text: str) -> str:
    """One line of bounded length without the paths of this machine."""
    text = _FOLDERS.sub("", " ".join(text.split()))
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"


def _prefill(study: Study, row: Row) -> None:
    inputs = study.inputs()
    with torch.no_grad():
        want, _ = study.watched(inputs)
        row.own_breaks = study.own_breaks(inputs)
        run = study.run(inputs)
    row.breaks = run.breaks
    row.error = error_of(run.output, want)
    _fill_blocks(study, row, run)
    if not row.equal:
        row.reasons.append(f"prefill: the output is off by {row.error:.1e}")


def _fill_blocks(study: Study, row: Row, run: Run) -> None:
    layers = {block: layers_of(block, run.report) for block in study.blocks}
    row.recognised = sum(any(layer.recognised for layer in found) for found in layers.values())
    row.fused = sum(
        bool(found) and all(layer.fused for layer in found) and ran_in(block, "moec::experts", run.ran)
        for block, found in layers.items()
    )
    told = [layer for found in layers.values() for layer in found]
    row.routers = _unique(layer.router for layer in told if layer.router)
    row.experts = _unique(layer.experts for layer in told if layer.experts)
    row.backends = _unique(layer.backend for layer in told if layer.backend)
    row.how = _how(study, row)
    if not row.all_fused:
        add_missed(run.report, study.model)
        row.reasons += _told(run) or _unique(clean(r) for r in run.report.remarks) or [_SILENT]


def _how(study: Study, row: Row) -> str:
    if row.decorated:
        return "interface"
    if not row.fused:
        return "refused"
    return "rewritten" if study.prepared.rewritten else "as written"


def _decode(study: Study, row: Row) -> None:
    if study.tiny.images:
        row.decode = NONE
        return
    with torch.no_grad():
        cache, step = study.cache()
        if cache is None:
            row.decode = NONE
            return
        want, blocks = study.watched({**step, "past_key_values": cache})
        cache, step = study.cache()
        run = study.run({**step, "past_key_values": cache})
    error = error_of(run.output, want)
    if error > TOLERANCE:
        row.reasons.append(f"decode: the output is off by {error:.1e}")
    ran = sum(ran_in(block, "moec::experts", run.ran) for block in blocks)
    if row.all_fused and ran < len(blocks):
        row.reasons.append(f"decode: {ran} of {len(blocks)} blocks are fused: {'; '.join(_told(run)) or _SILENT}")
    enough = ran == len(blocks) if row.all_fused else ran > 0
    row.decode = YES if error <= TOLERANCE and enough else NO


def _train(study: Study, row: Row) -> None:
    inputs = study.inputs()
    reference, model = study.reference.train(), study.model.train()
    output, blocks = study.watched(inputs)
    _loss(output).backward()
    run = study.run(inputs)
    _loss(run.output).backward()
    ran = counters.snapshot().by_label  # with the backward's
    want, got = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (reference, model))
    error, where = gradient_error(got, want)
    if error > GRADIENT_TOLERANCE and (exact := _exact_gradients(study, inputs)) is not None:
        error, where = gradient_error(got, exact) if worse(got, want, exact) else (0.0, "")
    if error > GRADIENT_TOLERANCE:
        row.reasons.append(f"training: the gradient of {where} is off by {error:.1e}")
    backward = sum(ran_in(block, "moec::experts_backward", ran) for block in blocks)
    if row.all_fused and backward < len(blocks):
        row.reasons.append(
            f"training: {backward} of {len(blocks)} blocks are fused: {'; '.join(_told(run)) or _SILENT}"
        )
    row.training = YES if error <= GRADIENT_TOLERANCE and backward >= (row.fused or 0) else NO


def _exact_gradients(study: Study, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """Gradients of the untouched model in float64; None for a family whose code is not made for that."""
    model = copy.deepcopy(study.tiny.model).double().train()
    try:
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # torch's grouped GEMM has no float64
        output_of(model(**inputs)).square().mean().backward()
    except Exception as e:  # noqa: BLE001 - whatever the family raises, float32 is the reference then, and it is said
        _LOG.info("no gradients in float64: %s", reason_of(e))
        return None
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _loss(output: torch.Tensor) -> torch.Tensor:
    return output.float().square().mean()


def _told(run: Run) -> list[str]:
    """Why blocks are not fused, in the words of moec's report."""
    return _unique(clean(layer.reason) for layer in run.report.layers if layer.reason)


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
