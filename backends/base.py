"""What a backend is: it says what it supports, lowers one op to an artifact, and loads the artifact as a kernel.

``lower`` needs no device: it may run where the model is compiled, not where it runs. ``load`` runs on the machine that
executes. Inputs and outputs of a kernel are flat lists in the order of the program graph's arguments and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from moec.ir.core import Graph, Op
from moec.ir.types import TensorType


@dataclass(frozen=True)
class Support:
    """Whether a backend takes an op. ``reason`` says why not, as the end of "cannot run this op: ..."."""

    ok: bool
    reason: str = ""

    @staticmethod
    def yes() -> Support:
        return Support(True)

    @staticmethod
    def no(reason: str) -> Support:
        return Support(False, reason)

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class StatusLine:
    """One stage of a backend on this machine.

    Attributes:
        stage: ``emit`` (make the artifact), ``build`` (compile it) or ``run`` (execute it).
        works: True if the stage works here.
        detail: What it uses, or why it does not work and what would mend it.
    """

    stage: str
    works: bool
    detail: str = ""


@dataclass(frozen=True)
class Artifact:
    """What ``lower`` made: everything that ``load`` needs, independent of process and device.

    Attributes:
        backend: Name of the backend that made it and can load it.
        target: Target text it was lowered for (``cpu``, ``cuda:sm90``).
        graph: The program, a graph whose only op besides ``return`` is the one lowered.
        files: Generated sources or binaries by relative name.
    """

    backend: str
    target: str
    graph: Graph
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Advice:
    """What a call does best, as somebody who knows the machine says. Results do not depend on it but by rounding.

    Attributes:
        threads: How many threads finish first.
        library: In a layer of one expert, PyTorch's own GEMMs finish before the kernel does.
    """

    threads: int
    library: bool = False


Adviser = Callable[[int, int], Advice]
"""Advice for a call of so many tokens that may have so many threads at most. It is quick: asked again, it remembers."""


STACKS = 3
"""The first input of a ``moe.experts`` that holds something of every expert."""


def placed(
    found: list[Tensor | None], into: Sequence[Tensor | None], only: Sequence[int] | None = None
) -> list[Tensor | None]:
    """Gradients, those copied that have a place; arguments as for :meth:`Kernel.backward_into`."""
    made = list(found)
    for i, (g, place) in enumerate(zip(found, into, strict=True)):
        if g is None or place is None:
            continue
        made[i] = place
        if only is None or i < STACKS:
            place.copy_(g)
        else:
            for expert in only:
                place[expert].copy_(g[expert])
    return made


class Kernel:
    """A loaded program. It must be deterministic, keep no state between calls and never write into its inputs.

    Attributes:
        adviser: Who is asked how a call should run, or None. Whoever loads a kernel may set it; kernels that have no
            choice do not ask.
    """

    adviser: Adviser | None = None

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """The program's outputs; autograd and autocast are off while it runs. No output may alias an input."""
        raise NotImplementedError

    def backward(
        self, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the inputs.

        Args:
            grads: One per output; None where no gradient arrives (integer outputs always).
            inputs: What ``forward`` was given.
            needs: One per input; True where the gradient is wanted.

        Returns:
            One entry per input: a tensor of the input's shape and type where it is needed, None elsewhere.
        """
        raise NotImplementedError

    def backward_into(
        self,
        grads: Sequence[Tensor | None],
        inputs: list[Tensor],
        needs: Sequence[bool],
        into: Sequence[Tensor | None],
        only: Sequence[int] | None = None,
    ) -> list[Tensor | None]:
        """As :meth:`backward`, with places for some gradients; kernels that can write there spare a copy.

        Args:
            grads: As there.
            inputs: As there.
            needs: As there.
            into: One per input: where its gradient is to be, of its shape and type, with anything in it; None for a
                tensor of its own.
            only: The experts of a ``moe.experts`` that have rows, where nothing but their gradients is wanted. Those of
                stacked weights all have places then, for every expert; the others' stay as they are.
        """
        return placed(self.backward(grads, inputs, needs), into, only)


class PlacingKernel(Kernel):
    """A kernel that can write gradients where they are to be: it defines :meth:`backward_into`, for both."""

    def backward(
        self, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        return self.backward_into(grads, inputs, needs, [None] * len(inputs))


class Backend:
    """Base class of backends. Subclasses are stateless; the class docstring is the backend's reference page.

    Attributes:
        name: What users write in the claim order.
        trainable: True if its kernels have a ``backward``.
        asynchronous: True if its forward never waits for the device. Checks around it then do not wait either.
    """

    name: ClassVar[str]
    trainable: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = False

    def supports(self, op: Op, target: str) -> Support:
        """Whether this backend can execute ``op`` on ``target``. It must not need the target's device to be here."""
        raise NotImplementedError

    def lower(self, graph: Graph, target: str) -> Artifact:
        """Lower a program of one supported op. Backends without generated code keep this default."""
        return Artifact(self.name, target, graph)

    def load(self, artifact: Artifact) -> Kernel:
        """Make the artifact callable on this machine.

        Raises:
            MoecError: This machine cannot run it; ``status`` says the same beforehand.
        """
        raise NotImplementedError

    def status(self) -> list[StatusLine]:
        """What of emit, build and run works on this machine, and why not."""
        raise NotImplementedError


def program_op(graph: Graph) -> Op:
    """The one op of a program graph."""
    ops = [op for op in graph.ops if op.name != "return"]
    if len(ops) != 1:
        raise ValueError(f"graph @{graph.name} is no program: it has {len(ops)} ops besides return, not one")
    return ops[0]


def tensors_only(op: Op) -> Support:
    """Yes if all operands and results are tensors: the runtime ops carry nothing else."""
    for value in (*op.operands, *op.results):
        if not isinstance(value.type, TensorType):
            return Support.no(f"{op.name} has a value {value!r} that is no tensor")
    return Support.yes()
