"""Captured steps: what a graph reads is there when it is replayed, and what cannot be captured is refused, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import looksam_kernels as lk
from looksam_kernels.backends.triton import layout
from looksam_kernels.backends.triton.graphs import Graphs
from tests.kernels import cases
from tests.kernels.cases import Row

from .graphs import Gpu
from .test_triton import DEVICE, in_a_new_process, looksam, table

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning"),
    pytest.mark.skipif(DEVICE == "cuda", reason="stands in for a GPU; test_triton.py captures on one"),
]

SHAPES = [(33,), (4, 3), ()]
WRITTEN = ("w", "b", "q", "exp_avg", "exp_avg_sq", "step", "q_norm_sq")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def new_gradients(made: lk.TensorTable) -> list[Tensor]:
    """Written by a backward pass in memory of its own."""
    made["g"] = [torch.sin(w) for w in made["w"]]
    made["s"] = [torch.cos(w) for w in made["w"]]
    return [*made["g"], *made["s"]]


def step(made: lk.TensorTable, **changes: Any) -> list[Tensor]:
    gradients = new_gradients(made)
    looksam(made, "adamw", **changes)
    return gradients


def bits(made: lk.TensorTable) -> dict[str, list[Tensor]]:
    return {name: [x.clone() for x in made[name]] for name in WRITTEN}


def test_replays_have_the_bits_of_eager_steps(gpu: Gpu) -> None:
    eager, graphed = table(SHAPES), table(SHAPES)
    for made in (eager, graphed):
        step(made)
    with gpu.capture() as graph:
        kept = step(graphed)
    assert cases.same_bits(bits(eager), bits(graphed)), "a capture runs nothing"
    for _ in range(3):
        graph.replay()
        step(eager)
    assert cases.same_bits(bits(eager), bits(graphed))
    assert kept


def test_replays_round_as_eager_steps_by_the_count_on_the_device(gpu: Gpu) -> None:
    """Each replay otherwise: the bits of the capture again would round the same elements up for ever."""
    rows = [Row(shape, cases.BF16) for shape in SHAPES]

    def pure() -> lk.TensorTable:
        return lk.TensorTable(backend="triton", rounding=lk.Rounding(3), **cases.columns(rows, DEVICE))

    eager, graphed = pure(), pure()
    for made in (eager, graphed):
        step(made)
    with gpu.capture() as graph:
        kept = step(graphed)
    for _ in range(3):
        graph.replay()
        step(eager)
        assert cases.same_bits(bits(eager), bits(graphed))
    assert kept


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> int:
    """How much of a kind is kept, less than usual."""
    forget = layout.forget_oldest
    monkeypatch.setattr(layout, "forget_oldest", lambda kept: forget(kept, limit=12))
    return 12


def test_eager_steps_between_replays(gpu: Gpu) -> None:
    """They forget whatever they can, and read nothing that a capture has left."""
    eager, graphed = table(SHAPES), table(SHAPES)
    for made in (eager, graphed):
        step(made)
    with gpu.capture() as graph:
        kept = step(graphed)
    for i in range(5):
        for made in (eager, graphed):
            step(made, lr=0.01 / (1 + i))
    assert len(graphed.handle.layout.copies) == 2, (
        "sizes and groups; of addresses and hyper-parameters only those of now"
    )
    for made in (eager, graphed):
        step(made)
    graph.replay()
    step(eager)
    assert cases.same_bits(bits(eager), bits(graphed))
    assert kept


def test_graphs_do_not_read_what_another_writes(gpu: Gpu) -> None:
    """Two that were captured with the same gradients, of which one is replayed, and an eager step with them."""
    eager, graphed = table(SHAPES), table(SHAPES)
    gradients = [torch.cos(eager["w"][0]), *(None for _ in SHAPES[1:])]
    for made in (eager, graphed):
        looksam(made, "adamw")
        made["g"] = gradients  # in memory and in a pattern that are new to the captures
    graphs = []
    for _ in range(2):
        with gpu.capture() as graph:
            looksam(graphed, "adamw")
        graphs.append(graph)
    for x in gpu.captured:
        if x.dtype in (torch.int32, torch.int64):
            x.zero_()  # until a replay copies them anew
    graphs[1].replay()
    looksam(graphed, "adamw")
    for _ in range(2):
        looksam(eager, "adamw")
    assert cases.same_bits(bits(eager), bits(graphed))


def test_captures_of_the_same_tensors_keep_nothing_more(gpu: Gpu) -> None:
    made = table(SHAPES)
    gradients = [[torch.ones_like(w) for w in made["w"]] for _ in range(2)]
    made["g"] = gradients[0]
    looksam(made, "adamw")

    def kept() -> tuple[int, int, int]:
        graphs = made.handle.graphs
        return len(graphs._held), len(graphs._sources), len(graphs._room)

    sizes = []
    for _ in range(20):
        for g in gradients:
            with gpu.capture():
                made["g"] = g
                looksam(made, "adamw")
        sizes.append(kept())
    assert set(sizes) == {sizes[0]}
    assert sizes[0][1] == 1, "the addresses of the second gradients"


def test_a_step_that_was_never_taken_eagerly_is_refused(gpu: Gpu) -> None:
    made = table(SHAPES)
    with gpu.capture(), pytest.raises(RuntimeError, match="take a step of each kind"):
        looksam(made, "adamw")
    looksam(made, "adamw")
    for w in made["w"]:
        w.data = w.data.clone()
    with gpu.capture(), pytest.raises(RuntimeError, match="take a step of each kind"):
        looksam(made, "adamw")


def test_more_captures_than_there_is_page_locked_memory_for_are_refused_until_an_eager_step(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graphs, "COLUMNS", 12)
    made = table([(1,)] * 7)
    step(made)
    kept = []

    def capture(count: int) -> None:
        for _ in range(count):
            with gpu.capture():
                kept.append(step(made))

    capture(6)  # of two columns each
    with pytest.raises(RuntimeError, match="eager step between"):
        capture(1)
    step(made)
    capture(6)


def test_rows_for_the_reference_can_be_captured(gpu: Gpu) -> None:
    """Parameters that are not dense. No list of numbers goes to the device on the way: that would wait for it."""
    rows = [Row((33,)), Row((6, 2), memory="strided"), Row((3,))]
    made = cases.table(rows, cases.columns(rows), "triton")
    looksam(made, "adamw")
    with gpu.capture() as graph:
        looksam(made, "adamw")
        indices = [args for function, args, *_ in graph.nodes if "index" in str(function)]
    assert not indices
    graph.nodes.clear()


def test_what_is_kept_of_a_table_is_bounded(forgetful: int) -> None:
    """Gradients in ever new patterns of dtypes."""
    made = table([(2,)] * 5)
    gradients = list(made["g"])
    for pattern in range(32):
        made["g"] = [g.double() if pattern >> i & 1 else g for i, g in enumerate(gradients)]
        found = lk.sums(made, (("g", "g"),)).values[0]
        torch.testing.assert_close(found, torch.stack([g.double().square().sum() for g in gradients]))
    layout = made.handle.layout
    assert [len(kept) for kept in (layout.kinds, layout.buckets)] == [forgetful] * 2


def test_memory_that_another_stream_reads_is_not_given_up_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = table(SHAPES)
    stream, recorded = [1], []
    monkeypatch.setattr("looksam_kernels.backends.triton.gpu.stream", lambda device: stream[0])
    monkeypatch.setattr(Tensor, "record_stream", lambda x, on: recorded.append((x.data_ptr(), on)))
    looksam(made, "adamw")
    assert not recorded, "one stream needs none"
    stream[0] = 2
    looksam(made, "adamw")
    read = {layout_tensor.data_ptr() for layout_tensor in made.handle.layout.addresses("w", "g", "s", "exp_avg")}
    assert read <= {address for address, _ in recorded}
    assert {on for _, on in recorded} == {2}


def test_a_kernel_that_was_not_loaded_before_is_not_launched_in_a_capture() -> None:
    """Compiled for a driver that stands in for the real one, and launches nothing."""
    in_a_new_process(
        """
import contextlib, types, torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched = []
class Driver:
    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: launched.append(arguments))
    utils = types.SimpleNamespace(
        load_binary=lambda name, binary, shared, device: (1, 2, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 2**17, "warpSize": 32},
        unload_module=lambda module: None,
    )
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver())
from looksam_kernels.backends.triton import kernels as k
from looksam_kernels.backends.triton.launch import Launch

torch.cuda.device = contextlib.nullcontext
capturing = False
torch.cuda.is_current_stream_capturing = lambda: capturing
column, chunks, sizes = (torch.zeros(2, dtype=d) for d in (torch.int64, torch.int32, torch.int64))

launches = {
    dtype: Launch(k.restore, W=dtype, B=dtype, ALIGNED=True, CHUNK=2048)
    for dtype in (tl.float32, tl.bfloat16)
}

def launch(dtype):
    launches[dtype]((1,), torch.device("cuda"), column, column, chunks, sizes)

launch(tl.float32)
assert len(launched) == 1
capturing = True
launch(tl.float32)
assert len(launched) == 2
for _ in range(2):
    try:
        launch(tl.bfloat16)
    except RuntimeError as error:
        assert "'restore'" in str(error) and "take a step of each kind" in str(error), error
    else:
        raise SystemExit("launched")
capturing = False
launch(tl.bfloat16)
capturing = True
launch(tl.bfloat16)
assert len(launched) == 4
"""
    )
