"""Layers in pieces in the ``torch.compile`` door: forward and backward, as autograd makes them, put in order."""

from moec.interleaving.decide import Wanted, decide
from moec.interleaving.inner import CUSTOM_PASS, InterleavePass, aot_eager

__all__ = ["CUSTOM_PASS", "InterleavePass", "Wanted", "aot_eager", "decide"]
