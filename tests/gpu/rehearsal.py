"""A rehearsal: the lists run on a machine without a GPU, with the same commands.

Every Python process begins with :mod:`tests.gpu.pretend`, by a ``sitecustomize`` of its own; of the tests every n-th is run.
The toolkit's programs are scripts that run what they are given. So all but the kernels and the device is put to the test:
commands, choice of tests, what tests do on a "cuda" device, limits, logs, summaries.
"""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path

from tests.gpu.toolchain import EVERY, ROOT

FOLDER = ROOT / "build" / "gpu" / "rehearsal"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, see tests/gpu/rehearsal.py")
    parser.add_argument("--every", type=int, default=1, help="rehearse every n-th test only (%(default)s)")
    parser.add_argument("--processes", type=int, help="in which tests run; default: by the cores")


def environment(options: argparse.Namespace) -> dict[str, str]:
    """What ``os.environ`` is to be for the commands."""
    tools = write_tools(FOLDER)
    found = {**os.environ, EVERY: str(options.every), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found["PYTEST_PLUGINS"] = "tests.gpu.sample"
    found["PATH"] = os.pathsep.join([str(tools), os.environ.get("PATH", os.defpath)])
    found["PYTHONPATH"] = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    for name in ("CUDA_HOME", "CUDA_PATH", "LOOKSAM_BACKEND"):
        found.pop(name, None)
    return found


SKIP_OPTIONS = """\
#!/bin/sh
# Runs the Python command that stands behind the options.
while [ $# -gt 0 ]; do case "$1" in */python*|python*) break;; esac; shift; done
"$@"; status=$?
{then}
exit $status
"""
TOOLS = {
    "compute-sanitizer": SKIP_OPTIONS.replace("{then}", 'echo "========= ERROR SUMMARY: 0 errors"'),
    "ncu": SKIP_OPTIONS.replace("{then}", 'echo "==PROF== rehearsed"'),
    "nsys": SKIP_OPTIONS.replace("{then}", 'echo "Generated: nothing, rehearsed"'),
    "nvidia-smi": "#!/bin/sh\necho 0.0\n",
    "nvcc": "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.0'\n",
}


def write_tools(folder: Path) -> Path:
    """``sitecustomize`` and the toolkit, nvcc behind a link as packages lay it."""
    toolkit = folder / "toolkit" / "bin"
    toolkit.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text("from tests.gpu import pretend\n\npretend.begin()\n")
    for name, text in TOOLS.items():
        path = toolkit / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    links = folder / "bin"
    links.mkdir(exist_ok=True)
    for name in TOOLS:
        link = links / name
        link.unlink(missing_ok=True)
        link.symlink_to(toolkit / name)
    return links
