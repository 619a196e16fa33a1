"""What capture remembers of an fx node so that emit can give it back unchanged.

None of it is needed to emit a graph: ops that a pass made have no origin and are emitted all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ORIGIN = "origin"
"""Key of an :class:`Origin` in the ``meta`` of an op (its node), of a value (the ``placeholder`` or ``getitem`` node it
was) or of a region (the ``get_attr`` node that named its module)."""
FX_META = "fx"
"""Key of the node's own ``meta`` dict, in the same places."""


@dataclass(frozen=True)
class Origin:
    """One captured fx node.

    Attributes:
        order: Its position in the fx graph it came from.
        name: Its name there.
        target: Its target, where the op does not say it (placeholder, get_attr).
        type_expr: The node's type annotation.
        default: Default argument of a placeholder, as the node's ``args``.
        is_tuple: The call returned a tuple or list, which ``getitem`` nodes took apart. None: not known.
    """

    order: int
    name: str
    target: str = ""
    type_expr: Any = None
    default: tuple[Any, ...] = ()
    is_tuple: bool | None = None
