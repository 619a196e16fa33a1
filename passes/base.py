"""What a pass is, what it is given, and what it hands back.

A pass is a frozen dataclass whose fields are its options on the command line. It holds nothing else: verification,
timing, printing, fuel and crash reports belong to the manager (:mod:`moec.passes.manager`).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from moec.ir.core import Graph, Location, Op
from moec.ir.errors import MoecError

REMARK_KINDS = ("applied", "missed", "note")
BLOCK, SHARED_EXPERT, WITH_SHARED = "block", "shared expert", "block with its shared expert"
"""What a graph may be cut out of its model as. Of the last, the last result is the shared expert's."""


class PassClass(enum.Enum):
    """What a pass may do to the numbers; the test harness takes its tolerance from it."""

    BITWISE = "bitwise"
    """The same bits come out."""
    REORDERS = "reorders"
    """Sums are associated differently; the pass states its tolerance."""
    APPROX = "approx"
    """Lossy: opt-in, and the pass reports its loss."""


class PassError(MoecError):
    """A pass raised, or left a graph that breaks the rules of the IR.

    Attributes:
        pass_name: The pass that did it.
        excerpt: The op within a few lines of its graph, where the verifier found it broken; else "".
    """

    code = "pass-failed"
    excerpt = ""

    def __init__(
        self, message: str, *, pass_name: str, op: str | None = None, source: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, op=op, source=source, hint=hint)
        self.pass_name = pass_name

    def __str__(self) -> str:
        first, _, rest = super().__str__().partition("\n")
        return "\n".join(part for part in (first, self.excerpt, rest) if part)


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        modified: True if the graph differs from what it was. False must be true to the letter.
        stats: Counts for ``--stats``, by a short name (``"merged"``).
    """

    modified: bool
    stats: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Remark:
    """One thing a pass did (``applied``), did not do and why (``missed``), or noticed (``note``).

    Attributes:
        kind: One of :data:`REMARK_KINDS`.
        pass_name: Who says it.
        message: One sentence.
        op_text: The op concerned as IR text when the remark was made, or "".
        module: Dotted path of the nn.Module it came from, or "".
        source: ``file.py:123: the line`` of the user's model, or "".
    """

    kind: str
    pass_name: str
    message: str
    op_text: str = ""
    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        where = f" [{self.source or self.module}]" if self.source or self.module else ""
        return f"{self.kind}: {self.pass_name}: {self.message}{where}"


@dataclass
class Fuel:
    """How many rewrites may still happen. Bisecting lowers ``limit`` until the first harmful rewrite is the last one.

    Attributes:
        limit: Rewrites allowed over the whole pipeline; None for any number.
        spent: Rewrites made so far.
        last: The last rewrite made: (pass, what, op text), or None.
    """

    limit: int | None = None
    spent: int = 0
    last: tuple[str, str, str] | None = None

    def take(self, pass_name: str, what: str, op: Op | None = None) -> bool:
        """Ask leave for one rewrite, right before making it. False: do not make it, nor any after it."""
        if self.limit is not None and self.spent >= self.limit:
            return False
        self.spent += 1
        # Only a limited run will be asked which rewrite was the last; printing every op costs too much otherwise.
        at_limit = self.limit is not None and self.spent == self.limit
        self.last = (pass_name, what, op_text(op) if at_limit and op is not None else "")
        return True


@dataclass
class PassContext:
    """What the surroundings offer a pass. A pass that needs something absent says so in a remark; it invents nothing.

    Attributes:
        target: Description of the machine compiled for, or None.
        cost_model: Estimates of time per op (``moec.op_costs.OpCosts``), or None.
        profile: Measured routing statistics, or None.
        options: Further options by name, as the caller gave them.
        cut_as: What the graph was cut out of its model as (:data:`BLOCK`, :data:`SHARED_EXPERT`,
            :data:`WITH_SHARED`); "" for a whole program.
        left: What stays as it is because nobody could run what it would become: the name of the pass that would change
            it, and the location that the op it becomes would have.
        deterministic: Gradients are to keep their bits, whatever that costs.
        remarks: All remarks so far, in order.
        fuel: Budget of rewrites; the manager sets it.
    """

    target: Any = None
    cost_model: Any = None
    profile: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    cut_as: str = ""
    left: Collection[tuple[str, Location]] = ()
    deterministic: bool = False
    remarks: list[Remark] = field(default_factory=list)
    fuel: Fuel = field(default_factory=Fuel)

    def remark(self, kind: str, pass_name: str, message: str, op: Op | None = None) -> Remark:
        """Record a remark; the op's text and source are taken now, before it is rewritten.

        Raises:
            ValueError: ``kind`` is not one of :data:`REMARK_KINDS`.
        """
        if kind not in REMARK_KINDS:
            raise ValueError(f"a remark is one of {REMARK_KINDS}, not {kind!r}")
        made = (
            Remark(kind, pass_name, message)
            if op is None
            else Remark(kind, pass_name, message, op_text(op), op.loc.module, op.loc.source)
        )
        self.remarks.append(made)
        return made

    def leaves(self, pass_name: str, op: Op) -> bool:
        """Whether ``op`` is where something stays as it is; a remark then says so."""
        if (pass_name, op.loc) not in self.left:
            return False
        self.remark("missed", pass_name, "it stays as it is: no backend takes what it would become", op)
        return True

    def take_fuel(self, pass_name: str, what: str, op: Op | None = None) -> bool:
        """Ask leave for one rewrite (see :meth:`Fuel.take`)."""
        return self.fuel.take(pass_name, what, op)


def op_text(op: Op) -> str:
    """The op as one piece of IR text."""
    from moec.ir.printer import print_op  # torch-free passes should not pay for the printer until they speak

    return print_op(op)


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses; the class docstring is the pass's reference page.

    Attributes:
        name: Its name on the command line, lower case with hyphens.
        pass_class: What it may do to the numbers.
        tolerance: Largest relative error of a ``REORDERS`` or ``APPROX`` pass; 0 for ``BITWISE``.
        summary: One line for ``moec passes``; the docstring's first line where it is left empty.
    """

    name: ClassVar[str]
    pass_class: ClassVar[PassClass]
    tolerance: ClassVar[float] = 0.0
    summary: ClassVar[str] = ""

    @property
    def micro_batches(self) -> int:
        """How many micro-batches of a layer it wants to see in one graph; the door that cuts out blocks asks."""
        return 1

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        """Rewrite ``graph`` in place."""
        raise NotImplementedError(f"pass {self.name!r} does nothing yet")
