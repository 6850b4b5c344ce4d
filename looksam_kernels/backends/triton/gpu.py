"""Where the kernels run, and what torch says of the device there."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

GPUS = ("cuda", "xpu")
"""torch's names of the devices with a Triton backend: NVIDIA's and AMD's have one, Intel's another."""
OLDEST = (3, 6)
"""The first Triton that has what the kernels use."""
WARM_UP = "take a step of each kind, sharp and reuse, before torch.cuda.graph captures one"
"""The remedy for what cannot be done in a capture."""


def unavailable(device: torch.device) -> str | None:
    if (why := _not_usable()) is not None:
        return why
    if device.type in GPUS:
        if not torch.get_device_module(device).is_available():
            return "torch finds no GPU with a driver here"
        return "TRITON_INTERPRET is set, and the interpreter runs on CPU tensors only" if _interpreting() else None
    if device.type != "cpu":
        return f"Triton has no code for {device.type} tensors"
    if _any_gpu() and not _interpreting():
        return "its kernels are compiled for the GPU here; with TRITON_INTERPRET=1 they run on CPU tensors"
    if "triton" in sys.modules and not _interpreting():
        return "triton was imported before TRITON_INTERPRET=1 was set: there is no GPU, so only its interpreter can run"
    return None


@functools.cache
def _not_usable() -> str | None:
    """Why, if so. PyTorch 2.6 installs Triton 3.2. Triton is not imported here: after that it could not be told any more
    to interpret."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "the package triton is not installed"
    source = Path(spec.origin).read_text() if spec.origin else ""
    found = re.search(r"""^__version__ = ['"](\d+)\.(\d+)""", source, re.MULTILINE)
    if found is not None and (int(found[1]), int(found[2])) < OLDEST:
        return f"triton {found[1]}.{found[2]} is too old; {OLDEST[0]}.{OLDEST[1]} or newer is needed"
    return None


def only_on_request(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "runs in Triton's interpreter, which is slow and meant for tests; only when asked for"
    return None


def _any_gpu() -> bool:
    return any(torch.get_device_module(name).is_available() for name in GPUS)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def kernels() -> ModuleType:
    """Imported late: whether kernels are compiled or interpreted is settled when triton is first imported."""
    if not _any_gpu():
        os.environ["TRITON_INTERPRET"] = "1"
    if _interpreting():
        warnings.warn(
            "the Triton kernels run in Triton's interpreter: slow, for tests only", RuntimeWarning, stacklevel=2
        )
    from looksam_kernels.backends.triton import kernels

    return kernels


def stream(device: torch.device) -> Any:
    return None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def target(device: torch.device) -> Any:
    """Triton's name for what kernels are compiled for; ``None`` where they are interpreted."""
    if device.type == "cpu":
        return None
    from triton.runtime import driver

    with torch.get_device_module(device).device(device):
        return driver.active.get_current_target()
