"""The pass ``overlap``: a layer in chunks, so that links and experts work at the same time."""

from moec.passes.overlap.overlap import Overlap

__all__ = ["Overlap"]
