"""What every test shares: one thread, so that timings and sums do not depend on the machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
