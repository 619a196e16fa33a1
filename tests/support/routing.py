"""Independent references for MoE layers, and how two runs of a whole model may be compared.

Last bits differ between compilers, and where two experts score nearly alike a last bit sends the token elsewhere: then
a large difference is no error, and a tolerance wide enough to allow it would hide real ones. So layers are compared at
fixed routing (``reference_experts``), and whole models in fp32, or in bf16 with the near-tie tokens counted and set
apart (``near_tie_tokens``, ``compare_logits``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FP32_LOGITS_TOLERANCE = 2e-5
"""Largest |difference| / max(1, max |logit|) of two fp32 runs of one model."""
BF16_LOGITS_TOLERANCE = 6e-2
"""The same in bf16, for tokens that are no near tie."""
FP32_TIE_MARGIN = 1e-5
BF16_TIE_MARGIN = 4e-2
"""A token whose last chosen and first refused expert differ by less than this part of its best score is a near tie."""
FOLLOWER_TOLERANCE = 0.3
MAX_FOLLOWER_SHARE = 0.02
"""So many tokens after a near tie may differ by so much: attention carries to them what went elsewhere there."""
MAX_TIE_SHARE = 0.75
"""With more near ties than this a comparison says nothing, and is an error."""


def reference_experts(
    experts: torch.nn.Module,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """What a transformers experts module computes, as a plain loop over experts, tokens and choices kept apart.

    Covers stacked, transposed, interleaved, biased and non-gated weights, and post-expert norms. Ids outside
    ``[0, E)`` are sentinels of expert parallelism and add nothing.

    Args:
        experts: Module with ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` parameters.
        x: ``[T, H]``.
        ids: ``[T, k]`` expert of each choice.
        weights: ``[T, k]`` weight of each choice.
        dtype: Type of the whole computation and of the result.

    Returns:
        ``[T, H]`` in ``dtype``.
    """
    gated = getattr(experts, "has_gate", True)
    up = experts.gate_up_proj if gated else experts.up_proj
    up_bias = getattr(experts, "gate_up_proj_bias" if gated else "up_proj_bias", None)
    down, down_bias = experts.down_proj, getattr(experts, "down_proj_bias", None)
    transposed = getattr(experts, "is_transposed", False)
    result = torch.zeros(x.shape[0], x.shape[1], dtype=dtype)
    for expert in range(down.shape[0]):
        tokens, choices = torch.where(ids == expert)
        if tokens.numel() == 0:
            continue
        rows = x[tokens].to(dtype)
        hidden = _project(rows, up[expert].to(dtype), up_bias, expert, transposed)
        hidden = _activate(experts, hidden) if gated else experts.act_fn(hidden)
        out = _project(hidden, down[expert].to(dtype), down_bias, expert, transposed)
        if getattr(experts, "has_post_expert_norm", False):
            out = experts.post_expert_norm(out)
        result = result.index_add(0, tokens, out * weights[tokens, choices, None].to(dtype))
    return result


def _project(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, expert: int, transposed: bool
) -> torch.Tensor:
    out = rows @ (weight if transposed else weight.T)
    return out if bias is None else out + bias[expert].to(out.dtype)


def _activate(experts: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Gate times up, written out here; only a family with a gate of its own kind is asked for it."""
    if hasattr(experts, "alpha") and hasattr(experts, "limit"):  # gpt-oss: clamped, interleaved unless concatenated
        if getattr(experts, "is_concatenated", False):
            gate, up = hidden.chunk(2, dim=-1)
        else:
            gate, up = hidden[:, 0::2], hidden[:, 1::2]
        gate = gate.clamp(max=experts.limit)
        up = up.clamp(-experts.limit, experts.limit)
        return (up + 1) * gate / (1 + torch.exp(-experts.alpha * gate))
    if type(experts)._apply_gate.__module__ == "transformers.integrations.moe":
        gate, up = hidden.chunk(2, dim=-1)
        return experts.act_fn(gate) * up
    return experts._apply_gate(hidden)


class _TopKMargins(TorchDispatchMode):
    """Watches top-k over ``[T, n]`` scores: how far apart were the last chosen and the first refused?"""

    def __init__(self) -> None:
        super().__init__()
        self.margins: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.topk.default:
            scores, k = args[0], args[1]
            if scores.dim() == 2 and k < scores.shape[1]:  # DeepSeek's top-2 sum inside a group is 3-D and no choice
                best = scores.float().sort(dim=1, descending=True).values
                gap = best[:, k - 1] - best[:, k]
                scale = torch.where(best.isfinite(), best.abs(), 0).amax(dim=1).clamp(min=1e-30)
                self.margins.append(gap / scale)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def near_tie_tokens(model: torch.nn.Module, margin: float | None = None, **model_inputs: Any) -> torch.Tensor:
    """Tokens of one eager run for which some router's choice hangs on a small difference.

    Args:
        model: The eager model.
        margin: Smallest safe distance; by default the constant for the model's type.
        model_inputs: Keyword arguments of the model.

    Returns:
        bool ``[T]``, tokens in the order of the flattened input ids.
    """
    if margin is None:
        margin = FP32_TIE_MARGIN if next(model.parameters()).dtype == torch.float32 else BF16_TIE_MARGIN
    with _TopKMargins() as seen:
        model(**model_inputs)
    tokens = model_inputs["input_ids"].numel()
    ties = torch.zeros(tokens, dtype=torch.bool)
    for margins in seen.margins:
        if margins.shape[0] == tokens:
            ties |= margins < margin
    return ties


@dataclass(frozen=True)
class LogitsComparison:
    """What a comparison saw; errors are relative to max(1, max |logit|)."""

    tokens: int
    near_ties: int
    followers: int
    max_error: float
    max_error_of_ties: float
    max_error_of_followers: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, largest error {self.max_error:.2e}; {self.near_ties} near ties "
            f"({self.max_error_of_ties:.2e}), {self.followers} moved by one before them "
            f"({self.max_error_of_followers:.2e})"
        )


def compare_logits(
    got: torch.Tensor,
    want: torch.Tensor,
    *,
    ties: torch.Tensor | None = None,
    tolerance: float | None = None,
) -> LogitsComparison:
    """Hold one run's logits against another's, near-tie tokens apart.

    Args:
        got: ``[..., vocab]`` logits of the run under test.
        want: The reference's logits, same shape and type.
        ties: bool ``[T]`` from ``near_tie_tokens``; these tokens are counted, not held to the tolerance.
        tolerance: By default the constant for the logits' type.

    Returns:
        The counts and errors, for the test to print.

    Raises:
        AssertionError: A token that is no near tie differs by more than the tolerance (a few that come after one
            excepted), a logit is not finite where the reference's is, or near ties are too many to say anything.
    """
    assert got.shape == want.shape, f"logits have shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"logits are {got.dtype}, want {want.dtype}"
    if tolerance is None:
        tolerance = FP32_LOGITS_TOLERANCE if want.dtype == torch.float32 else BF16_LOGITS_TOLERANCE
    rows_got, rows_want = (t.detach().double().reshape(-1, t.shape[-1]) for t in (got, want))
    count = rows_want.shape[0]
    if count == 0:
        return LogitsComparison(0, 0, 0, 0.0, 0.0)
    if ties is None:
        ties = torch.zeros(count, dtype=torch.bool)
    assert rows_got.isfinite().equal(rows_want.isfinite()), "logits are not finite where the reference's are"
    scale = rows_want.abs().amax().clamp(min=1.0)
    errors = ((rows_got - rows_want).abs().amax(dim=1) / scale).nan_to_num(0.0)
    sequence = ties.reshape(want.shape[:-1]) if want.dim() > 1 else ties
    after_tie = (sequence.cumsum(dim=-1) > 0).reshape(-1) & ~ties
    followers = after_tie & (errors > tolerance)
    rest = ~ties & ~followers
    result = LogitsComparison(
        count,
        int(ties.sum()),
        int(followers.sum()),
        _largest(errors[rest]),
        _largest(errors[ties]),
        _largest(errors[followers]),
    )
    assert result.near_ties <= MAX_TIE_SHARE * count, f"too many near ties to compare anything: {result}"
    assert result.max_error <= tolerance, f"logits differ by more than {tolerance:g}: {result}"
    assert result.followers <= MAX_FOLLOWER_SHARE * count, (
        f"too many tokens differ by more than {tolerance:g}: {result}"
    )
    assert result.max_error_of_followers <= FOLLOWER_TOLERANCE, f"a token after a near tie is far off: {result}"
    return result


def _largest(errors: torch.Tensor) -> float:
    return float(errors.max()) if errors.numel() else 0.0
