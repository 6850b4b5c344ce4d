"""C++ on CPU tensors, CUDA on CUDA tensors."""

from __future__ import annotations

import torch


def unavailable(device: torch.device) -> str | None:
    return "looksam_kernels was installed without its compiled extension"
