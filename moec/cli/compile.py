"""``moec compile MODEL -o out.moec``: a model, compiled ahead of time to one file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from moec.cli.console import emit, err, out
from moec.sizes import size_text


def compile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder, its config.json (with --random-weights), package.module:factory, or a .pt2.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The artifact to write.")],
    target: Annotated[
        str,
        typer.Option(help="cpu (from AVX2 up), cpu:avx512, cpu:amx; cuda:sm80, cuda:sm90, cuda:sm100, hip:gfx942."),
    ] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="f32, bf16 or f16; the model's own by default.")] = None,
    dynamic: Annotated[
        str | None,
        typer.Option(help="Sizes that vary: batch=1..64,seq=1..4096 (the default where MODEL takes tokens)."),
    ] = None,
    passes: Annotated[
        str, typer.Option("-p", "--passes", help="Pipeline text, or the name of a pipeline.")
    ] = "default",
    weights: Annotated[
        str,
        typer.Option(help="inside the artifact; beside it, in the checkpoint as it lies; or none: code alone."),
    ] = "inside",
    generate: Annotated[
        bool, typer.Option("--generate", help="Compile a prefill and a decode step with a cache of seq's largest size.")
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Make the weights up instead of reading them.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that the folder brings.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="For a GPU that is here: measure launches, and keep the fastest.")
    ] = False,
    jobs: Annotated[
        int,
        typer.Option("-j", "--jobs", min=0, help="Processes that compile kernels for a GPU; 0: one a core."),
    ] = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Also list the blocks and who runs them.")] = False,
    dump_dir: Annotated[Path | None, typer.Option(help="Write the IR after every pass to this folder.")] = None,
) -> None:
    """Compile a model to an artifact that runs without the model's code."""
    from moec.aot.build import AotOptions, build
    from moec.aot.errors import AotError
    from moec.cli.source import source_of
    from moec.options import CompileOptions
    from moec.targets import cpu_cores

    if weights not in ("inside", "beside", "none"):
        raise AotError(f"--weights cannot be {weights!r}", hint="write inside, beside or none")
    given = {"target": target, "passes": passes, "dump_dir": dump_dir, "checks": "off"}
    options = CompileOptions.from_dict(given)
    console = err()
    bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), console=console, transient=True)
    with bar, warnings.catch_warnings():
        task = bar.add_task("reading the model ...", total=None)
        warnings.filterwarnings("ignore", module=r"(torch|copyreg)\b.*")

        def told(stage: str, detail: str, done: int = 0, of: int = 0) -> None:
            text = f"{stage}: {detail}" if detail else stage
            bar.update(task, description=f"{text} ...", completed=done, total=of or None)
            if not console.is_terminal and not detail:
                console.print(f"{stage} ...", highlight=False)

        source, ranges = source_of(
            model,
            dtype=dtype,
            dynamic=dynamic,
            random_weights=random_weights,
            trust_remote_code=trust_remote_code,
            weights=weights,
            target=target,
        )
        processes = jobs or cpu_cores()
        built = build(source, output, AotOptions(options, ranges, weights, generate, tune, processes), told)
    if explain:
        out().print(built.report.table())
    if explain or not built.report.all_fused:
        for line in built.report.lines():
            out().print(line, markup=False, soft_wrap=True)
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in built.seconds.items())
    note = " (code from the cache)" if built.cached else ""
    emit(f"{output}: {size_text(built.bytes)}, {built.kernels} kernels, {times}{note}")
