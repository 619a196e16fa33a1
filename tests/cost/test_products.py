"""Products of matrices on devices that nobody measured: by hand, and what must hold of any."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.cost.products import EFFICIENCY, Product, product_seconds, whole_rows
from moec.targets import parse_target

HOPPER, BLACKWELL, AMPERE = (parse_target(f"cuda:{n}") for n in ("sm90", "sm100", "sm80"))
LARGE = Product(8192, 7168, 4096, groups=4, item=1, weight_item=1)


def test_a_large_product_by_hand() -> None:
    rate = HOPPER.flops_per_s("f8e4m3fn")
    summed = 2 * 4 * 8192 * 7168 * 4096 / (rate * EFFICIENCY)
    written = 4 * 8192 * 4096 * 2 / HOPPER.memory_bandwidth
    assert product_seconds(LARGE, HOPPER, rate) == pytest.approx(summed + written)


def test_a_short_sum_costs_more_an_operation_where_one_block_fills_a_multiprocessor() -> None:
    short = replace(LARGE, inputs=2048, outputs=7168)

    def per_flop(product: Product, name: str) -> float:
        target = parse_target(name)
        seconds = product_seconds(product, target, target.flops_per_s("f8e4m3fn"))
        return seconds / (product.rows * product.inputs * product.outputs)

    assert per_flop(short, "cuda:sm90") > 1.1 * per_flop(LARGE, "cuda:sm90")
    assert per_flop(short, "cuda:sm100") == pytest.approx(per_flop(LARGE, "cuda:sm100")), "written under the next sum"
    assert per_flop(short, "cuda:sm103") == pytest.approx(per_flop(LARGE, "cuda:sm103")), "described as the same"


def test_few_rows_are_a_tile_or_the_weights() -> None:
    one = Product(1, 4096, 4096)
    seconds = product_seconds(one, HOPPER, HOPPER.flops_per_s("bf16"))
    assert seconds == pytest.approx(one.bytes / HOPPER.memory_bandwidth)
    slow = 1e12
    assert product_seconds(one, BLACKWELL, slow) == pytest.approx(2 * 128 * 4096 * 4096 / (slow * EFFICIENCY))
    assert [whole_rows(r, HOPPER) for r in (0, 1, 128, 129)] == [0, 128, 128, 256]
    assert product_seconds(Product(0, 4096, 4096), HOPPER, slow) == 0.0


@given(
    st.floats(1, 1e5), st.floats(1, 1e5), st.integers(16, 8192), st.integers(16, 8192), st.integers(1, 64),
    st.sampled_from([HOPPER, BLACKWELL, AMPERE]),
)  # fmt: skip
def test_no_product_beats_its_bytes_or_its_arithmetic(a, b, inputs, outputs, groups, target) -> None:  # type: ignore[no-untyped-def]
    few, many = (Product(r, inputs, outputs, groups) for r in sorted((a, b)))
    rate = target.flops_per_s("bf16")
    found = product_seconds(many, target, rate)
    assert found >= product_seconds(few, target, rate) * (1 - 1e-9), "more rows take no less time"
    assert found >= many.bytes / target.memory_bandwidth * (1 - 1e-9)
    assert found >= 2 * groups * many.rows * inputs * outputs / (rate * EFFICIENCY) * (1 - 1e-9)
