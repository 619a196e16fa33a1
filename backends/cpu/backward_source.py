"""The C++ source of one layer's backward: its sizes, types and the activation's derivative around ``backward.h``."""

from __future__ import annotations

from moec.backends.cpu.cpp import C_TYPES, boolean
from moec.backends.cpu.source import Shape

_TEMPLATE = """\
#include "backward.h"

using namespace moec;

namespace {{
struct Sizes {{
    using T = {element};
    using Weight = {weight};
    using Out = T;
    static constexpr int E = {experts}, K = {hidden}, I = {inner}, N = {width}, PARTS = {parts};
    static constexpr bool UP_NK = {up_nk}, DOWN_NK = {down_nk}, PAIRED = {paired};
    static constexpr bool UP_BIAS = {up_bias}, DOWN_BIAS = {down_bias};
    static inline void backward(V g, V u, V da, const void* const* captures, int i, int n, V& a, V& dg, V& du) {{
        {body}
    }}
}};
}}

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void moec_backward(const BackwardCall* call) {{ Backward<Sizes>(*call).run(); }}
EXPORT int64_t moec_plan(int64_t ids, int64_t tokens, int64_t top_k, int64_t threads, int64_t ints) {{
    return Plan<Sizes>::make((const int64_t*)ids, tokens, top_k, threads, (int32_t*)ints);
}}
EXPORT int64_t moec_bytes(int64_t rows, int64_t slots, int64_t threads) {{
    return Plan<Sizes>::bytes(rows, slots, threads);
}}
"""


def write_backward(shape: Shape, body: str, up_nk: bool, down_nk: bool) -> str:
    """The source for weights whose rows are outputs (``nk``) or inputs (``kn``), as they lie in memory.

    Args:
        shape: The layer.
        body: From ``compile_derivative``.
        up_nk, down_nk: The forms.
    """
    return _TEMPLATE.format(
        element=C_TYPES[shape.element],
        weight=C_TYPES[shape.weight],
        experts=shape.experts,
        hidden=shape.hidden,
        inner=shape.inner,
        width=shape.down,
        parts=shape.parts,
        body=body,
        up_nk=boolean(up_nk),
        down_nk=boolean(down_nk),
        paired=boolean(shape.layout == "interleaved"),
        up_bias=boolean(shape.up_bias),
        down_bias=boolean(shape.down_bias),
    )
