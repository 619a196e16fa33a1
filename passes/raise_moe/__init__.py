"""``raise-moe``: find MoE blocks in a graph of torch calls and say them in the moe dialect."""

from moec.passes.raise_moe.raise_moe import RaiseMoe

__all__ = ["RaiseMoe"]
