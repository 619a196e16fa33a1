"""``moec coverage``: every MoE family of the installed transformers, and what moec does with it."""

from moec.coverage.families import Family, discover
from moec.coverage.row import Row

__all__ = ["Family", "Row", "discover"]
