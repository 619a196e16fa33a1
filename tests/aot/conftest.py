"""What the tests of ahead-of-time compilation share: one cache for all workers, so that equal code is made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="package")
def aot_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "aot-cache"
    cache.mkdir(mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEC_CACHE_DIR", str(cache))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        patch.setenv("MOEC_CXXFLAGS", "-O1")  # half the time of a build; tests/backends runs kernels as they are built
        yield cache
