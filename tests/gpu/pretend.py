"""For a rehearsal: in this process "cuda" means the CPU. The CUDA kernels are those of the host harness (csrc/harness),
Triton's run in its interpreter, and the benchmark's models are small."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.gpu.toolchain import EVERY, ROOT

HARNESS = "build/cuda-tests/plain/_harness.so"
"""Where ``setup.py`` builds it in a rehearsal."""


def begin() -> None:
    """Called by ``sitecustomize``, before the process imports anything else."""
    pretend_cuda()
    CudaIsTheCpu().__enter__()  # for as long as the process lives
    if "setup.py" in sys.orig_argv:
        build_nothing_in_place()
    elif "BuildExtension" in sys.orig_argv[-1]:  # setup.py's helper
        pretend_to_compile()
    else:
        pretend_backends()
        shrink()


# torch ----------------------------------------------------------------------------------------------------------------


class CudaIsTheCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        if function == torch.Tensor.is_cuda.__get__:
            return True
        return function(*map(on_cpu, args), **{name: on_cpu(x) for name, x in (kwargs or {}).items()})


def on_cpu(x: Any) -> Any:
    if isinstance(x, str) and x.partition(":")[0] == "cuda":
        return "cpu"
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


class Stream:
    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...


class Event:
    """The device does everything at once."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class NoGraph:
    def __init__(self, *_: Any, **__: Any) -> None:
        pytest.skip("a rehearsal has no CUDA graphs")


def pretend_cuda() -> None:
    cuda, nothing = torch.cuda, lambda *_, **__: None
    properties = SimpleNamespace(name="no GPU, a rehearsal", major=9, minor=0, total_memory=10**9)
    properties.multi_processor_count, properties.L2_cache_size = 1, 2**20
    torch.version.cuda = "13.0"
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: 1, lambda: 0
    cuda.get_device_capability, cuda.get_device_name = lambda _=None: (9, 0), lambda _=None: properties.name
    cuda.get_device_properties = lambda _=None: properties
    cuda.synchronize = cuda.set_sync_debug_mode = cuda._sleep = nothing
    cuda.profiler.start = cuda.profiler.stop = nothing
    cuda.current_stream = cuda.default_stream = lambda _=None: Stream()
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = Stream, Event, NoGraph, NoGraph
    cuda.stream = cuda.device = lambda _=None: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    profile = torch.profiler.profile
    torch.profiler.profile = lambda activities: profile(activities=[torch.profiler.ProfilerActivity.CPU])
    cuda.get_rng_state = lambda _=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, _=None: torch.set_rng_state(state)


# The project ----------------------------------------------------------------------------------------------------------


def pretend_backends() -> None:
    from looksam_kernels.backends import native, triton

    compiled = native._C
    native.compiled = lambda: compiled
    if (ROOT / HARNESS).exists():
        native._C = native._cuda = load(str(ROOT / HARNESS))
        native.first_misfit = lambda tensors, weights, scalar: 0
        native.unavailable = lambda device: None
    triton.unavailable = lambda device: None


def load(path: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_harness", path)
    spec = importlib.util.spec_from_file_location("_harness", loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def build_nothing_in_place() -> None:
    from setuptools.command.build_ext import build_ext

    build_ext.copy_extensions_to_source = lambda self: None


def pretend_to_compile() -> None:
    """The harness, in the place of the CUDA kernels; the rest stays what it is."""
    from torch.utils import cpp_extension

    def build(self: Any) -> None:
        for extension in self.extensions:
            if extension.name == "_cuda":
                from tests.cuda.build import harness

                harness(sanitize=False)
            path = Path(self.get_ext_fullpath(extension.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    cpp_extension.CUDA_HOME = os.environ.get("CUDA_HOME")
    cpp_extension.BuildExtension.build_extensions = build


def shrink() -> None:
    """The benchmark's models, and what the sanitizers see."""
    from benchmarks import peers
    from benchmarks.shapes import LISTS
    from tests.kernels.cases import BASE_CASES

    peers.COPIED = 2**10
    peers.copy.__defaults__ = (peers.COPIED,)
    for name in LISTS:
        LISTS[name] = lambda: [(3, 5), (7,), (64, 33)]
    if "tests.cuda.sanitize" in sys.orig_argv:
        for name in set(BASE_CASES) - set(list(BASE_CASES)[:: int(os.environ[EVERY])]):
            del BASE_CASES[name]
