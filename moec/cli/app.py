"""The ``moec`` script: one typer app, and the one place that turns errors into messages and exit codes.

Exit codes: 0 done, 1 a fault of moec, 2 a problem the user can mend, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from moec import __version__
from moec.cli import (
    backends,
    bench,
    compile,
    coverage,
    demo,
    doctor,
    explain,
    inspect,
    opt,
    passes,
    plan,
    profile,
    run,
    selfcheck,
    simulate,
)
from moec.cli.console import show_error, show_internal
from moec.ir.errors import MoecError

app = typer.Typer(
    name="moec",
    help="A compiler for Mixture-of-Experts models in PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("compile")(compile.compile)
app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("bench")(bench.bench)
app.command("explain")(explain.explain)
app.command("opt")(opt.opt)
app.command("passes")(passes.passes)
app.command("backends")(backends.backends)
app.command("plan")(plan.plan)
app.command("simulate")(simulate.simulate)
app.command("profile")(profile.profile)
app.command("coverage")(coverage.coverage)
app.command("doctor")(doctor.doctor)
app.command("selfcheck")(selfcheck.selfcheck)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moec {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the Python traceback of an error. Taken anywhere on the line.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits."""
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in args
    args = [a for a in args if a != "--traceback"]
    try:
        app(args=args, prog_name="moec")
    except MoecError as e:
        if show_traceback:
            traceback.print_exc()
        show_error(e)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe has gone (`moec passes | head`). Python must not meet the closed pipe again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as e:  # noqa: BLE001 - the last door: anything else is a fault of moec and is told as one
        if show_traceback:
            traceback.print_exc()
        show_internal(e)
        sys.exit(1)
