"""``python -m tests.gpu.sanitizer memcheck``: compute-sanitizer over every kernel, the cases shared by several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

PROCESSES = min(4, os.cpu_count() or 1)
"""They share one GPU, which a tool keeps far less busy than it does the host."""


def command(tool: str, share: int) -> list[str]:
    """initcheck must also see what torch's kernels write; the others look at ours only."""
    only = [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=looksam"]
    script = [sys.executable, "-m", "tests.cuda.sanitize", f"{share}/{PROCESSES}"]
    return ["compute-sanitizer", "--tool", tool, *only, "--print-limit", "20", "--error-exitcode", "1", *script]


def attend(tool: str, share: int) -> int:
    """Without the caching allocator every tensor is an allocation of its own, whose bounds the tools know."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command(tool, share), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:  # at once: whoever stops this has what was said before
        print(f"{share}| {line}", end="", flush=True)
    return process.wait()


def main(tool: str) -> int:
    with ThreadPoolExecutor(PROCESSES) as pool:
        statuses = list(pool.map(attend, [tool] * PROCESSES, range(PROCESSES)))
    for share, status in enumerate(statuses):
        if status:
            print(f"{tool}, share {share} of {PROCESSES}: exit status {status}")
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
