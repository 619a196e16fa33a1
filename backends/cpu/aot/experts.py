"""``moe.experts`` as embedded code: the generated kernel, and the C++ that places a call's weights for it."""

from __future__ import annotations

from collections.abc import Sequence

from moec.backends.calls import UnsupportedError
from moec.backends.cpu.aot.embedded import Embedded, content_name, kernel_table
from moec.backends.cpu.aot.levels import declared, different
from moec.backends.cpu.source import Shape, read_shape, write_source
from moec.ir.core import Op
from moec.ir.opdef import op_def

_KERNEL = """\
{source}
#include "experts_entry.h"

extern "C" void {export}(const moec_aot::ExpertsArrays* in) {{
    using namespace moec_aot;
    using T = Sizes::T;
    run_experts<Sizes>(*in, [&](Call& c) {{
        const Array* p = in->params;
        (void)p;
        static thread_local const char* tables[{tables}];
        (void)tables;
{place}
    }});
}}
"""
_DISPATCHER = """\
#include "runtime.h"

using Kernel = void (*)(const moec_aot::ExpertsArrays*);
{imports}
extern "C" {declaration} {{
    using namespace moec_aot;
    static Kernel const kernels[LEVELS] = {table};
    Kernel const kernel = choose(kernels);
    Array arrays[{most}];
    if (count != {count}) throw std::runtime_error("{name}: a wrong number of weights");
    for (int64_t i = 0; i < count; i++) arrays[i] = array_of(params[i]);
    ExpertsArrays in{{array_of(x), array_of(ids), array_of(weights), arrays, nullptr, threads(), shared_memory()}};
    if (in.x.sizes[1] > 1 && in.x.strides[1] != 1) throw std::runtime_error("{name}: rows must be contiguous");
    check_contiguous(in.ids, "ids", "{name}");
    check_contiguous(in.weights, "weights", "{name}");
    {check}
    *ret = empty(in.ids.sizes[0], {width}, aoti_torch_dtype_{out}(), &in.out);
    if (in.ids.sizes[0] > 0) kernel(&in);
    return AOTI_TORCH_SUCCESS;
}}
"""
_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def embed_experts(op: Op, target: str, up_nk: bool, down_nk: bool, addressed: bool = False) -> Embedded:
    """The code of a ``moe.experts`` op.

    Args:
        op: Its operands are those of the op in the graph.
        target: ``cpu`` or ``cpu:LEVEL``.
        up_nk, down_nk: Rows of the weights in memory are outputs.
        addressed: In the place of the up and of the down weights stand tables of addresses, i64, because a checkpoint
            holds experts one by one: of gates and then ups, and of downs. Every matrix is contiguous, outputs as rows.

    Raises:
        UnsupportedError: The layer has no such code; the message ends "cannot run this op: ...".
    """
    shape = read_shape(op)
    if shape.ragged:
        raise UnsupportedError("experts differ in their widths")
    if addressed and not addressable(op):
        raise UnsupportedError("weights of this form cannot lie expert by expert")
    levels = different(declared(target), shape.element == "bf16")
    source = write_source(shape, up_nk, down_nk)
    place, tables = _place(op, shape, up_nk, down_nk, addressed)
    sentinels = bool(op_def(op.name).attr(op, "sentinels"))
    parameters = sum(op.groups[3:])
    name = content_name("experts", source, place, str(sentinels), " ".join(isa.name for isa in levels))
    exports = {isa.name: f"{name}_{isa.name}" for isa in levels}
    kernels = {
        level: _KERNEL.format(source=source, export=export, place=place, tables=max(1, tables))
        for level, export in exports.items()
    }
    declaration = (
        f"AOTITorchError aoti_torch_cpu_{name}(AtenTensorHandle x, AtenTensorHandle ids, AtenTensorHandle weights, "
        "const AtenTensorHandle* params, int64_t count, AtenTensorHandle* ret)"
    )
    dispatcher = _DISPATCHER.format(
        imports="\n".join(f'extern "C" void {e}(const moec_aot::ExpertsArrays*);' for e in exports.values()),
        declaration=declaration,
        table=kernel_table(exports),
        most=max(1, parameters),
        count=parameters,
        name=name,
        width=shape.width,
        out=_DTYPES[shape.out],
        check="" if sentinels else f'check_ids(in.ids, {shape.experts}, "{name}");',
    )
    schema = "(Tensor x, Tensor ids, Tensor weights, Tensor[] params) -> Tensor"
    return Embedded(name, schema, declaration, dispatcher, kernels, exports)


def addressable(op: Op) -> bool:
    """Whether one tensor each holds gate and up, and down, of all experts, one after the other with outputs as rows."""
    get = op_def(op.name).attr
    forms = get(op, "up_form"), get(op, "down_form")
    return bool(get(op, "stacked")) and get(op, "layout") in ("concat", "single") and forms == ("nk", "nk")


def _place(op: Op, shape: Shape, up_nk: bool, down_nk: bool, addressed: bool) -> tuple[str, int]:
    """Statements that fill in the matrices of a call, and how many addresses their tables take."""
    get = op_def(op.name).attr
    # "nk" says how the op reads a weight; the rows in memory are its outputs or its inputs.
    rows = {"up": 2 if up_nk == (get(op, "up_form") == "nk") else 3}
    rows["down"] = 2 if down_nk == (get(op, "down_form") == "nk") else 3
    lines: list[str] = []
    at = 0
    tables = 0
    if addressed:
        lines += _addressed(shape)
        at = 2
    stacked = bool(get(op, "stacked"))
    for index, group in enumerate(("up", "down", "up_bias", "down_bias")):
        count = len(op.group(group))
        if (addressed and index < 2) or not count:
            continue
        bias = group.endswith("bias")
        parts = 2 if group.startswith("up") and shape.layout == "separate" else 1
        made = []
        for part in range(parts):
            if stacked:
                row = 1 if bias else rows[group] - 1
                made.append(f"stacked<T>(p[{at + part}], {row})")
            else:
                row = 0 if bias else rows[group] - 2
                made.append(f"listed<T>(p + {at + part * shape.experts}, {shape.experts}, {row}, tables + {tables})")
                tables += shape.experts
        lines += _assign(group, made, shape, up_nk)
        at += count
    for field, group in (("captures", "captures"), ("post_captures", "post_captures")):
        count = len(op.group(group))
        if count:
            lines.append(f"static thread_local const void* {field}[{count}];")
            lines += [f"{field}[{i}] = p[{at + i}].data;" for i in range(count)]
            lines.append(f"c.{field} = {field};")
        at += count
    return "\n".join(f"        {line}" for line in lines), tables


def _assign(group: str, made: Sequence[str], shape: Shape, up_nk: bool) -> list[str]:
    """Gate and up, or one, of the matrix or matrices of an operand group."""
    if group == "down":
        return [f"c.down = {made[0]};"]
    if group == "down_bias":
        return [f"c.down_bias = {made[0]};"]
    if len(made) == 2:
        return [f"c.{group}[{i}] = {m};" for i, m in enumerate(made)]
    lines = [f"c.{group}[0] = {made[0]};"]
    first = f"c.{group}[0]"
    if shape.layout == "concat":
        step = f"{first}.row" if group == "up_bias" or up_nk else "(int64_t)sizeof(T)"
        lines.append(f"c.{group}[1] = after({first}, {shape.inner} * {step});")
    elif shape.layout == "interleaved" and group == "up_bias":
        lines.append(f"c.{group}[1] = after({first}, {first}.row);")
        lines.append(f"c.{group}[0].row *= 2;")
        lines.append(f"c.{group}[1].row *= 2;")
    return lines


def _addressed(shape: Shape) -> list[str]:
    """The matrices of two tables of addresses."""
    up_row, down_row = f"{shape.hidden} * (int64_t)sizeof(T)", f"{shape.inner} * (int64_t)sizeof(T)"
    lines = [f"c.up[{i}] = addressed(p[0], {i * shape.experts}, {up_row});" for i in range(shape.parts)]
    return [*lines, f"c.down = addressed(p[1], 0, {down_row});"]
