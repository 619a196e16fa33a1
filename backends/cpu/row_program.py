"""Functions of whole rows as C++: loops over a row, cut where a sum or a maximum over it must be whole.

A program is built value by value. A *wide* value has an element for every column of some width, the others are one
number a row, held in all lanes of a vector. Every value is ready at a stage: what is computed from elements alone joins
the loop of its operands' stage, a reduction is ready one stage later. So an RMS norm is two loops, whatever ops it was
traced as. Wide values that a later loop reads are kept in working memory as floats, which holds what they were rounded
to without loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moec.backends.cpu.cpp import C_TYPES
from moec.backends.cpu.expression import CPP

LANES = 16
"""Of the widest vector. Rows in working memory are padded to it, so that loops need no tail."""


def padded(width: int) -> int:
    """Floats of a row in working memory; a slice of it may be read one vector past the row's end."""
    return -(-width // LANES) * LANES + LANES


@dataclass(eq=False)
class Node:
    """A value of a row program.

    Attributes:
        name: Of its vector in C++: one of W columns in a loop, or of equal numbers.
        width: Columns, or None for one number a row.
        stage: Of the first loop that may use it.
        loop: Where it is computed; None where it is read from memory in every loop that uses it.
        load: C++ that reads columns i .. i + W - 1.
        memory: Where it lies as floats; empty where it does not yet.
        moving: Depends on the row, not on captured tensors alone.
    """

    name: str
    width: int | None
    stage: int
    moving: bool
    loop: Loop | None = None
    load: str = ""
    memory: str = ""


@dataclass(eq=False)
class Loop:
    """One pass over the columns of a width."""

    stage: int
    width: int
    before: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    known: set[Node] = field(default_factory=set)


class RowProgram:
    """Builds the C++ function of a row (a :class:`moec.backends.rows.RowProgram`)."""

    language = CPP
    widest: int | None = None

    def __init__(self) -> None:
        self._count = 0
        self._loops: dict[tuple[int, int], Loop] = {}
        self._between: dict[int, list[str]] = {}
        self._floats = 0
        self._takes = 0

    @property
    def floats(self) -> int:
        """Floats of working memory, at ``room``."""
        return self._floats

    @property
    def takes(self) -> int:
        """Columns of the row it is given."""
        return self._takes

    def given(self, width: int) -> Node:
        """The row, as floats at ``h``."""
        self._takes = width
        return Node("v0", width, 0, True, load="load(h + i)", memory="h")

    def capture(self, index: int, dtype: str, width: int | None) -> Node:
        """Captured tensor ``index``: an element for every column, or one number."""
        at = f"(const {C_TYPES[dtype]}*)captures[{index}]"
        if width is None:
            node = Node(self._name("s"), None, 0, False)
            self._after(0, f"const V {node.name} = broadcast({at});")
            return node
        return Node(self._name("v"), width, 0, False, load=f"load_to<{width}>({at}, i)")

    def each(self, text: str, operands: Sequence[Node], dtype: str = "f32") -> Node:
        """An expression of vectors, ``text`` with the operands' names in it, rounded to ``dtype``."""
        stage = max((o.stage for o in operands), default=0)
        moving = any(o.moving for o in operands)
        width = next((o.width for o in operands if o.width is not None), None)
        if dtype != "f32":
            text = f"round_to<{C_TYPES[dtype]}>({text})"
        if width is None:
            node = Node(self._name("s"), None, stage, moving)
            self._after(stage, f"const V {node.name} = {text};")
            return node
        loop = self._loop(stage, width)
        for o in operands:
            self._use(o, loop)
        node = Node(self._name("v"), width, stage, moving, loop)
        loop.lines.append(f"const V {node.name} = {text};")
        loop.known.add(node)
        return node

    def total(self, node: Node) -> Node:
        """The sum over a row: lane by lane, then the lanes, in an order that only the width decides."""
        return self._fold(node, "zero()", "{0} = {0} + keep_n({1}, {2} - i);", "set1(sum_lanes({0}))")

    def largest(self, node: Node) -> Node:
        """The largest element of a row; NaN where there is one."""
        return self._fold(node, "set1(LOWEST)", "{0} = maximum({0}, or_lowest({1}, {2} - i));", "largest_lane({0})")

    def smallest(self, node: Node) -> Node:
        """The smallest element of a row; NaN where there is one."""
        most = self.largest(self.each(CPP.spell("neg", node.name), [node]))
        return self.each(CPP.spell("neg", most.name), [most])

    def piece(self, node: Node, start: int, width: int, step: int = 1) -> Node:
        """Columns ``start``, ``start + step``, ...: ``width`` of them."""
        at = self._memory(node)
        stage = node.stage + (node.loop is not None)
        if step == 1:
            at = f"{at} + {start}"
            return Node(self._name("v"), width, stage, node.moving, load=f"load({at} + i)", memory=at)
        load = f"every<{width}, {step}>({at} + {start}, i)"
        return Node(self._name("v"), width, stage, node.moving, load=load)

    def join(self, nodes: Sequence[Node]) -> Node:
        """Rows side by side."""
        width = sum(n.width or 0 for n in nodes)
        at, stage, offset = self._take(width), 0, 0
        for n in nodes:
            assert n.width is not None
            loop = self._loop(n.stage, n.width)
            self._use(n, loop)
            loop.lines.append(f"store_n({at} + {offset} + i, {n.name}, {n.width} - i);")
            offset += n.width
            stage = max(stage, n.stage + 1)
        moving = any(n.moving for n in nodes)
        return Node(self._name("v"), width, stage, moving, load=f"load({at} + i)", memory=at)

    def result(self, node: Node) -> None:
        """What the function gives: ``put(i, vector)`` for every vector of it."""
        assert node.width is not None
        loop = self._loop(node.stage, node.width)
        self._use(node, loop)
        loop.lines.append(f"put(i, {node.name});")

    def body(self) -> str:
        """The function's statements."""
        text: list[str] = []
        for stage in range(max(k[0] for k in self._loops) + 1):
            text += self._between.get(stage, [])
            for loop in (v for k, v in self._loops.items() if k[0] == stage):
                text += [*loop.before, f"for (int i = 0; i < {loop.width}; i += W) {{"]
                text += [*(f"    {line}" for line in loop.lines), "}"]
        return "\n        ".join(text)

    def _fold(self, node: Node, start: str, step: str, whole: str) -> Node:
        assert node.width is not None
        loop = self._loop(node.stage, node.width)
        self._use(node, loop)
        made = Node(self._name("s"), None, node.stage + 1, node.moving)
        loop.before.append(f"V f{made.name} = {start};")
        loop.lines.append(step.format(f"f{made.name}", node.name, node.width))
        self._after(made.stage, f"const V {made.name} = {whole.format(f'f{made.name}')};")
        return made

    def _use(self, node: Node, loop: Loop) -> None:
        """Have ``node``'s name mean its columns in ``loop``."""
        if node.width is None or node in loop.known:
            return
        if node.loop is not None:
            self._memory(node)
        loop.lines.append(f"const V {node.name} = {node.load};")
        loop.known.add(node)

    def _memory(self, node: Node) -> str:
        """Where ``node`` lies as floats; it is put there if it does not lie anywhere."""
        if not node.memory:
            assert node.width is not None
            if node.loop is None:  # a captured tensor, or every second column of something
                loop = self._loop(node.stage, node.width)
                self._use(node, loop)
                node.loop = loop
            node.memory = self._take(node.width)
            node.loop.lines.append(f"store({node.memory} + i, {node.name});")
            node.load = f"load({node.memory} + i)"
        return node.memory

    def _take(self, width: int) -> str:
        at = f"room + {self._floats}"
        self._floats += padded(width)
        return at

    def _loop(self, stage: int, width: int) -> Loop:
        return self._loops.setdefault((stage, width), Loop(stage, width))

    def _after(self, stage: int, line: str) -> None:
        self._between.setdefault(stage, []).append(line)

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"
