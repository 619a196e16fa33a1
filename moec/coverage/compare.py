"""How far two runs of one model in float32 are apart, and where such a comparison would say nothing.

Two compilers round differently in the last bit, and where two experts score alike a last bit sends the token elsewhere.
So inputs are chosen for which no choice hangs on a small difference; then every difference is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = 2e-5
"""Largest |difference| / largest |value| of two outputs."""
GRADIENT_TOLERANCE = 1e-3
"""The same for a parameter's gradient, against the largest of that gradient."""
TIE_MARGIN = 1e-5
"""A choice is a near tie where the last chosen and the first refused differ by less than this part of the best."""
_FAINT = 1e-4
"""A gradient below this part of the model's largest is compared with that part: it is rounding itself."""

_CHOICES = (torch.ops.aten.topk.default, torch.ops.aten.max.dim, torch.ops.aten.argmax.default)


class _Margins(TorchDispatchMode):
    """Watches every choice among scores, one row a token, and counts the near ties."""

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = tokens
        self.ties = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CHOICES:
            scores = args[0]
            k = args[1] if func is torch.ops.aten.topk.default else 1
            # Attention takes the largest score of every query and head: not for a choice, but to scale by it.
            of_tokens = scores.dim() >= 2 and scores.numel() == self.tokens * scores.shape[-1]
            if of_tokens and scores.is_floating_point() and k < scores.shape[-1]:
                self.ties += near_ties(scores, k)
        return func(*args, **(kwargs or {}))


def near_ties(scores: torch.Tensor, k: int) -> int:
    """In how many rows of ``[..., n]`` the choice of the best ``k`` hangs on a small difference."""
    best = scores.detach().float().sort(dim=-1, descending=True).values
    there = best > torch.finfo(torch.float32).min / 2  # what a mask refuses can never be chosen
    gap = best[..., k - 1] - best[..., k]
    scale = torch.where(there, best.abs(), 0).amax(dim=-1).clamp(min=1e-30)
    return int(((gap / scale < TIE_MARGIN) & there[..., k]).sum())


@torch.no_grad()
def ties_in(model: Any, inputs: Mapping[str, Any], tokens: int) -> int:
    """How many choices of one eager run of so many tokens hang on a small difference."""
    with _Margins(tokens) as seen:
        model(**inputs)
    return seen.ties


def output_of(result: Any) -> torch.Tensor:
    """What a model's result is judged by: its logits, else its last hidden state, else its last feature map."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(result, name, None), torch.Tensor):
            return found
    found = result.feature_maps[-1]
    assert isinstance(found, torch.Tensor)
    return found


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest |difference| / largest |value|; infinite where shapes differ or one isn't finite."""
    if got.shape != want.shape or not bool(got.isfinite().all()) or not bool(want.isfinite().all()):
        return float("inf")
    if want.numel() == 0:
        return 0.0
    a, b = got.detach().double(), want.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def gradient_error(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """The parameter whose gradient is furthest off.

    Args:
        got: Gradients by parameter; one that isn't there is zero (an expert that no token went to).
        want: The reference's.

    Returns:
        The error, infinite where a gradient isn't finite, and the parameter.
    """
    floor = max(_FAINT * max((float(g.abs().max()) for g in want.values() if g.numel()), default=0.0), 1e-30)
    worst = (0.0, "")
    for name in sorted({*got, *want}):
        one, other = got.get(name), want.get(name)
        shape = (one if other is None else other).shape  # type: ignore[union-attr]  # one of them is there
        a, b = (torch.zeros(shape).double() if g is None else g.double() for g in (one, other))
        if a.numel():
            error = float((a - b).abs().max()) / max(float(b.abs().max()), floor)
            error = error if error == error else float("inf")
            worst = (error, name) if error > worst[0] else worst
    return worst


def worse(
    got: Mapping[str, torch.Tensor], eager: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]
) -> bool:
    """Whether gradients are further from float64's than twice eager's: where sums cancel out, eager's are off too."""
    return gradient_error(got, exact)[0] > max(GRADIENT_TOLERANCE, 2 * gradient_error(eager, exact)[0])
