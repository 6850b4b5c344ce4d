"""Triton kernels, for GPUs without a compiled extension."""

from __future__ import annotations

import torch


def unavailable(device: torch.device) -> str | None:
    return "the Triton kernels are not part of this version"
