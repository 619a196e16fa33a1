"""An IR graph as an ``ExportedProgram`` again.

The graph may have been rewritten between, but it must still take the program's inputs and give its outputs: as many,
in the same order. Names may change; the signature follows them.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument

from moec.emit.emitter import LowerOp
from moec.emit.errors import EmitError
from moec.emit.fx import graph_to_fx
from moec.ir.core import Graph

_FIXED_FORM = "a pass may not add or drop arguments or outputs of an exported graph"


def to_exported(graph: Graph, program: ExportedProgram, *, lower_op: LowerOp | None = None) -> ExportedProgram:
    """Emit ``graph`` with the state, signature and shape ranges of ``program``.

    Args:
        graph: From ``moec.capture.from_exported(program)``, rewritten or not.
        program: The program it was captured from. It is not changed; parameters are shared, not copied.
        lower_op: Emits ops that are not of the torch dialect.

    Returns:
        A new program. Tensor constants that passes added are lifted to inputs, as export itself does.

    Raises:
        EmitError: The number of inputs or outputs changed, an op cannot be emitted, or the value of a call with
            nested graphs is not known because the graph was read from text.
    """
    inputs = program.graph.find_nodes(op="placeholder")
    if len(inputs) != len(graph.args):
        raise EmitError(
            f"the exported program has {len(inputs)} inputs, the graph now has {len(graph.args)}", hint=_FIXED_FORM
        )
    values = [node.meta.get("val") for node in inputs]
    gm = graph_to_fx(graph, lower_op=lower_op, root=program.graph_module, values=values)
    signature = _signature(gm, program.graph_signature)
    constants = dict(program.constants)
    _lift_constants(gm, signature, constants)
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.users and "val" not in node.meta:
            raise EmitError(
                f"the value of {node.format_node()} is not known, and an exported program must record it",
                hint="calls with nested graphs keep their values only in the process that captured them",
            )
    gm.graph.lint()
    gm.recompile()
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=list(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )


def _signature(gm: torch.fx.GraphModule, old: ExportGraphSignature) -> ExportGraphSignature:
    """``old`` with the names of the nodes of ``gm``."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    outputs = gm.graph.output_node().args[0]
    if not isinstance(outputs, (tuple, list)):
        raise EmitError("an exported program returns a tuple", hint="keep the return's form when rewriting the graph")
    if len(outputs) != len(old.output_specs):
        raise EmitError(
            f"the exported program has {len(old.output_specs)} outputs, the graph now has {len(outputs)}",
            hint=_FIXED_FORM,
        )
    renamed = {spec.arg.name: node.name for spec, node in zip(old.input_specs, placeholders, strict=True)}
    new = copy.deepcopy(old)
    renaming: list[InputSpec | OutputSpec] = [*new.input_specs, *new.output_specs]
    for spec, node in zip(renaming, (*placeholders, *outputs), strict=True):
        if isinstance(node, torch.fx.Node):
            renamed.setdefault(spec.arg.name, node.name)
            spec.arg = dataclasses.replace(spec.arg, name=node.name)
    for out in new.output_specs:  # a mutated user input is named by its placeholder
        if out.target in renamed and out.kind.name == "USER_INPUT_MUTATION":
            out.target = renamed[out.target]
    return new


def _lift_constants(gm: torch.fx.GraphModule, signature: ExportGraphSignature, constants: dict[str, Any]) -> None:
    """Turn ``get_attr`` nodes of tensors into inputs, before the first user input."""
    specs = signature.input_specs
    place = next((i for i, s in enumerate(specs) if s.kind == InputKind.USER_INPUT), len(specs))
    placeholders = gm.graph.find_nodes(op="placeholder")
    anchor = placeholders[place] if place < len(placeholders) else next(iter(gm.graph.nodes))
    mode = detect_fake_mode([n.meta.get("val") for n in placeholders])
    for node in gm.graph.find_nodes(op="get_attr"):
        value = _attribute(gm, node.target)
        if not isinstance(value, torch.Tensor):
            continue
        name, count = f"lifted_moec_{node.name}", 0
        while name in constants:
            count += 1
            name = f"lifted_moec_{node.name}_{count}"
        with gm.graph.inserting_before(anchor):
            lifted = gm.graph.placeholder(f"c_{name}")
        lifted.target = lifted.name
        lifted.meta = {**node.meta, "val": mode.from_tensor(value, static_shapes=True) if mode else value}
        node.replace_all_uses_with(lifted)
        gm.graph.erase_node(node)
        specs.insert(place, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=lifted.name), name))
        place += 1
        constants[name] = value.detach()


def _attribute(gm: torch.fx.GraphModule, target: Any) -> Any:
    value: Any = gm
    for part in str(target).split("."):
        value = getattr(value, part)
    return value
