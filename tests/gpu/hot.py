"""``python -m tests.gpu.hot``: the kernels that take the time, on ViT-B's tensors, once each, for a profiler.

Only what runs between cudaProfilerStart and cudaProfilerStop is to be profiled: each backend's ops, after a first run that
loads or compiles them.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.cases import OPS, Arena
from benchmarks.run import first_step
from benchmarks.shapes import LISTS
from looksam_kernels import backend_info

BACKENDS = ("native", "triton")


def main(shapes: str = "vit-b") -> int:
    """1 if there is no backend to profile."""
    available = [name for name, info in backend_info("cuda").items() if info.available and name in BACKENDS]
    for backend in available:
        arena = Arena(LISTS[shapes](), "cuda", backend)
        for case in OPS:
            run = first_step(case.build(arena))
            run.prepare()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            run.step()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(f"{backend}: {case.name}", flush=True)
        del arena
    return 0 if available else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
