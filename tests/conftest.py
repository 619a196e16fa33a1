"""What every test shares: one thread, and a terminal as wide as the tables that some of them read."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)  # sums do not depend on the machine
os.environ["COLUMNS"] = "160"  # rich folds cells where the terminal is narrow
