"""The command line, one file a command. ``main`` is the entry point of the ``moec`` script."""

from __future__ import annotations

from moec.cli.app import main

__all__ = ["main"]
