"""The stages of a compile: export, passes, kernels, AOTInductor, weights, archive."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch.export import ExportedProgram

from moec.aot.code import compile_code
from moec.aot.dynamic import Ranges
from moec.aot.errors import AotError, NoBlockError
from moec.aot.generation import export_pair, generation_facts
from moec.aot.layers import layer_object
from moec.aot.lowering import Embedding
from moec.aot.optimize import optimize
from moec.aot.source import Source, Tokens, export
from moec.aot.state import state_of
from moec.aot.write import EntryParts, Parts, write_artifact
from moec.backends.cpu.aot import archive
from moec.backends.triton.launches.device import is_gpu
from moec.options import CompileOptions
from moec.report import Report
from moec.session import publish


class Told(Protocol):
    """Hears the stage, what of it is being done, and where that can be counted: how many of how many are done."""

    def __call__(self, stage: str, detail: str, done: int = 0, of: int = 0) -> None: ...


def _unheard(stage: str, detail: str, done: int = 0, of: int = 0) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class AotOptions:
    """What a compile may be told.

    Attributes:
        compile: Passes, target and what helps to look inside.
        dynamic: Ranges of the sizes that vary.
        weights: ``inside``, ``beside``, or ``none``: code alone, to look at.
        generate: Make a prefill and a decode entry.
        tune: For a GPU: measure launches on the one that is here, and take the fastest.
        processes: For a GPU: how many compile kernels at once.
    """

    compile: CompileOptions = field(default_factory=CompileOptions)
    dynamic: Ranges = field(default_factory=dict)
    weights: str = "inside"
    generate: bool = False
    tune: bool = False
    processes: int = 1


@dataclass
class Built:
    """What came of a compile.

    Attributes:
        seconds: By stage.
        cached: The code was in the cache.
        report: What was found and fused.
    """

    path: Path
    bytes: int
    seconds: dict[str, float]
    cached: bool
    report: Report
    kernels: int


class Stages:
    """Times of the stages, and who hears of them."""

    def __init__(self, told: Told) -> None:
        self.seconds: dict[str, float] = {}
        self._told = told
        self._stage, self._since = "", time.perf_counter()

    def begin(self, stage: str, detail: str = "") -> None:
        """A stage begins; the one before is over."""
        self.end()
        self._stage, self._since = stage, time.perf_counter()
        self._told(stage, detail)

    def detail(self, text: str) -> None:
        """What of the stage is being done."""
        self._told(self._stage, text)

    def progress(self, done: int, of: int) -> None:
        """How much of the stage is done."""
        self._told(self._stage, f"{done} of {of}", done, of)

    def end(self) -> None:
        """No stage is running."""
        if self._stage:
            passed = time.perf_counter() - self._since
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + passed
        self._stage = ""


def build(source: Source, output: Path, options: AotOptions, told: Told = _unheard) -> Built:
    """Compile ``source`` to the artifact ``output``.

    Raises:
        MoecError: The model cannot be exported or compiled, or the file cannot be written. Nothing half-written stays.
    """
    if not output.parent.is_dir():
        raise AotError(f"there is no folder {output.parent} to write {output.name} to")
    if is_gpu(options.compile.target):
        from moec.aot.gpu import build_gpu

        return build_gpu(source, output, options, told)
    if options.tune:
        raise AotError("--tune is for GPU targets", hint="kernels for CPUs choose by moec profile")
    if options.weights == "none":
        raise AotError("--weights none is for GPU targets", hint="use --weights inside or beside")
    stages = Stages(told)
    stages.begin("export")
    programs, facts = exported_programs(source, options)
    if options.weights == "beside" and source.checkpoint is None:
        raise AotError("--weights beside is for a folder of safetensors", hint="use --weights inside")
    places = source.checkpoint.places if source.checkpoint is not None else {}
    beside = options.weights == "beside"
    embedding = Embedding(options.compile.target, {n for n, p in places.items() if len(p) > 1 and beside})
    report = Report()
    stages.begin("passes")
    optimized = {name: optimize(p, embedding, options.compile, report, stages.detail) for name, p in programs.items()}
    for entry in optimized.values():
        embedding.share_layers(entry.program)
    if isinstance(source.module, Tokens):
        for block in report.layers:
            block.name = block.name.removeprefix("model.")  # of the wrapper: the user's model has no such part
    publish(report)
    if not report.layers:
        raise NoBlockError(
            f"{source.text} has no MoE block that moec finds",
            hint="moec explain says what it looked at; torch's own AOTInductor compiles models without MoE",
        )
    stages.begin("layers")
    layers = []
    for number, region in enumerate(embedding.regions.values(), 1):
        stages.detail(f"{number} of {len(embedding.regions)} kinds")
        layers.append(layer_object(region, embedding))
    stages.begin("kernels")
    kernels = list(embedding.programs.values())
    library = archive(kernels, embedding.target, stages.detail, layers) if kernels or layers else None
    stages.begin("code")
    codes, cached = {}, True
    for name, entry in optimized.items():
        stages.detail(name)
        codes[name], known = compile_code(entry.program, embedding, library)
        cached = cached and known
    stages.begin("weights")
    state = state_of(source, places, [entry.program for entry in optimized.values()])
    entries = {name: EntryParts(o.program, codes[name], o.before, o.after) for name, o in optimized.items()}
    parts = Parts(source, options.compile, options.weights, entries, state, tuple(options.dynamic), facts, places)
    stages.begin("archive")
    size = write_artifact(output, parts, stages.detail)
    stages.end()
    return Built(output, size, stages.seconds, cached, report, len(kernels))


def exported_programs(
    source: Source, options: AotOptions
) -> tuple[dict[str, ExportedProgram], Mapping[str, tuple[int, ...]]]:
    """The entries' programs, and what the manifest says about generating."""
    if not options.generate:
        return {"model": export(source, options.dynamic)}, {}
    programs, length = export_pair(source, options.dynamic)
    return programs, generation_facts(source, length)
