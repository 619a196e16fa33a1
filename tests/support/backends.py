"""Which backends a test can run."""

from __future__ import annotations

import pytest

from moec.backends.base import Backend


def skip_unless_it_works(backend: Backend) -> None:
    """Skip the test where something that the backend needs is not here, and say what."""
    for line in backend.status():
        if not line.works:
            pytest.skip(f"{backend.name} cannot {line.stage} here: {line.detail}")
