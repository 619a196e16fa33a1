"""The code of layers that are alike: AOTInductor's C++ of one, as an object with one C function.

AOTInductor makes a class of every program, under one name. In the object of a layer nothing is seen from outside but
the function that calls it, so that many of them come together in one library.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from moec import __version__
from moec.aot.inductor import InductorError, generate, settings
from moec.aot.lowering import Embedding
from moec.aot.region import Region
from moec.backends.cpu.aot import compile_object, object_path

_INTERFACE = re.compile(
    r"(?<=#include <torch/csrc/inductor/aoti_include/cpu.h>\n).*?^\} // extern \"C\"$", re.DOTALL | re.MULTILINE
)
"""What a library shows of a model: nobody loads a layer alone."""
_CHECKS = re.compile(
    r"^AOTI_NOINLINE static void check_input_\d+\(.*?^\}$|^ *check_input_\d+\(input_handles\);$",
    re.DOTALL | re.MULTILINE,
)
"""Of a model's inputs, at request: a layer's come from the program."""
_ENTRY = """
extern "C" {declaration} {{
    using namespace torch::aot_inductor;
    static AOTInductorModel model(
        std::make_shared<ConstantMap>(), std::make_shared<std::vector<ConstantHandle>>(), "cpu", std::nullopt);
    const AtenTensorHandle given[] = {{{given}}};
    AtenTensorHandle in[{arguments}], out[{results}];
    for (int i = 0; i < {arguments}; i++) AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(given[i], &in[i]));
    model.run_impl(in, out, nullptr, nullptr);
{take}
    return AOTI_TORCH_SUCCESS;
}}
"""


def layer_object(region: Region, embedding: Embedding) -> Path:
    """The object file of a layer, from the cache where it is there.

    Raises:
        InductorError: Inductor fails, or makes something of the layer that has weights of its own.
        BuildError: The compiler fails.
    """
    options = settings(embedding, None)
    del options["aot_inductor.custom_ops_to_c_shims"]  # those that it calls are named in it
    parts = (__version__, torch.__version__, region.name, embedding.target, str(sorted(options.items())))
    path = object_path(hashlib.sha256("\0".join(parts).encode()).hexdigest())
    if not path.exists():
        source, flags = generate(region.module, embedding)
        if "constants_info_[" in source:
            raise InductorError(f"a layer of the program has constants: {region.name}")
        compile_object(_with_entry(source, region), flags, f"aoti_torch_cpu_{region.name}", path)
    return path


def _with_entry(source: str, region: Region) -> str:
    count, results = len(region.arguments), len(region.results)
    entry = _ENTRY.format(
        declaration=region.declaration,
        given=_list(f"a{i}" for i in range(count)),
        arguments=count,
        results=results,
        take="\n".join(f"    *r{i} = out[{i}];" for i in range(results)),
    )
    model = "#include <torch/csrc/inductor/aoti_runtime/model.h>"
    return _CHECKS.sub("", _INTERFACE.sub(model, source, count=1)) + entry


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)
