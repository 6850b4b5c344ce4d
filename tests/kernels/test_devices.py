"""Where a table is: empty ones, and rows on several devices. And which backend runs there.

A machine without GPUs has one device with memory. For rows on two, ``device_of`` is told by a stub that every third row is on
another: everything but the copy between real devices then happens as it would (that needs two GPUs: tests/cuda/test_gpu.py).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import looksam
import looksam_kernels as lk
from looksam_kernels import TensorTable, backend_info
from looksam_kernels import table as tables
from looksam_kernels.backends import native
from looksam_kernels.updates import BASES
from tests.kernels import cases
from tests.kernels.cases import BASE_CASES, CASES, COMBINATIONS, RULE_GROUPS, Columns, Row

pytestmark = pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning")

BACKENDS = [name for name, info in backend_info("cpu").items() if info.available and name != "reference"]
on_backends = pytest.mark.parametrize("backend", BACKENDS)
ELSEWHERE = torch.device("cpu", 1)
"""A device of its own for the table; for torch it is the CPU."""

ROWS = [
    Row((5,), group=0),
    Row((), group=1),
    Row((300,), group=2),
    Row((4, 3), torch.bfloat16, master=True),
    Row((9000,), group=1),
    Row((7,), group=2, absent=("s",)),
]


# Empty tables ---------------------------------------------------------------------------------------------------------


def test_an_empty_table_is_where_it_says() -> None:
    table = TensorTable([], device="meta", backend="reference")
    assert table.device.type == "meta"
    assert lk.sums(table, [("g", "g")]).values.device.type == "meta"
    _, c = lk.measure(table, "sam", RULE_GROUPS, found_inf=torch.zeros((), device="meta"))
    assert c.d.device.type == c.found_inf.device.type == "meta"
    assert TensorTable([]).device.type == "cpu"


def test_the_parameters_say_where_any_other_table_is() -> None:
    assert TensorTable([torch.zeros(3)], device="meta").device.type == "cpu"


# Rows on several devices ----------------------------------------------------------------------------------------------


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Tensors whose address is put in here are elsewhere."""
    addresses: set[int] = set()

    def device_of(w: Tensor) -> torch.device:
        return ELSEWHERE if w.numel() and w.data_ptr() in addresses else w.device

    monkeypatch.setattr(tables, "device_of", device_of)
    return addresses


def whole_step(backend: str, cols: Columns, base: str, mask: lk.Mask | None = None, **options: Any) -> list[Tensor]:
    """LookSAM's refresh and a reuse, through all ops."""
    name, groups = BASE_CASES[base]
    made = cases.table(ROWS, cols, backend)
    lars = name == "lars"
    t = cases.factor("asam" if BASES[name].second_moment is None else base, ROWS, made)
    found, up = lk.measure(made, "asam", RULE_GROUPS, adaptive=t, trust_ratio=lars)
    lk.perturb(made, up, t, mask)
    assert made.perturbed == [True] * len(ROWS)
    moved = [w.clone() for w in cols["w"] if w is not None]
    lk.restore(made)
    lk.perturb(made, up, t, mask)
    found, down = lk.measure(
        made, "looksam_refresh", RULE_GROUPS, known=found, max_grad_norm=1.0, trust_ratio=lars, **options
    )
    lk.step(made, name, down, groups)
    assert made.perturbed == [False] * len(ROWS)
    made.drop("s")
    made["g"] = [None if g is None else g * 2 for g in cols["g"]]
    more, down = lk.measure(made, "looksam_reuse", RULE_GROUPS, trust_ratio=lars)
    lk.step(made, name, down, groups)
    return [*moved, found.values, more.values, down.d, down.found_inf]


@pytest.mark.parametrize(
    ("backend", "base"),
    [
        (backend, base)
        for backend in BACKENDS
        for base in BASE_CASES
        if base != "grad" and (backend == "native" or base in ("adamw", "lars"))
    ],
)
@pytest.mark.parametrize("options", [{}, {"grad_scale": torch.tensor(8.0)}, {"found_inf": torch.tensor(1.0)}], ids=str)
def test_a_step_over_two_devices_has_the_bits_of_one(
    backend: str, base: str, options: dict[str, Any], two_devices: set[int]
) -> None:
    start = cases.columns(ROWS)
    together, apart = cases.copy(start), cases.copy(start)
    of_one = whole_step(backend, together, base, **options)
    two_devices.update(w.data_ptr() for w in apart["w"][::3] if w is not None)
    table = cases.table(ROWS, apart, backend)
    assert table.backend is not cases.table(ROWS, together, backend).backend, "nothing is split"
    assert table.backend_name == backend
    of_two = whole_step(backend, apart, base, **options)
    assert_same(backend, [x for name in together for x in together[name]], [x for name in apart for x in apart[name]])
    assert_same(backend, of_one, of_two)


def assert_same(backend: str, mine: list[Any], theirs: list[Any]) -> None:
    """Triton's kernels do not take rows that torch says to be on another device than their table, so rows elsewhere run as
    plain PyTorch, in another order of summation."""
    if backend == "native":
        assert cases.same_bits({"x": mine}, {"x": theirs})
    else:
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@on_backends
def test_a_mask_counts_the_rows_of_the_whole_table(backend: str, two_devices: set[int]) -> None:
    cols = cases.columns(CASES["groups"])
    two_devices.update(w.data_ptr() for w in cols["w"][::2] if w is not None)
    before = cases.copy(cols)
    c = COMBINATIONS["g + c q"].coefficients(CASES["groups"], "cpu")
    lk.perturb(cases.table(CASES["groups"], cols, backend), c, None, lk.Mask(keep=0.37, seed=5, draw=2))
    for row, (w, old) in enumerate(zip(cols["w"], before["w"], strict=True)):
        assert torch.equal(w != old, cases.kept_elements(0.37, 5, 2, row, w)), f"row {row}"


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "native"])
def test_an_optimizer_over_two_devices_takes_the_steps_of_one(backend: str, two_devices: set[int]) -> None:
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=random) for size in (3, 70, 5, 9000)]
    ends = []
    for split in (False, True):
        params = [torch.nn.Parameter(w.clone()) for w in start]
        if split:
            two_devices.update(p.data_ptr() for p in params[1::2])
        optimizer = looksam.LookSAM(params, "adamw", k=2, lr=torch.tensor(0.01), backend=backend)

        def closure(params: list[torch.nn.Parameter] = params) -> None:
            for p in params:
                p.grad = torch.sin(p.detach()) + p.detach()

        for _ in range(5):
            optimizer.step(closure)
        state = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor)]
        ends.append([p.detach() for p in params] + state)
    assert cases.same_bits({"x": ends[0]}, {"x": ends[1]})


def test_each_device_has_the_backend_that_runs_there() -> None:
    """Meta tensors have the reference alone, whatever the CPU's rows have."""
    table = TensorTable([torch.ones(3), torch.ones(3, device="meta")], g=[torch.ones(3), None])
    first = TensorTable([torch.ones(3)]).backend_name
    assert table.backend_name == ("reference" if first == "reference" else f"{first} and reference")
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        TensorTable([torch.ones(3), torch.ones(3, device="meta")], backend="native")


# Which backend runs ---------------------------------------------------------------------------------------------------


def gpu_build(monkeypatch: pytest.MonkeyPatch, refusal: Any) -> None:
    """As if there were a build with CUDA, whose driver answers so."""
    module = ModuleType("_cuda")
    module.refusal = refusal  # type: ignore[attr-defined]
    monkeypatch.setattr(native, "_cuda", module)


@pytest.mark.skipif(native._C is None, reason="there is no compiled extension")
def test_native_runs_where_the_driver_has_code_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on every GPU: one for which nothing was built failed in every step, with native chosen all the same."""
    reason = "no kernel image is available for execution on the device"
    gpu_build(monkeypatch, lambda index: reason if index == 0 else None)
    assert backend_info("cuda:0")["native"] == (False, False, reason)
    assert backend_info("cuda:1")["native"].available
    with pytest.raises(RuntimeError, match=reason):
        lk.backends.select("native", torch.device("cuda:0"))
    assert lk.backends.name_of(lk.backends.select(None, torch.device("cuda:0"))) != "native"


@pytest.mark.skipif(native._C is None, reason="there is no compiled extension")
def test_a_driver_that_is_not_there_is_a_reason_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(index: int) -> None:
        raise RuntimeError(
            "the driver on your system is too old\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
        )

    gpu_build(monkeypatch, refusal)
    assert backend_info("cuda:0")["native"].reason == "the driver on your system is too old"


def test_without_a_gpu_only_the_reference_takes_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu_build(monkeypatch, lambda index: "no CUDA-capable device is detected")
    info = backend_info("cuda:0")
    assert [name for name, found in info.items() if found.available] == ["reference"]
    assert all(found.reason for name, found in info.items() if name != "reference")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run on cuda tensors: "):
        lk.backends.select("triton", torch.device("cuda:0"))
