"""What tests of the triton backend share: its kernels run in Triton's interpreter unless a test says otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.interpreter import interpreting


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    pytest.importorskip("triton", reason="the extra triton is not installed")
    with interpreting():
        yield
