"""What a machine with a GPU has: the toolkit behind nvcc, the GPUs' architectures, cores. Nothing is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]

LOOK = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = None
for i in range(torch.cuda.device_count()):
    major, minor = torch.cuda.get_device_capability(i)
    found["gpus"].append([torch.cuda.get_device_name(i), f"{major}.{minor}"])
print("FOUND" + json.dumps(found))
"""
"""Asked in a process of its own: a driver that hangs or crashes must not take the runner along."""


class Toolchain(NamedTuple):
    environment: dict[str, str]
    """Of every command."""
    facts: dict[str, Any]
    """Versions and GPUs, as :data:`LOOK` has them; ``problem`` where torch could not be asked."""
    processes: int
    """In which tests run at the same time."""

    def missing(self, packages: Iterable[str], tools: Iterable[str]) -> list[str]:
        """Those that are not here."""
        path = self.environment["PATH"]
        return [
            *(f"the package {name}" for name in packages if importlib.util.find_spec(name) is None),
            *(f"the tool {name}" for name in tools if shutil.which(name, path=path) is None),
        ]

    def __str__(self) -> str:
        facts, build = self.facts, self.environment
        gpus = ", ".join(f"{name} ({capability})" for name, capability in facts.get("gpus", ())) or "no GPU"
        versions = ", ".join(f"{name} {facts.get(name)}" for name in ("python", "torch", "cuda", "triton"))
        lines = [
            f"{gpus}; {versions}",
            f"{self.processes} processes; " + ", ".join(f"{n}={build.get(n)}" for n in NAMES),
        ]
        if "problem" in facts:
            lines.append(f"torch could not be asked: {facts['problem']}")
        return "\n".join(lines)


EVERY = "LOOKSAM_REHEARSAL_EVERY"
"""In a rehearsal: one of so many tests is run."""
NAMES = ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")


def find(given: Mapping[str, str], seconds: float = 60) -> Toolchain:
    """What ``given``, an environment, does not say already is found out."""
    environment = dict(given)
    home = cuda_home(environment)
    if home is not None:
        environment["CUDA_HOME"] = str(home)
        places = [str(home / place) for place in ("bin", "compute-sanitizer")]
        environment["PATH"] = os.pathsep.join([environment.get("PATH", os.defpath), *places])
    paths = [str(ROOT / "python"), str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-cache"))
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("MAX_JOBS", str(cores))
    facts = look(environment, seconds)
    capabilities = sorted({capability for _, capability in facts.get("gpus", ())})
    if capabilities:
        environment.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(capabilities))
    return Toolchain(environment, facts, min(14, max(8, cores - 2)))


def cuda_home(environment: Mapping[str, str]) -> Path | None:
    """The toolkit's folder: the one that is named if nvcc is in it, else where nvcc really lies, behind its links."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        named = environment.get(name)
        if named and Path(named, "bin", "nvcc").exists():
            return Path(named)
    nvcc = shutil.which("nvcc", path=environment.get("PATH")) or "/usr/local/cuda/bin/nvcc"
    real = Path(nvcc).resolve()
    return real.parents[1] if real.exists() else None


def look(environment: Mapping[str, str], seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-c", LOOK]
    try:
        done = subprocess.run(
            command, env=dict(environment), cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer in {seconds:.0f} s"}
    _, found, answer = done.stdout.rpartition("FOUND")
    if not found:
        return {"problem": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return dict(json.loads(answer))
