"""``moe.route``: router logits to expert ids and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, RegionDef, register_op, torch_dtype
from moec.ir.types import DTYPES, TensorType, Type, as_dim

SCORINGS = ("softmax", "sigmoid", "identity", "sqrtsoftplus")


def score(logits: Tensor, scoring: str) -> Tensor:
    """Router scores from logits [.., E], in the logits' type."""
    if scoring == "softmax":
        return torch.softmax(logits, -1)
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    if scoring == "sqrtsoftplus":
        return torch.sqrt(torch.nn.functional.softplus(logits))
    return logits


@register_op
class Route(OpDef):
    """Chooses k experts per token and their weights.

    ``%w, %ids = moe.route %logits {k = 2, scoring = "softmax", renormalize = true} : f32[T, 2], i64[T, 2]``

    In order: cast the logits to ``score_dtype``; score them; add ``bias`` for the selection alone (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2); with ``groups``, keep only the experts of the ``top_groups`` best groups, a group
    being worth its best expert (``max``, DeepSeek-V2) or the sum of its best two (``top2_sum``), others count as
    ``group_fill``; take the top k; weights are the unbiased scores of the chosen, with ``masked_weights`` (DeepSeek-V2)
    as the groups' mask left them; ``renormalize`` divides by their sum plus ``renorm_eps``; multiply by ``scale``; cast
    to the result's type. With ``order = "topk_first"`` the top k of the logits is taken before scoring (gpt-oss,
    Granite).

    With ``per_group`` every group gives equally many experts (mixture of grouped experts, Pangu Pro MoE,
    arXiv:2505.21411): the best ``per_group`` of each of ``groups`` groups, ``k = groups * per_group``. Whatever the
    tokens, a group then has exactly ``T * per_group`` slots; ``moec.ir.routing.equal_load_groups`` gives this fact to
    passes. Slots come best first of all, or with ``by_group`` group after group, best first in each: then slot j goes
    to group ``j // per_group``.

    A router that fits none of this is a region from ``(logits, bias?, captures...)`` to ``(weights, ids)``; then the
    other attributes but ``k`` say nothing.
    """

    name = "moe.route"
    operands = (
        OperandDef("logits", doc="[T, E]"),
        OperandDef("bias", "optional", "[E], added to the scores for the selection alone"),
        OperandDef("captures", "many", "what the region uses besides"),
    )
    attrs = (
        AttrDef("k", "int", "experts per token"),
        AttrDef("scoring", "str", "scores from logits", default="softmax", choices=SCORINGS),
        AttrDef("score_dtype", "dtype", "type in which scores are computed", default=DTYPES["f32"]),
        AttrDef("order", "str", "what comes first", default="score_first", choices=("score_first", "topk_first")),
        AttrDef("groups", "int", "number of expert groups, 0 for none", default=0),
        AttrDef("top_groups", "int", "groups kept per token", default=0),
        AttrDef("group_score", "str", "what a group is worth", default="max", choices=("max", "top2_sum")),
        AttrDef("group_fill", "float", "selection score of experts outside the kept groups", default=float("-inf")),
        AttrDef("masked_weights", "bool", "weights outside the kept groups are group_fill", default=False),
        AttrDef("per_group", "int", "experts that every group gives, 0 where they may come from anywhere", default=0),
        AttrDef("by_group", "bool", "with per_group: slots come group after group", default=False),
        AttrDef("renormalize", "bool", "weights of a token add up to 1", default=False),
        AttrDef("renorm_eps", "float", "added to that sum", default=0.0),
        AttrDef("scale", "float", "factor on the weights", default=1.0),
        AttrDef("sorted", "bool", "the chosen experts come best first", default=True),
        AttrDef("ties", "str", "of equal scores, those torch.topk takes, or the first", "any", ("any", "first")),
    )
    regions = (RegionDef("router", "the whole router, where no attribute fits", optional=True),)
    results = ("weights", "ids")

    def infer(self, op: Op) -> Sequence[Type] | None:
        return None  # the weights' type is free

    def verify(self, op: Op) -> None:
        logits = op.operands[0].type
        if not isinstance(logits, TensorType) or logits.rank != 2:
            self.fail(op, "logits must be a matrix [T, E]")
            return
        k = self.attr(op, "k")
        if logits.shape[1].is_Integer and not 1 <= k <= int(logits.shape[1]):
            self.fail(op, f"k = {k} does not fit {logits.shape[1]} experts")
        for r in op.results:
            if not isinstance(r.type, TensorType) or r.type.shape != (logits.shape[0], as_dim(k)):
                self.fail(op, f"result {r!r} must have the shape [{logits.shape[0]}, {k}]")
        if self.attr(op, "ties") == "first" and not self.attr(op, "sorted"):
            self.fail(op, 'ties = "first" takes the experts best first: they are sorted')
        groups, top = self.attr(op, "groups"), self.attr(op, "top_groups")
        if self.attr(op, "masked_weights") and (not top or op.group("bias")):
            self.fail(op, "masked_weights are the scores that the selection goes by: there are top_groups, and no bias")
        if self.attr(op, "per_group"):
            self._verify_per_group(op, logits.shape[1])
        elif self.attr(op, "by_group"):
            self.fail(op, "by_group says in which order per_group's experts come, and there is no per_group")
        elif groups and not 1 <= top <= groups:
            self.fail(op, f"top_groups = {top} does not fit groups = {groups}")

    def _verify_per_group(self, op: Op, experts: sympy.Expr) -> None:
        """Every group gives equally many experts, whatever the scores."""
        k, groups, each = (self.attr(op, name) for name in ("k", "groups", "per_group"))
        if op.regions or self.attr(op, "order") == "topk_first":
            self.fail(op, "per_group is about a router that scores first and is no region")
        if groups < 1 or self.attr(op, "top_groups"):
            self.fail(op, f"per_group = {each} needs groups, and no top_groups")
        if each < 1 or k != groups * each:
            self.fail(op, f"k = {k} is not groups * per_group = {groups} * {each}")
        if experts.is_Integer and (experts % groups or each > experts // groups):
            self.fail(op, f"{experts} experts do not make {groups} groups of one size, with {each} or more in each")
        if self.attr(op, "by_group"):
            return
        # What the groups did not choose counts as -inf. A score of -inf would tie with it.
        if op.group("bias") or self.attr(op, "scoring") == "identity" or self.attr(op, "group_fill") != float("-inf"):
            self.fail(op, "per_group without by_group needs scores above -inf: no bias, group_fill or identity scoring")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        if op.regions:
            return run(op.regions[0], inputs)
        logits, bias = inputs[0], inputs[1] if op.groups[1] else None
        get = partial(self.attr, op)
        logits = logits.to(torch_dtype(get("score_dtype").name))
        k = get("k")
        if get("order") == "topk_first":
            top, ids = self._top(op, logits, k)
            weights = score(top, get("scoring"))
        else:
            scores = score(logits, get("scoring"))
            choice = scores if bias is None else scores + bias
            if get("per_group"):
                ids = self._per_group(op, choice)
            else:
                choice = self._keep_groups(op, choice) if get("groups") else choice
                ids = self._top(op, choice, k)[1]
            weights = (choice if get("masked_weights") else scores).gather(1, ids)
        if get("renormalize"):
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / (total + get("renorm_eps") if get("renorm_eps") else total)
        if get("scale") != 1.0:
            weights = weights * get("scale")
        assert isinstance(op.results[0].type, TensorType)
        return [weights.to(torch_dtype(op.results[0].type.dtype.name)), ids]

    def _top(self, op: Op, choice: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The best k along the last dimension: values and indices."""
        if self.attr(op, "ties") == "any":
            top = torch.topk(choice, k, dim=-1, sorted=self.attr(op, "sorted"))
            return top.values, top.indices
        if k == 1:
            values, ids = choice.max(dim=-1, keepdim=True)
        else:
            values, ids = choice.sort(dim=-1, descending=True, stable=True)
        return values[..., :k], ids[..., :k]

    def _per_group(self, op: Op, choice: Tensor) -> Tensor:
        groups, each = self.attr(op, "groups"), self.attr(op, "per_group")
        size = choice.shape[-1] // groups
        first = torch.arange(0, groups * size, size, device=choice.device)
        ids = (self._top(op, choice.view(-1, groups, size), each)[1] + first[:, None]).flatten(1)
        if self.attr(op, "by_group"):
            return ids
        kept = torch.zeros_like(choice, dtype=torch.bool).scatter(1, ids, True)
        return self._top(op, choice.masked_fill(~kept, float("-inf")), self.attr(op, "k"))[1]

    def _keep_groups(self, op: Op, choice: Tensor) -> Tensor:
        groups = self.attr(op, "groups")
        by_group = choice.view(-1, groups, choice.shape[-1] // groups)
        if self.attr(op, "group_score") == "max":
            worth = by_group.max(dim=-1).values
        else:
            worth = by_group.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.topk(worth, self.attr(op, "top_groups"), dim=-1, sorted=False).indices
        mask = torch.zeros_like(worth).scatter(1, kept, 1).bool()
        mask = mask.unsqueeze(-1).expand(by_group.shape).reshape(choice.shape)
        return choice.masked_fill(~mask, self.attr(op, "group_fill"))
