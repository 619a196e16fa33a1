"""The layers' kernels in Triton's interpreter against the definition and a plain loop, amid memory full of NaN."""

from __future__ import annotations

import pytest
import torch

from moec.backends.base import program_op
from moec.backends.reference import run_graph
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launcher import Launcher
from moec.backends.triton.spec import read_spec
from moec.ir.attributes import Operand
from moec.ir.core import Graph, Op
from moec.ir.types import TensorType
from tests.backends.cases import SKEWS, ExpertsCase, call, case_id, close, loop_experts, relative_error
from tests.backends.triton.layers import LAUNCHES, around, run

pytestmark = pytest.mark.usefixtures("interpreter")
TOLERANCE = {"f32": 3e-6, "f16": 2e-3, "bf16": 1.6e-2}
"""A few units in the last place of the type: sums are taken in another order than the reference's."""
SIZES = {"hidden": 20, "inner": 24}  # neither is a multiple of a tile
CASES = [
    ExpertsCase(**SIZES),
    ExpertsCase("interleaved", bias=True, dtype="bf16", weight_dtype="f32", **SIZES),
    ExpertsCase("interleaved", "kn", "kn", bias=True, dtype="f16", **SIZES),
    ExpertsCase("separate", "kn", "nk", captures=True, dtype="bf16", **SIZES),
    ExpertsCase("separate", stacked=False, bias=True, sentinels=True, **SIZES),
    ExpertsCase("single", "nk", "kn", dtype="f16", weight_dtype="f32", sentinels=True, **SIZES),
    ExpertsCase("rows", post=True, bias=True, sentinels=True, **SIZES),
    ExpertsCase("rows", "kn", "kn", captures=True, dtype="bf16", **SIZES),
    ExpertsCase("concat", stacked=False, dtype="bf16", post=True, **SIZES),
    ExpertsCase(experts=1, top_k=1, **SIZES),
    ExpertsCase("separate", stacked=False, bias=True, experts=1, top_k=1, **SIZES),
    ExpertsCase(top_k=5, dtype="f16", **SIZES),
]
TOKENS = {"gemm": (0, 1, 5, 33), "wide": (130,), "gemv": (0, 1, 5)}


@pytest.mark.parametrize("shift", [0, 1])
def test_weights_behind_addresses_may_begin_anywhere(shift: int) -> None:
    """Kernels count on multiples of 16 only where all addresses are."""
    case = ExpertsCase("separate", stacked=False, **SIZES)
    inputs = case.inputs(5)
    (want,) = run_graph(case.graph(), inputs)
    at = next(i for i, t in enumerate(inputs) if i > 2 and t.dim() == 2)
    weight = inputs[at]
    inputs[at] = torch.empty(weight.numel() + shift)[shift:].view(weight.shape).copy_(weight)
    texts: list[str] = []

    def seen(text: str) -> str:
        texts.append(text)
        return text

    assert relative_error(run(case, LAUNCHES["gemm"], inputs, seen), want) <= TOLERANCE["f32"]
    assert ("multiple_of" in texts[-1]) == (not shift)


def _check(case: ExpertsCase, launch: str, tokens: int, skew: str) -> None:
    inputs = case.inputs(tokens, skew)
    (want,) = run_graph(case.graph(), inputs)
    got = run(case, LAUNCHES[launch], [around(t) for t in inputs])
    assert got.dtype == want.dtype
    assert relative_error(got, want) <= TOLERANCE[case.dtype], (launch, tokens, skew)
    if case.dtype == "f32":
        assert relative_error(got, loop_experts(case, inputs)) <= TOLERANCE[case.dtype], (launch, tokens, skew)


@pytest.mark.parametrize("form", TOKENS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_kind_of_layer(case: ExpertsCase, form: str) -> None:
    for i, tokens in enumerate(TOKENS[form]):
        _check(case, form, tokens, SKEWS[(i + CASES.index(case)) % len(SKEWS)])


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_way_to_launch(launch: str, skew: str) -> None:
    case = ExpertsCase("interleaved", bias=True, sentinels=True, **SIZES)
    for tokens in (1, 33):
        _check(case, launch, tokens, skew)


@pytest.mark.parametrize("nk", [True, False])
def test_weights_that_lie_transposed_to_what_the_op_says(nk: bool) -> None:
    """A transposed view has the strides of the other form; it is read as it lies."""
    case = ExpertsCase(up_form="nk" if nk else "kn", down_form="nk" if nk else "kn", **SIZES)
    inputs = case.inputs(33)
    (want,) = run_graph(case.graph(), inputs)
    turned = [t.mT.contiguous().mT if t.dim() == 3 else t for t in inputs]
    assert relative_error(run(case, LAUNCHES["gemm"], turned), want) <= TOLERANCE["f32"]


GATED = {
    "gpt_oss": [
        ("clamp.default", 0, None, 0.5),
        ("sigmoid.default", -1),
        ("mul.Tensor", -2, -1),
        ("mul.Tensor", -1, 1),
    ],
    "gelu_tanh": [("gelu.default", 0, "tanh"), ("mul.Tensor", -1, 1)],
    "gelu": [("gelu.default", 0), ("mul.Tensor", -1, 1)],
    "tanh_of_both": [("tanh.default", 0), ("rsub.Scalar", 1, 1.5), ("maximum.default", -1, -2)],
    "powers": [("pow.Tensor_Scalar", 0, 3), ("div.Tensor", -1, 7.0), ("abs.default", 1), ("sub.Tensor", -2, -1)],
    "softplus": [("softplus.default", 0), ("mish.default", 1), ("add.Tensor", -1, -2)],
}
ALONE = {
    "relu_squared": [("relu.default", 0), ("mul.Tensor", -1, -1)],
    "silu": [("silu.default", 0)],
    "gelu": [("gelu.default", 0), ("mul.Tensor", -1, 1.5)],
}
"""Of experts without a gate."""
ACTIVATIONS = [(name, "interleaved") for name in GATED] + [(name, "single") for name in ALONE]


def _activation(steps: list[tuple[object, ...]], dtype: str, rows: int) -> Graph:
    """A region of rows. Ints in a step are values: 0 (and 1) the rows, negative ones those of earlier steps."""
    g = Graph("activation")
    values = [g.add_arg(TensorType.of(dtype, "R", SIZES["inner"])) for _ in range(rows)]
    for target, *args in steps:
        if args[-1] == "tanh":
            kwargs = {"approximate": "tanh"}
            attrs = {"target": f"aten.{target}", "args": (Operand(0),), "kwargs": kwargs}
            values.append(g.append(Op("torch.call", [values[0]], [values[0].type], attrs=attrs)).result)
            continue
        power = target == "pow.Tensor_Scalar"
        found = [values[a] if isinstance(a, int) and not (power and i) else a for i, a in enumerate(args)]
        values.append(call(g, str(target), *found))
    return close(g, values[-1])


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("name", "layout"), ACTIVATIONS)
def test_activations_are_generated(name: str, layout: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles, and in every other form in turn, with every skew in turn."""
    at = ACTIVATIONS.index((name, layout)) + len(ACTIVATIONS) * list(TOLERANCE).index(dtype)
    steps, rows = (GATED[name], 2) if layout == "interleaved" else (ALONE[name], 1)
    monkeypatch.setattr(ExpertsCase, "activation", lambda self: _activation(steps, self.dtype, rows))
    case = ExpertsCase(layout, dtype=dtype, weight_dtype="f32", sentinels=at % 2 > 0, **SIZES)
    other = list(LAUNCHES)[1 + at % (len(LAUNCHES) - 1)]
    for launch, tokens in (("gemm", 33), (other, 130 if other == "wide" else 5)):
        inputs = case.inputs(tokens, SKEWS[at % len(SKEWS)])
        (want,) = run_graph(case.graph(), inputs)
        got = run(case, LAUNCHES[launch], [around(t) for t in inputs])
        assert relative_error(got, want) <= 2 * TOLERANCE[dtype], launch


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("launch", [name for name in LAUNCHES if name not in ("gemm", "wide", "gemv")])
def test_narrow_types_in_every_form(launch: str, dtype: str) -> None:
    """The forms that the layers above are not launched in."""
    case = ExpertsCase("concat", bias=True, dtype=dtype, weight_dtype="f32", **SIZES)
    for tokens, skew in ((0, "uniform"), (5, "half_empty"), (33, "one_expert")):
        _check(case, launch, tokens, skew)


def test_rows_of_no_slot_are_left_out() -> None:
    """A function of whole rows between the GEMMs is computed for the rows that there are, and no other is written."""
    case = ExpertsCase("rows", **SIZES)
    spec = read_spec(program_op(case.graph()))
    source, result = torch.ones(48, SIZES["inner"]), torch.full((48, SIZES["inner"]), float("nan"))
    rows = torch.zeros(48, dtype=torch.int32)  # past the blocks in use nobody has said which rows there are
    rows[:32] = -1
    rows[[0, 1, 16]] = torch.tensor([2, 5, 1], dtype=torch.int32)
    given = {"source": source, "result": result, "rows": rows, "used": torch.tensor([2], dtype=torch.int32)}
    Launcher(write_experts(spec, True))("activation", 16, given, {"BLOCK_M": 16})
    assert (~result.isnan().any(1)).nonzero().flatten().tolist() == [0, 1, 16]


MUTANTS = {
    "rows of tokens": ("(slot // 3).to(tl.int64) * x_s", "(slot // 3).to(tl.int64) * (x_s - 1)"),
    "token of a slot": ("slot // 3", "slot % 3"),
    "experts of a weight": ("expert.to(tl.int64) * w_se", "expert.to(tl.int64) * (w_se + 1)"),
    "rows of a weight": ("[None, :] * w_s + k_in", "[None, :] * (w_s + 1) + k_in"),
    "inputs that are there": ("inside = (k_in < 20)", "inside = (k_in < 21)"),
    "inputs of a weight": ("there = (k_in < 20)[:, None]", "there = (k_in < 21)[:, None]"),
    "columns that are stored": ("(column < 24)[None, :]", "(column < 23)[None, :]"),
    "up after gate": ("column_in + 24", "column_in + 23"),
    "rows of the activation": ("row.to(tl.int64) * 24", "row.to(tl.int64) * 23"),
    "swizzle": ("within // size", "within // (size + 1)"),
    "weight of a slot": ("tl.load(weights + slot)", "tl.load(weights + token)"),
    "choices of a token": ("slot = token * 3 + j", "slot = token * 3 + 2 - j // 2"),
}


ROW_MUTANTS = {
    "rows of blocks in use": ("row >= tl.load(used) * BLOCK_M", "row >= tl.load(used)"),
    "rows of a slot": ("tl.load(rows + row) < 0", "tl.load(rows + row) < 1"),
    "the row itself": ("at = source + row * 24", "at = source + row * 23"),
}


@pytest.mark.parametrize("name", ROW_MUTANTS)
def test_a_wrong_row_shows(name: str) -> None:
    old, new = ROW_MUTANTS[name]
    case = ExpertsCase("rows", **SIZES)
    inputs = case.inputs(9)
    (want,) = run_graph(case.graph(), inputs)

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    assert not relative_error(run(case, LAUNCHES["gemm"], inputs, change), want) <= TOLERANCE["f32"]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_stride_or_mask_shows(name: str) -> None:
    """Each changes one stride, mask or index of the kernels' text; the comparison must then fail."""
    old, new = MUTANTS[name]
    case = ExpertsCase(**SIZES)
    inputs = case.inputs(9)
    (want,) = run_graph(case.graph(), inputs)

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    got = run(case, LAUNCHES["gemm"], [around(t) for t in inputs], change)
    error = relative_error(got, want)
    assert not error <= TOLERANCE["f32"]


TALL_MUTANTS = {
    "place of a program": ("tl.load(places + tl.program_id(0))", "tl.load(places)"),
    "first block of a tile": ("(place >> 35)", "(place >> 36)"),
    "expert of a tile": ("(place >> 19) & 65535", "(place >> 19) & 1"),
    "column of a tile": ("(place >> 3) & 65535", "(place >> 3) & 0"),
    "height of a tile": ("units_of(place) == units:", "units_of(place) % 2 == units:"),
    "rows of the second accumulator": ("first + ROWS + tl.arange", "first + tl.arange"),
    "where its sums go": ("first + ROWS, column_block", "first, column_block"),
    "right columns": ("column_block * 2 + 1,", "column_block * 2,"),
    "columns of a half": ("(sums, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)", "(sums, (ROWS, COLUMNS // 2, 2)), (0, 1, 2)"),
}


@pytest.mark.parametrize("name", [None, *TALL_MUTANTS])
def test_a_wrong_place_in_a_tall_tile_shows(name: str | None) -> None:
    """Tiles of one to four blocks, whose sums of the down GEMM are shared by two programs; unchanged, it agrees."""
    old, new = ("", "") if name is None else TALL_MUTANTS[name]
    case = ExpertsCase(**SIZES)
    inputs = case.inputs(60, "one_expert")
    (want,) = run_graph(case.graph(), inputs)

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new) if old else text

    got = run(case, LAUNCHES["four blocks, split"], [around(t) for t in inputs], change)
    assert (relative_error(got, want) <= TOLERANCE["f32"]) == (name is None)


def test_the_same_input_gives_the_same_bits() -> None:
    case = ExpertsCase(dtype="bf16", weight_dtype="f32", **SIZES)
    inputs = case.inputs(9)
    assert torch.equal(run(case, LAUNCHES["gemm"], inputs), run(case, LAUNCHES["gemm"], inputs))
    one = [t[5:6] if i < 3 else t for i, t in enumerate(inputs)]
    assert torch.equal(run(case, LAUNCHES["gemm"], one), run(case, LAUNCHES["gemm"], inputs)[5:6])
