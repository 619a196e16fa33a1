"""What the text of a modeling file says about its classes: bases, names used, experts.

The text is read, not imported: importing every modeling file of transformers takes minutes and needs packages that are
not there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

DECORATOR = "use_experts_implementation"
_EXPERTS_NAME = re.compile(r"Experts?(V\d+)?$")
_CONTAINERS = ("ModuleList", "ModuleDict")


@dataclass(frozen=True)
class ClassSource:
    """One class of a modeling file.

    Attributes:
        name: Its name.
        bases: The last parts of its bases' names (``Module`` for ``nn.Module``).
        mentions: Every plain name that its body uses, and those that the module's tables behind them hold.
        decorated: It follows transformers' experts interface.
        experts: Why it looks like experts of an MoE, or None.
    """

    name: str
    bases: tuple[str, ...]
    mentions: frozenset[str]
    decorated: bool
    experts: str | None


def read_classes(text: str) -> dict[str, ClassSource]:
    """The top-level classes of one Python file, by name, in their order.

    Raises:
        SyntaxError: The text is no Python.
    """
    found = {}
    tree = ast.parse(text)
    # Tables such as {"attention": Attention, "moe": MoE}, by which a model picks the classes that it builds.
    tables = {
        target.id: _names([node.value])
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names = _names(node.body)
            names = names.union(*(tables[n] for n in names & tables.keys()))
            decorated = any(_last_name(d) == DECORATOR for d in node.decorator_list)
            bases = tuple(_last_name(b) for b in node.bases)
            found[node.name] = ClassSource(node.name, bases, names, decorated, _looks_like_experts(node, bases))
    return found


def _names(parts: Iterable[ast.AST]) -> frozenset[str]:
    return frozenset(n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name))


def _last_name(node: ast.expr) -> str:
    """``f`` of ``f``, ``a.f``, ``f(...)`` and ``a.f(...)``; empty for anything else."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _looks_like_experts(node: ast.ClassDef, bases: tuple[str, ...]) -> str | None:
    """Why the class looks like the experts of an MoE. Shared experts, which every token visits, don't count."""
    if "Shared" in node.name or not any("Module" in b for b in bases):
        return None
    if any(b in _CONTAINERS for b in bases) and re.search("expert|moe", node.name, re.IGNORECASE):
        return "is a list of experts"
    for name, call in _attributes(node):
        made = _last_name(call)
        if made in _CONTAINERS and "expert" in name and "shared" not in name:
            return f"holds a list of experts ({name})"
        if made == "Embedding" and call.args and _counts_experts(call.args[0]):
            return f"holds one embedding an expert ({name})"
        if made == "Parameter" and call.args and _stacked(call.args[0]):
            return f"holds weights stacked by expert ({name})"
    return "is named as experts" if _EXPERTS_NAME.search(node.name) else None


def _attributes(node: ast.ClassDef) -> Iterator[tuple[str, ast.Call]]:
    """Assignments of a call's result to an attribute of ``self``."""
    for part in ast.walk(node):
        if isinstance(part, ast.Assign) and isinstance(part.value, ast.Call):
            for target in part.targets:
                if isinstance(target, ast.Attribute):
                    yield target.attr, part.value


def _counts_experts(dim: ast.expr) -> bool:
    return "expert" in ast.unparse(dim).lower()


def _stacked(shape_call: ast.expr) -> bool:
    """``torch.empty(E, a, b)``, or the same laid flat, ``torch.empty(E * a, b)``; a router's ``[E, a]`` isn't it."""
    if not isinstance(shape_call, ast.Call):
        return False
    dims = [a for a in shape_call.args if not isinstance(a, ast.Starred)]
    if len(dims) == 1 and isinstance(dims[0], ast.Tuple | ast.List):
        dims = dims[0].elts
    if not dims or not _counts_experts(dims[0]):
        return False
    return len(dims) >= 3 or (len(dims) == 2 and isinstance(dims[0], ast.BinOp))
