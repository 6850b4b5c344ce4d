"""What a result file says about where it was measured: hardware, versions, revision. No names, no places."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "pytorch_optimizer", "timm", "apex")


def describe(device: str) -> dict[str, Any]:
    """``slug`` names the result file."""
    cpu = _cpu_name()
    found = {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": _memory_gb(), "os": platform.system()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9),
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": round(properties.L2_cache_size / 2**20),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
        return found | {"slug": _slug(properties.name)}
    return found | {"simd": torch.backends.cpu.get_cpu_capability(), "slug": f"cpu-{_slug(cpu)}"}


class Others:
    """How much of the processors' time other processes take. A busy machine does not slow all contenders alike: who starts
    many small parallel regions loses most, since each ends with threads that wait for one another."""

    def __init__(self) -> None:
        self._before = self._read()

    def percent(self) -> float | None:
        """Since this object was made; ``None`` where the system does not tell."""
        if self._before is None or (now := self._read()) is None:
            return None
        total, busy, own = (b - a for a, b in zip(self._before, now, strict=True))
        return 100 * max(0.0, busy - own) / total if total else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return None
        idle = ticks[3] + ticks[4]
        return sum(ticks), sum(ticks) - idle, sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")


def versions() -> dict[str, str | None]:
    """``None``: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def revision() -> str | None:
    """The git revision, with ``-dirty`` where files that it does not hold were measured."""
    return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*")


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _memory_gb() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", name).lower()).strip("-")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
