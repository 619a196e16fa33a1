"""The demo from end to end: build, explain, check, time."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from moec.api import compile as moec_compile
from moec.api import explain
from moec.cli.console import emit, err, out
from moec.demo import check, timing
from moec.demo.model import FULL, SMALL, Shape, build, twin, weight_bytes
from moec.ir.errors import MoecError
from moec.report import Report


class DemoError(MoecError):
    """The demo's own check failed: the compiled model does not compute what the eager one does."""

    code = "demo-check"


@torch.no_grad()
def run(*, small: bool = False, tokens: int | None = None) -> None:
    """Runs the demo and prints it.

    Args:
        small: The narrow model.
        tokens: Length of the prefill.

    Raises:
        DemoError: A numeric check failed.
        MoecError: transformers is missing.
    """
    shape = SMALL if small else FULL
    count = shape.tokens if tokens is None else tokens
    model = _build(shape)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(shape.vocabulary, (1, count), generator=generator)

    with _step("compile for a look inside"):
        report = explain(twin(model), (), {"input_ids": input_ids, "use_cache": False})
    _show(report)

    with _step("check one layer's experts against a loop in fp32"):
        compiled_experts = torch.compile(twin(model).model.layers[0].mlp.experts, backend="moec")
        experts = check.check_experts(model, compiled_experts, input_ids[:, : check.TOKENS])
    _say(
        f"experts at fixed routing, {experts.tokens} tokens: largest error {experts.compiled:.2%} "
        f"of the largest output (eager's own: {experts.eager:.2%}) {_verdict(experts.ok)}"
    )

    times, whole, inductor = _time(model, input_ids, shape)
    _say(
        f"whole model, last {whole.tokens} tokens: {whole.near_ties} near a routing tie; the others' logits within "
        f"{whole.largest:.2%} of the largest (Inductor: {inductor.largest:.2%}); "
        f"same next token for {whole.same_choice} (Inductor: {inductor.same_choice}) {_verdict(whole.ok)}"
    )
    out().print(_table(times, count))
    if not (experts.ok and whole.ok):
        raise DemoError(
            "the compiled model does not compute what the eager one does",
            hint=f"tolerances: experts {check.EXPERTS_TOLERANCE:.0%}, logits {check.LOGITS_TOLERANCE:.0%}",
        )


def _inductor(model: Any) -> Any:
    return torch.compile(model)


def _moec(model: Any) -> Any:
    return moec_compile(model)


def _build(shape: Shape) -> Any:
    console = err()
    start = time.perf_counter()
    if console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(f"build a {shape.label} model", total=None)
            model = build(shape, lambda name, size: progress.advance(task, size))
    else:
        model = build(shape)
    parameters = sum(p.numel() for p in model.parameters())
    _done(f"build a {shape.label} model", start)
    _say(
        f"{shape.label}: {shape.layers} layers, hidden {shape.hidden}, "
        f"{shape.experts} experts of {shape.intermediate}, top-{shape.top_k}; "
        f"{parameters / 1e9:.2f}e9 parameters, {weight_bytes(model) / 1e9:.2f} GB of random bf16"
    )
    return model


def _show(report: Report) -> None:
    out().print(report.table())
    for line in report.lines():
        _say(line)
    block = next((b for b in report.layers if b.fused), None)
    if block is None:
        raise DemoError("no MoE block was fused", hint="the remarks above say why")
    emit(f"\n// {block.name}, as raised\n{block.ir_before.rstrip()}\n\n// as compiled\n{block.ir_after.rstrip()}\n")


def _time(
    model: Any, input_ids: torch.Tensor, shape: Shape
) -> tuple[list[timing.Times], check.ModelCheck, check.ModelCheck]:
    with _step("prepare a decode step"):
        decode = timing.Decode(model, input_ids)
        near = check.near_ties(decode.router_logits, shape.top_k)[-timing.LOGITS_KEPT :]
    times = []
    with _step("time eager"):
        eager, expected = timing.measure("eager", model, input_ids, decode)
        times.append(eager)
    with _step("compile and time torch.compile (Inductor)"):
        torch._dynamo.reset()
        inductor, other = timing.measure("inductor", _inductor(twin(model)), input_ids, decode)
        times.append(inductor)
    with _step("compile and time moec"):
        torch._dynamo.reset()
        compiled, got = timing.measure("moec", _moec(twin(model)), input_ids, decode)
        times.append(compiled)
    return times, check.check_model(expected, got, near), check.check_model(expected, other, near)


def _table(times: Sequence[timing.Times], count: int) -> Table:
    table = Table(title="times", title_justify="left", title_style="bold")
    table.add_column("")
    for column in (f"prefill of {count} tokens", "against eager", "decode step", "against eager", "first calls"):
        table.add_column(column, justify="right")
    base = times[0]
    for t in times:
        table.add_row(
            t.name,
            f"{t.prefill * 1e3:.1f} ms",
            f"{base.prefill / t.prefill:.2f} x",
            f"{t.decode * 1e3:.1f} ms",
            f"{base.decode / t.decode:.2f} x",
            f"{t.first:.1f} s",
        )
    inductor, moec = times[1], times[2]
    table.caption = (
        f"moec against Inductor: prefill {inductor.prefill / moec.prefill:.2f} x, "
        f"decode {inductor.decode / moec.decode:.2f} x. More than 1 is faster; medians, "
        f"{torch.get_num_threads()} threads."
    )
    return table


@contextmanager
def _step(label: str) -> Iterator[None]:
    console: Console = err()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")
        if console.is_terminal:
            with console.status(label):
                yield
        else:
            yield
    _done(label, start)


def _done(label: str, start: float) -> None:
    err().print(f"[{time.perf_counter() - start:6.1f} s] {label}", markup=False)


def _say(text: str) -> None:
    out().print(Text(text), soft_wrap=True)
    sys.stdout.flush()  # in order with the progress on stderr, also into a file


def _verdict(ok: bool) -> str:
    return "- ok" if ok else "- NOT ok"
