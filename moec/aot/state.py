"""The values of an entry's constants by their names in the exported program."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.export import ExportedProgram

from moec.aot.errors import AotError
from moec.aot.source import Source, State


def state_of(source: Source, places: Collection[str], programs: Sequence[ExportedProgram]) -> State:
    """Values by name; those that ``source`` brings take the place of what was traced.

    Args:
        source: The model.
        places: Weights that are taken from a checkpoint's files; if there are any, all others were traced.
        programs: The entries.

    Raises:
        AotError: The source lacks a weight, or has one of another shape.
    """
    traced: dict[str, Tensor] = {}
    known: set[str] = set()
    for program in programs:
        traced |= program.state_dict
        traced |= {k: v for k, v in program.constants.items() if isinstance(v, Tensor)}
        known |= program.state_dict.keys()
    if places:
        return {name: value for name, value in traced.items() if name not in places}
    if source.weights is None:
        return traced
    brought = source.weights()
    if missing := sorted(known - brought.keys()):
        raise AotError(
            f"{source.text} brings no weight {missing[0]!r}", hint="does the checkpoint fit its config.json?"
        )
    for name in known:
        if tuple(brought[name].shape) != tuple(traced[name].shape):
            shapes = f"{list(brought[name].shape)}, the model has {list(traced[name].shape)}"
            raise AotError(f"the weight {name!r} of {source.text} is {shapes}")
    return {**traced, **{name: brought[name] for name in known}}
