"""Cutting MoE blocks out of the graphs that Dynamo hands to a backend."""

from __future__ import annotations

from moec.slicing.cut import NotSliced, Slice
from moec.slicing.find import find_slices

__all__ = ["NotSliced", "Slice", "find_slices"]
