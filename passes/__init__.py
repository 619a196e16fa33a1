"""Passes over the IR: what a pass is, how passes are named and run, and the built-in ones (one file each)."""

from __future__ import annotations

from moec.passes.base import Pass, PassClass, PassContext, PassError, PassResult, Remark
from moec.passes.manager import PassManager
from moec.passes.registry import all_passes, format_pipeline, get_pass, parse_pipeline, register_pass
from moec.passes.rewrite import Rewrite, Rewriter, apply_rewrites

__all__ = [
    "Pass",
    "PassClass",
    "PassContext",
    "PassError",
    "PassManager",
    "PassResult",
    "Remark",
    "Rewrite",
    "Rewriter",
    "all_passes",
    "apply_rewrites",
    "format_pipeline",
    "get_pass",
    "parse_pipeline",
    "register_pass",
]
