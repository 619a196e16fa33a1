"""What every test shares: one thread, a terminal as wide as the tables that some of them read, and when to stop."""

from __future__ import annotations

import os
import time

import pytest
import torch

torch.set_num_threads(1)  # sums do not depend on the machine
os.environ["COLUMNS"] = "160"  # rich folds cells where the terminal is narrow
_BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--minutes N``: for a slow machine."""
    parser.addoption("--minutes", type=float, help="skip, and count, tests that would begin after so many minutes")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that would begin too late."""
    most = item.config.getoption("--minutes")
    if most is not None and time.monotonic() - _BEGUN > 60 * most:
        pytest.skip(f"would begin after {most:g} minutes (--minutes)")
