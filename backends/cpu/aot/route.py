"""``moe.route`` as embedded code: the generated kernel and its C function."""

from __future__ import annotations

from moec.backends.cpu.aot.embedded import Embedded, content_name, kernel_table
from moec.backends.cpu.aot.levels import declared, different
from moec.backends.cpu.route_source import read_router, write_router
from moec.ir.core import Op

_KERNEL = """\
{source}
#include "route_entry.h"

extern "C" void {export}(const moec_aot::RouteArrays* in) {{ moec_aot::run_route<Kind>(*in); }}
"""
_DISPATCHER = """\
#include "runtime.h"

using Kernel = void (*)(const moec_aot::RouteArrays*);
{imports}
extern "C" {declaration} {{
    using namespace moec_aot;
    static Kernel const kernels[LEVELS] = {table};
    Kernel const kernel = choose(kernels);
    RouteArrays in{{}};
    in.logits = array_of(logits);
    {bias}
    if (in.logits.sizes[1] > 1 && in.logits.strides[1] != 1)
        throw std::runtime_error("{name}: logits must be contiguous");
    in.threads = threads();
    *weights = empty(in.logits.sizes[0], {k}, aoti_torch_dtype_{out}(), &in.weights);
    char* ids_at;
    *ids = empty(in.logits.sizes[0], {k}, aoti_torch_dtype_int64(), &ids_at);
    in.ids = (int64_t*)ids_at;
    kernel(&in);
    return AOTI_TORCH_SUCCESS;
}}
"""
_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def embed_route(op: Op, target: str) -> Embedded:
    """The code of a ``moe.route`` op; it takes the logits and, where it uses one, the bias.

    Raises:
        UnsupportedError: The router has no such code; the message ends "cannot run this op: ...".
    """
    router = read_router(op)
    levels = different(declared(target), bf16=False)
    source = write_router(router)
    name = content_name("route", source, " ".join(isa.name for isa in levels))
    exports = {isa.name: f"{name}_{isa.name}" for isa in levels}
    parameters = "AtenTensorHandle logits" + (", AtenTensorHandle bias" if router.bias else "")
    declaration = (
        f"AOTITorchError aoti_torch_cpu_{name}({parameters}, AtenTensorHandle* weights, AtenTensorHandle* ids)"
    )
    dispatcher = _DISPATCHER.format(
        imports="\n".join(f'extern "C" void {e}(const moec_aot::RouteArrays*);' for e in exports.values()),
        declaration=declaration,
        table=kernel_table(exports),
        bias="in.bias = array_of(bias);" if router.bias else "",
        k=router.k,
        out=_DTYPES[router.out],
        name=name,
    )
    schema = f"(Tensor logits{', Tensor bias' if router.bias else ''}) -> (Tensor, Tensor)"
    return Embedded(
        name,
        schema,
        declaration,
        dispatcher,
        {level: _KERNEL.format(source=source, export=export) for level, export in exports.items()},
        exports,
    )
