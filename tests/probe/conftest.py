"""Several test processes share few cores: one thread each."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
