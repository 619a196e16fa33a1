"""The named pipelines, in one table. A name may stand in a pipeline text wherever a pass may."""

from __future__ import annotations

PIPELINES: dict[str, str] = {
    "default": (
        "functionalize,canonicalize,cse,raise-moe,eliminate-zero-experts,fuse-routing,"
        "raise-shared-experts,fuse-experts,cse,dce"
    ),
    "cleanup": "canonicalize,cse,dce",
}
