"""What a machine with a GPU is asked to do, as data. Each list takes less than :data:`SECONDS`, whatever happens."""

from __future__ import annotations

from typing import NamedTuple

SECONDS = 575.0
"""Of one list: ten minutes, less what starting and ending take."""


class Part(NamedTuple):
    """One command with its own time limit, which runs whatever became of the parts before it."""

    name: str
    arguments: tuple[str, ...]
    """Of Python, or of the first of ``tools``; {python} and {folder}, that of the logs, are filled in."""
    limit: float | None
    """Seconds; ``None``: all that is left."""
    packages: tuple[str, ...] = ("torch",)
    """Without which it is skipped."""
    tools: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    shows: str = ""
    """A pattern: lines of its log that the summary repeats."""


BLOCKING = (("CUDA_LAUNCH_BLOCKING", "1"),)
OF_TESTS = ("torch", "pytest", "hypothesis")


def tests(name: str, limit: float | None, chosen: str, *folders: str) -> Part:
    """Tests that need a GPU. Not those of the reference, which compare torch with itself."""
    arguments = ("-m", "pytest", "-v", "-m", "gpu", "-k", f"({chosen}) and not reference-cuda")
    return Part(name, (*arguments, *(f"tests/{folder}" for folder in folders)), limit, OF_TESTS)


def smoke(backend: str, limit: float, *packages: str) -> Part:
    """A few steps with one launch at a time, so that an error names the kernel that made it."""
    arguments = ("-m", "tests.gpu.smoke", backend)
    return Part(f"smoke {backend}", arguments, limit, ("torch", *packages), environment=BLOCKING, shows="^smoke")


def bench(shapes: str, limit: float) -> Part:
    brief = ("--seconds", "1", "--compile", "", "--out", "{folder}")
    arguments = ("-m", "benchmarks", "--device", "cuda", "--shapes", shapes)
    return Part(
        f"benchmark {shapes}", (*arguments, *brief), limit, ("torch", "rich"), shows=r"(met|missed by \d+ %)\W*$"
    )


def sanitizer(tool: str, limit: float) -> Part:
    shows = "========= *(ERROR|RACECHECK|Invalid|Error|Uninit|Barrier|Divergent|Program hit|Fatal)"
    return Part(tool, ("-m", "tests.gpu.sanitizer", tool), limit, OF_TESTS, ("compute-sanitizer",), shows=shows)


BUILD = Part(
    "build",
    ("setup.py", "-q", "build_ext", "--inplace"),
    200,
    ("torch", "setuptools"),
    environment=(("LOOKSAM_NATIVE", "1"), ("LOOKSAM_CUDA", "1")),
    shows="^looksam-kernels: ",
)

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "lts__t_sector_hit_rate.pct",
    "launch__registers_per_thread",
    "launch__grid_size",
)
NCU = ("--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base")
NSYS = ("profile", "--stats=true", "--force-overwrite=true", "--capture-range=cudaProfilerApi", "-o", "build/gpu/nsys")
HOT = ("{python}", "-m", "tests.gpu.hot")

LISTS: dict[str, tuple[Part, ...]] = {
    "first": (
        BUILD,
        smoke("native", 30),
        tests("native tests", 130, "not triton", "kernels", "cuda", "contract"),
        bench("vit-b", 50),
        bench("tiny", 40),
        smoke("triton", 40, "triton"),
        tests("triton tests", None, "triton", "kernels", "cuda", "triton", "contract"),
    ),
    "second": (
        BUILD,  # nothing to do after "first" on the same machine
        sanitizer("memcheck", 120),
        sanitizer("racecheck", 90),
        sanitizer("synccheck", 50),
        sanitizer("initcheck", 60),
        Part("profile ncu", (*NCU, "--metrics", ",".join(METRICS), *HOT), None, ("torch",), ("ncu",)),
        Part("profile nsys", (*NSYS, *HOT), None, ("torch",), ("nsys",)),
    ),
}
"""In this order: what the rest stands on first, native before Triton, then what takes longest."""
