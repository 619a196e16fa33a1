"""Class rewriters: modules that run experts in a way that cannot be captured get methods that do the same and can be.

One file a class. A rewriter says which class it knows (``known.Rewriter``) and gives methods that end in the form of
``canonical.experts``; ``registry`` lists the rewriters, ``change`` applies them to a model.
"""

from moec.readiness.rewriters.change import RewriteChange
from moec.readiness.rewriters.known import is_rewritten
from moec.readiness.rewriters.registry import rewritten, runs_experts, verdict

__all__ = ["RewriteChange", "is_rewritten", "rewritten", "runs_experts", "verdict"]
