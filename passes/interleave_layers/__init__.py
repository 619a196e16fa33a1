"""The pass ``interleave-layers``: other micro-batches compute while the rows of a layer travel."""

from moec.passes.interleave_layers.interleave import InterleaveLayers

__all__ = ["InterleaveLayers"]
