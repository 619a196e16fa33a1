"""The pass ``expert-parallel``: experts on several ranks, tokens that travel to them."""

from moec.passes.expert_parallel.expert_parallel import ExpertParallel, ExpertParallelSums

__all__ = ["ExpertParallel", "ExpertParallelSums"]
