"""``moe.regroup`` as embedded code: the planner of the cpu backend and its C function.

It counts in whole numbers, so one instruction set's kernel, the lowest, makes the same plan as any other.
"""

from __future__ import annotations

from moec.backends.cpu.aot.embedded import Embedded, content_name, kernel_table
from moec.backends.cpu.aot.levels import declared
from moec.backends.cpu.regroup import steps_of_an_expert
from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.ir.ops.moe_regroup import Regroup

_KERNEL = """\
#include "regroup_entry.h"

extern "C" void {export}(const moec_aot::RegroupArrays* in) {{
{tables}
    const int64_t tokens = {tokens};
    plan((const void* const*)in->ids, in->rows, {inputs}, in->k, 1, {experts}, {column}, {columns}, in->sizes,
         {batches}, moec_aot::least_of({points}, (double)tokens), {price}, in->there, in->home);
}}
"""
_DISPATCHER = """\
#include "runtime.h"

using Kernel = void (*)(const moec_aot::RegroupArrays*);
extern "C" void {export}(const moec_aot::RegroupArrays*);
extern "C" {declaration} {{
    using namespace moec_aot;
    static Kernel const kernels[LEVELS] = {table};
    Kernel const kernel = choose(kernels);
    const AtenTensorHandle given[] = {{{ids}}};
    const char* ids[{inputs}];
    int64_t rows[{inputs}], sizes[{batches}], k = 0;
    int64_t *there[{batches}], *home[{inputs}];
    for (int i = 0; i < {inputs}; i++) {{
        const Array one = array_of(given[i]);
        check_contiguous(one, "ids", "{name}");
        ids[i] = one.data, rows[i] = one.sizes[0], k = one.sizes[1];
    }}
    for (int i = 0; i < {batches}; i++) sizes[i] = {size};
    AtenTensorHandle* const made[] = {{{made}}};
    for (int i = 0; i < {batches}; i++) *made[i] = empty_vector(sizes[i], &there[i]);
    for (int i = 0; i < {inputs}; i++) *made[{batches} + i] = empty_vector(rows[i], &home[i]);
    const RegroupArrays in{{ids, rows, sizes, k, there, home}};
    kernel(&in);
    return AOTI_TORCH_SUCCESS;
}}
"""


def embed_regroup(op: Op, target: str) -> Embedded:
    """The code of a ``moe.regroup`` op. It takes the ids of every micro-batch, i64 and contiguous."""
    definition = op_def(op.name)
    assert isinstance(definition, Regroup)
    experts, parts, owners, least, size = (
        definition.attr(op, name) for name in ("experts", "parts", "sizes", "least", "expert_bytes")
    )
    inputs, batches = len(op.operands), definition.batches(op)
    level = declared(target)[0].name
    tables: list[str] = []
    column, points = "nullptr", "nullptr, 0"
    if owners:
        ranks = ", ".join(str(rank) for rank, held in enumerate(owners) for _ in range(held))
        tables.append(f"    static const int32_t column[] = {{{ranks}}};")
        column = "column"
    if least:
        pairs = ", ".join(f"{{{float(tokens)!r}, {float(part)!r}}}" for tokens, part in least)
        tables.append(f"    static const double points[][2] = {{{pairs}}};")
        points = f"points, {len(least)}"
    kernel = _KERNEL.format(
        export="{export}",
        tables="\n".join(tables),
        tokens=" + ".join(f"in->rows[{i}]" for i in range(inputs)),
        inputs=inputs,
        experts=experts,
        column=column,
        columns=len(owners) or experts,
        batches=batches,
        points=points,
        price=steps_of_an_expert(size),
    )
    name = content_name("regroup", kernel, str(parts), level)
    export = f"{name}_{level}"
    ids = [f"ids{i}" for i in range(inputs)]
    made = [f"made{i}" for i in range(batches + inputs)]
    takes = [*(f"AtenTensorHandle {i}" for i in ids), *(f"AtenTensorHandle* {m}" for m in made)]
    declaration = f"AOTITorchError aoti_torch_cpu_{name}({', '.join(takes)})"
    dispatcher = _DISPATCHER.format(
        export=export,
        declaration=declaration,
        table=kernel_table({level: export}),
        ids=", ".join(ids),
        inputs=inputs,
        batches=batches,
        made=", ".join(made),
        size=f"(rows[0] + {parts} - 1 - i) / {parts}" if parts else "rows[i]",
        name=name,
    )
    results = ", ".join(["Tensor"] * len(made))
    schema = f"({', '.join(f'Tensor {i}' for i in ids)}) -> ({results})"
    return Embedded(name, schema, declaration, dispatcher, {level: kernel.replace("{export}", export)}, {level: export})
