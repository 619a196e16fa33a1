"""Where the command line writes: results to stdout, problems to stderr, each problem as one block."""

from __future__ import annotations

import os
import sys

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from moec.ir.errors import MoecError

_WIDTH_OF_A_FILE = 140


def out() -> Console:
    """The console of results. Made on each call, so that a redirected stdout is honoured."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_A_FILE
    return console


def err() -> Console:
    """The console of progress and problems."""
    return Console(file=sys.stderr, highlight=False)


def emit(text: str) -> None:
    """Text for programs and pipes (IR, JSON): never wrapped, never coloured."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def show_error(error: MoecError) -> None:
    """Prints one block: what is wrong, the op, the source line, the next step.

    On a terminal it is a panel; elsewhere plain lines that logs and ``grep`` can take.
    """
    console = err()
    if not console.is_terminal:
        print(f"error[{error.code}]: {error}", file=sys.stderr)
        return
    keeps_own_form = type(error).__str__ is not MoecError.__str__  # a caret must stay under its column
    parts: list[Text] = []
    if keeps_own_form:
        parts.append(Text(str(error), no_wrap=True, overflow="ellipsis"))
        if error.hint:
            parts.append(Text.assemble(("hint: ", "bold green"), error.hint))
    else:
        parts.append(Text(error.message))
        for label, value in (("op", error.op), ("source", error.source), ("hint", error.hint)):
            if value:
                parts.append(Text.assemble((f"{label}: ", "bold green" if label == "hint" else "bold"), value))
    console.print(
        Panel(Group(*parts), title=f"error: {error.code}", title_align="left", border_style="red", expand=False)
    )


def show_internal(error: BaseException) -> None:
    """One line for a fault of moec itself."""
    text = str(error).strip().splitlines()
    first = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    print(
        f"internal error: {first}\n  hint: this is a fault of moec; run again with --traceback to see where",
        file=sys.stderr,
    )
