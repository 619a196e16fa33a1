"""``raise-shared-experts``: find the dense MLP beside a MoE block and say it in the moe dialect, as one expert."""

from moec.passes.raise_shared_experts.raise_shared_experts import RaiseSharedExperts

__all__ = ["RaiseSharedExperts"]
