"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_count() -> int:
    """The cores this process may use, not those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, str]:
    """Versions and devices, as (label, text) for reports."""
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "looksam-kernels": version("looksam-kernels"),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": f"{cpu_name()}, {cpu_count()} cores usable, {torch.backends.cpu.get_cpu_capability()}",
        "CUDA devices": ", ".join(cuda) or "none",
    }
