"""The whole file of a layer's kernels."""

from __future__ import annotations

from moec.backends.triton.kernels.combine import combine_kernels, row_kernel
from moec.backends.triton.kernels.experts import down_kernels, up_kernel
from moec.backends.triton.kernels.expression import helpers_in
from moec.backends.triton.kernels.gemm import DOT, DOT_INTERPRETED, HELPERS, SCALES
from moec.backends.triton.kernels.places import HELPER as PLACES_HELPER
from moec.backends.triton.kernels.quantize import HELPER, HELPER_INTERPRETED, quantize_kernels
from moec.backends.triton.kernels.rows import RowFunction
from moec.backends.triton.kernels.sort import HELPER as SORT_HELPER
from moec.backends.triton.kernels.sort import sort_kernels
from moec.backends.triton.kernels.text import Kernel, KernelFile
from moec.backends.triton.kernels.vector import down_vector, up_vector
from moec.backends.triton.kernels.warm import HELPER as WARM_HELPER
from moec.backends.triton.kernels.warm import HELPER_INTERPRETED as WARM_HELPER_INTERPRETED
from moec.backends.triton.spec import Spec

HEADER = '''\
"""{title} (generated)."""

import triton
import triton.language as tl


'''


def kernel_file(
    title: str, parts: list[tuple[Kernel, str]], helpers: str = "", interpreted: bool = False
) -> KernelFile:
    """A file of kernels, with the helper functions that their texts call."""
    body = "\n\n".join(text for _, text in parts)
    head = [*helpers_in(body, interpreted), *([helpers] if helpers else [])]
    text = HEADER.format(title=title) + "\n\n".join([*head, body])
    return KernelFile(text, {kernel.name: kernel for kernel, _ in parts})


def write_experts(spec: Spec, interpreted: bool = False) -> KernelFile:
    """The kernels of a layer; the text depends on nothing but ``spec``.

    Args:
        spec: The layer.
        interpreted: For Triton's interpreter, which multiplies no bf16 and does not round to it; ``dot`` and
            ``round_bf16`` differ.
    """
    parts = [*sort_kernels(spec.experts, spec.top_k), up_kernel(spec), *down_kernels(spec)]
    parts += [up_vector(spec), down_vector(spec)]
    if isinstance(spec.activation, RowFunction):
        parts.append(row_kernel(spec, "activation", spec.activation, spec.dtype))
    if spec.post is not None:
        parts.append(row_kernel(spec, "post", spec.post, spec.dtype))
    parts += combine_kernels(spec)
    if spec.fp8:
        parts += quantize_kernels(spec)
    title = (
        f"A MoE layer: {spec.experts} experts of {spec.inner}, {spec.top_k} a token, "
        f"rows of {spec.hidden} {spec.dtype}, {spec.layout}"
    )
    dot = DOT_INTERPRETED if interpreted else DOT
    helpers = [HELPERS, dot, SORT_HELPER, PLACES_HELPER, WARM_HELPER_INTERPRETED if interpreted else WARM_HELPER]
    if spec.fp8:
        helpers += [SCALES, HELPER_INTERPRETED if interpreted else HELPER]
    return kernel_file(title, parts, "\n\n".join(helpers), interpreted)
