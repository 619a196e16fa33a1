"""``eliminate-zero-experts``: routed slots that need no expert leave the expert computation."""

from moec.passes.eliminate_zero_experts.eliminate_zero_experts import EliminateZeroExperts

__all__ = ["EliminateZeroExperts"]
