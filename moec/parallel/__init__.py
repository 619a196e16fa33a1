"""Models on several ranks: dealing experts out, checking that ranks agree, planning what goes where."""

from moec.parallel.parallelize import layout_of, parallelize
from moec.parallel.plan import Layout, ParallelError, Plan

__all__ = ["Layout", "ParallelError", "Plan", "layout_of", "parallelize"]
