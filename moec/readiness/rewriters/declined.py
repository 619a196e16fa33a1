"""Classes that run experts in a way for which there is no op: left as they are, each with its reason."""

from __future__ import annotations

from moec.readiness.rewriters.known import Declined

DECLINED = (
    Declined(
        "transformers.models.doge.modeling_doge.DogeCDMoE",
        "an expert is one row of each of two embedding tables, found by product keys: there is no GEMM to group. It "
        "can be captured as it is, and PyTorch runs it",
    ),
    Declined(
        "transformers.models.vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneMoeMLP",
        "the data set of an image, not a router, picks an expert, which is one linear layer: there is no up and down "
        "projection to fuse. It can be captured as it is, and PyTorch runs it",
    ),
)
