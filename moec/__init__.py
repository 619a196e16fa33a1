"""moec: a compiler for Mixture-of-Experts models in PyTorch."""

from __future__ import annotations

__version__ = "0.1.0"
