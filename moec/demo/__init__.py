"""``moec demo``: a model of real layer sizes, compiled, explained, checked and timed on this machine."""

from __future__ import annotations

from moec.demo.flow import run

__all__ = ["run"]
