"""``fuse-routing``: from router logits to ids and weights in one op."""

from moec.passes.fuse_routing.fuse_routing import FuseRouting

__all__ = ["FuseRouting"]
