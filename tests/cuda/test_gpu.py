"""On a GPU: streams, graphs, synchronisation, reproducible bits, launches. The op matrix runs there from tests/kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import looksam
import looksam_kernels as lk
from looksam_kernels.backends import native
from tests import bases
from tests.kernels import cases
from tests.kernels.cases import BASE_CASES, CASES, COMBINATIONS

from .launch_cases import *  # noqa: F403  (the same cases, whose tensors are on the GPU where there is one)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

BACKENDS = ("native", "triton")
VARIANTS = ("SAM", "LookSAM", "LayerSAM", "LookLayerSAM")
BASES = [list(base.kernels)[-1] for base in bases.BASES.values()]
"""The case of each that has all states."""


class Training:
    """An optimizer over a few tensors with gradients that are a function of the weights."""

    def __init__(self, variant: str, base: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
        random = torch.Generator().manual_seed(0)
        shapes = [(64, 33), (5,), (), (9000,), (3, 4, 5)]
        self.params = [torch.nn.Parameter(torch.randn(shape, generator=random).to("cuda", dtype)) for shape in shapes]
        self.targets = [torch.randn(shape, generator=random).to("cuda", dtype) for shape in shapes]
        name, (hyper, *_) = BASE_CASES[base]
        options = dict(hyper)
        more = {} if variant == "SAM" else {"k": 2}
        self.optimizer = getattr(looksam, variant)(self.params, name, backend=backend, **options, **more)

    def closure(self) -> None:
        for p, target in zip(self.params, self.targets, strict=True):
            p.grad = torch.sin(p) + p - target

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.step(self.closure)

    def bits(self) -> list[Tensor]:
        state = [x for p in self.params for x in self.optimizer.state[p].values() if isinstance(x, Tensor)]
        return [x.detach().clone() for x in [*self.params, *state]]


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return cases.same_bits({"x": mine}, {"x": theirs})


on_every_optimizer = pytest.mark.parametrize(
    ("variant", "base"), [(variant, base) for variant in VARIANTS for base in BASES]
)
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@on_every_backend
@on_every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_have_the_same_bits(variant: str, base: str, backend: str, dtype: torch.dtype) -> None:
    runs = []
    for _ in range(2):
        training = Training(variant, base, backend, dtype)
        training.steps(12)
        runs.append(training.bits())
    assert same(*runs)


@contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_every_backend
@on_every_optimizer
def test_no_step_synchronises(variant: str, base: str, backend: str) -> None:
    training = Training(variant, base, backend)
    training.steps(2)
    torch.cuda.synchronize()
    with synchronising_is_an_error():
        training.steps(4)


def captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    return graph


@on_every_optimizer
def test_a_replayed_graph_has_the_bits_of_eager_steps(variant: str, base: str) -> None:
    """One graph for each step of a cycle, after an eager cycle that creates the state."""
    eager, graphed = (Training(variant, base, "native") for _ in range(2))
    eager.steps(8)
    graphed.steps(2)
    graphs = [captured(lambda: graphed.steps(1)) for _ in range(2)]
    for _ in range(3):
        for graph in graphs:
            graph.replay()
    torch.cuda.synchronize()
    assert same(eager.bits(), graphed.bits())


def test_eager_steps_go_on_after_a_capture_that_never_ran() -> None:
    """What a capture files on the device is not there before the graph runs."""
    eager, other = (Training("LookSAM", "adamw", "native") for _ in range(2))
    eager.steps(6)
    other.steps(2)
    graphs = [captured(lambda: other.steps(1)) for _ in range(2)]
    assert len(graphs) == 2
    other.steps(4)
    assert same(eager.bits(), other.bits())


def test_ops_run_on_the_current_stream() -> None:
    rows = CASES["large"]
    start = cases.columns(rows, "cuda")
    c = COMBINATIONS["s, q = s - c g"].coefficients(rows, "cuda")
    base, groups = BASE_CASES["lamb"]
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        columns = cases.copy(start)
        made = cases.table(rows, columns, "native")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # work that follows on another stream would be early
            for column in ("g", "s"):
                for x in columns[column]:
                    x.mul_(2)
            lk.perturb(made, c._replace(inputs=("g",), d=c.d[:1]))
            lk.step(made, base, c, groups)
        torch.cuda.synchronize()
        results.append(columns)
    assert cases.same_bits(*results)


def test_rows_on_the_gpu_and_on_the_cpu_take_the_steps_of_one_device() -> None:
    across(["cuda", "cpu"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_rows_on_two_gpus_take_the_steps_of_one() -> None:
    across(["cuda:0", "cuda:1"])


def across(devices: list[str]) -> None:
    """Up to rounding: a processor adds in another order."""
    ends = []
    for places in (devices[:1] * 2, devices):
        random = torch.Generator().manual_seed(0)
        starts = [torch.randn(size, generator=random) for size in (3, 70, 5, 9000)]
        params = [torch.nn.Parameter(w.to(places[i % 2])) for i, w in enumerate(starts)]
        optimizer = looksam.LookSAM(params, "sgd", k=2, lr=0.01, momentum=0.9, backend="native")

        def closure(params: list[torch.nn.Parameter] = params) -> None:
            for p in params:
                p.grad = torch.sin(p.detach()) + p.detach()

        for _ in range(4):
            optimizer.step(closure)
        ends.append([p.detach().cpu() for p in params])
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_memory_of_its_own_is_not_given_away_while_another_stream_reads_it() -> None:
    """The table goes while a slow stream has still to read its columns, and the first stream gets new memory at once."""
    rows = CASES["groups"]
    start = cases.columns(rows, "cuda")
    c = COMBINATIONS["g + c q"].coefficients(rows, "cuda")
    base, groups = BASE_CASES["adamw"]
    results = []
    for other in (False, True):
        columns = cases.copy(start)
        made = cases.table(rows, columns, "native")
        lk.step(made, base, c, groups)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream() if other else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            lk.step(made, base, c, groups)
        del made
        litter = [torch.full((1 << k,), 255, dtype=torch.uint8, device="cuda") for k in range(14) for _ in range(50)]
        torch.cuda.synchronize()
        del litter
        results.append(columns)
    assert cases.same_bits(*results)


def test_an_error_is_not_left_for_the_next_call() -> None:
    """Of a device that is not there; no launch can be made to fail on one that works (on the host harness they do)."""
    assert native._cuda.refusal(torch.cuda.device_count()) is not None
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert native._cuda.refusal(0) is None


def test_operators_on_empty_lists_are_where_their_coefficients_are() -> None:
    """Only a GPU can tell: for the other devices without one, torch calls the operators' fakes."""
    for name in ("reference", *BACKENDS):
        with lk.use_backend(name):
            torch.ops.looksam.perturb_([], [], [], torch.zeros(0, device="cuda"))
            nothing = ([], [], [], [], [], [])
            torch.ops.looksam.adam_(*nothing, torch.zeros(0, device="cuda"), 0.1, 0.0, 0.9, 0.999, 1e-8)
