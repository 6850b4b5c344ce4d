"""What is said once, when the first optimizer is made: which backend runs, and how a faster one can be had.

It goes to the logger ``looksam``: at the level INFO where the fastest backend runs, at WARNING, which Python prints unless
told otherwise, where a faster one could. Under a launcher of several processes the first of a machine speaks for all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import torch

from looksam_kernels import backends
from looksam_kernels.backends import native
from looksam_kernels.build import BuildError, build, recipe

log = logging.getLogger("looksam")

_said: set[str] = set()


def first_optimizer(devices: Iterable[torch.device], requested: str | None) -> None:
    """To be called whenever an optimizer is made, with its parameters' devices and the backend it was given, if any.

    With LOOKSAM_JIT=1 the native backend is compiled first where it is missing.

    Raises:
        ValueError: LOOKSAM_JIT is neither 0 nor 1.
    """
    for kind in sorted({device.type for device in devices} & {"cpu", "cuda"} - _said):
        _said.add(kind)
        _settle(torch.device(kind), requested or backends.forced())


def _settle(device: torch.device, asked_for: str | None) -> None:
    wanted = os.environ.get("LOOKSAM_JIT") or "0"
    if wanted not in ("0", "1"):
        raise ValueError(f"LOOKSAM_JIT={wanted!r} means nothing; set it to 1 (compile what is missing) or 0")
    failure = None
    if wanted == "1" and asked_for in (None, "native") and native.unavailable(device) is not None:
        failure = _compile(device)
    if asked_for is not None or os.environ.get("LOCAL_RANK", "0") != "0":
        return  # a choice needs no advice, and where it cannot be had that is an error
    name = backends.name_of(backends.select(None, device))
    advice = failure or _advice(device, name)
    if advice is None:
        log.info("looksam: backend %s on %s tensors", name, device.type)
    else:
        log.warning("looksam: backend %s on %s tensors. A faster one could run here: %s", name, device.type, advice)


def _advice(device: torch.device, running: str) -> str | None:
    """How a faster backend than the running one can be had on this machine, or ``None``."""
    why = native.unavailable(device)
    if why is None or (device.type == "cuda" and running == "triton" and recipe.why_no_cuda() is not None):
        return None
    if device.type == "cuda" and running == "reference" and recipe.why_no_cuda() is not None:
        return "run: pip install triton"
    return why


def _compile(device: torch.device) -> str | None:
    """Why it failed, or ``None``."""
    modules = [recipe.CPU, *([recipe.CUDA] if device.type == "cuda" else [])]
    try:
        for module in modules:
            build(module, lambda line: log.warning("looksam: LOOKSAM_JIT=1: %s", line))
    except (BuildError, OSError) as error:
        return f"LOOKSAM_JIT=1 could not compile it: {error}"
    native.reload()
    return None
