"""What only the native CPU backend promises: the same bits for any number of threads and any instruction set.

Agreement with the reference for every op, dtype and shape: tests/kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from looksam_kernels import Mask, Rounding, TensorTable, backend_info, ops
from looksam_kernels.updates import BASES
from tests import bases
from tests.kernels.cases import STATES

pytestmark = pytest.mark.skipif(
    not backend_info("cpu")["native"].available, reason=f"no native backend: {backend_info('cpu')['native'].reason}"
)

GROUP = {
    "rho": 0.05, "alpha": 0.7, "perturb_eps": 1e-12, "norm_scope": "global", "layer_scaled": 1.0,
    "lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9, "dampening": 0.0,
    "nesterov": False, "always_adapt": False, "trust_clip": False,
    "bias_correction": True, "trust_coefficient": 0.02, "centered": True,
    "lr_decay": 0.1, "base.alpha": 0.9, "base.rho": 0.9,
}  # fmt: skip

SHAPES = [(0,), (1,), (), (3,), (300, 401), (65537,), (4097,), *[(1000 + i,) for i in range(40)]]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    from looksam_kernels import _C

    threads, isa = torch.get_num_threads(), _C.isa()
    yield
    torch.set_num_threads(threads)
    _C.use_isa(isa)
    _C.use_memory("measured")


def make_table(master: bool = True) -> TensorTable:
    random = torch.Generator().manual_seed(0)

    def column(wide: bool) -> list[Tensor]:
        made = []
        for row, shape in enumerate(SHAPES):
            dtype = DTYPES[row % 4]
            x = torch.randn(shape, generator=random, dtype=torch.float64)
            made.append(x.to(torch.promote_types(dtype, torch.float32) if wide else dtype))
        return made

    w = column(wide=False)
    return TensorTable(
        w,
        backend="native",
        rounding=None if master else Rounding(seed=3),
        b=column(wide=master),
        g=column(wide=False),
        s=column(wide=False),
        q=column(wide=True),
        q_norm_sq=[torch.tensor(1.0, dtype=torch.float64) for _ in w],
        **{name: [make(x) for x in column(wide=True)] for name, make in STATES.items()},
        step=[torch.tensor(float(row)) for row in range(len(w))],
    )


def run(base: str, master: bool = True) -> list[Tensor]:
    """A refresh, a reuse, and all that they leave. Without master copies bfloat16 weights are rounded stochastically."""
    table = make_table(master)
    group, lars = GROUP | bases.with_all_states(base), BASES[base].takes_trust_ratio
    sums, coefficients = ops.measure(table, "trust_normalized", [group], trust_ratio=lars)
    ops.perturb(table, coefficients, mask=Mask(keep=0.6))
    moved = [w.clone() for w in table["w"]]
    sums, coefficients = ops.measure(table, "looksam_refresh", [group], known=sums, max_grad_norm=1.0, trust_ratio=lars)
    ops.step(table, base, coefficients, [group])
    more, coefficients = ops.measure(table, "looksam_reuse", [group], trust_ratio=lars)
    ops.step(table, base, coefficients, [group])
    return [sums.values, more.values, *moved, *(x for name in table for x in table[name])]


MASTER = pytest.mark.parametrize("master", [True, False], ids=["master copies", "rounded stochastically"])


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    as_bytes = (
        [x.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for x in tensors] for tensors in (a, b)
    )
    return next(as_bytes) == next(as_bytes)


@MASTER
@pytest.mark.parametrize("base", BASES)
def test_same_bits_for_any_number_of_threads(base: str, master: bool) -> None:
    results = []
    for threads in (1, 2, 4, 2):
        torch.set_num_threads(threads)
        results.append(run(base, master))
    assert all(same_bits(results[0], other) for other in results[1:])


@MASTER
@pytest.mark.parametrize("base", BASES)
def test_same_bits_for_any_instruction_set(base: str, master: bool) -> None:
    from looksam_kernels import _C

    results = []
    for isa in _C.isas():
        _C.use_isa(isa)
        results.append(run(base, master))
    assert all(same_bits(results[0], other) for other in results[1:])


@MASTER
@pytest.mark.parametrize("base", BASES)
def test_same_bits_for_any_use_of_the_memory(base: str, master: bool) -> None:
    from looksam_kernels import _C

    results = []
    for way in ("plain", "streams", "ahead", "ahead, streams", "measured"):
        _C.use_memory(way)
        results.append(run(base, master))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_the_use_of_the_memory_is_chosen_on_the_first_large_tensor_of_each_op() -> None:
    from looksam_kernels import _C

    with pytest.raises(ValueError, match="or measured, not fast"):
        _C.use_memory("fast")
    _C.use_memory("measured")
    assert set(_C.memory_uses().values()) == {"measured"}
    size = 2 * 8192 * 64 * 5 * 4  # enough full blocks in each way, whichever thread ends first
    w = torch.zeros(size)
    columns = {name: [torch.ones(size)] for name in ("g", "b", "momentum_buffer")}
    table = TensorTable([w], backend="native", step=[torch.tensor(0.0)], **columns)
    _, coefficients = ops.measure(table, "sam", [GROUP])
    assert _C.memory_uses()["sums"] != "measured"
    assert _C.memory_uses()["perturb"] == "measured"
    ops.perturb(table, coefficients)
    ops.step(table, "sgd", ops.measure(table, "at_w", [GROUP])[1], [GROUP])
    assert "measured" not in _C.memory_uses().values()


def test_every_written_tensor_says_so_to_autograd() -> None:
    table = make_table(master=False)
    versions = {name: [x._version for x in table[name]] for name in table}

    def written() -> set[str]:
        return {name for name in table if any(x._version > v for x, v in zip(table[name], versions[name], strict=True))}

    sums, coefficients = ops.measure(table, "sam", [GROUP])
    assert written() == set()
    ops.perturb(table, coefficients)
    assert written() == {"w", "b"}
    _, coefficients = ops.measure(table, "looksam_refresh", [GROUP], known=sums)
    ops.step(table, "adamw", coefficients, [GROUP])
    assert {"w", "q", "q_norm_sq", "exp_avg", "exp_avg_sq", "step"} <= written()
    assert not {"g", "s", "momentum_buffer"} & written()


def test_a_column_that_no_longer_fits_is_an_error_not_an_overrun() -> None:
    table = make_table()
    table["g"][4].resize_(3)
    with pytest.raises(ValueError, match="row 4: the shape has changed"):
        ops.sums(table, [("g", "g")])


def test_weights_on_another_device_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="'native' cannot run on meta tensors"):
        TensorTable([torch.ones(3), torch.ones(3, device="meta")], backend="native")


def test_small_and_large_sums_are_exact_where_float32_is_not() -> None:
    """Squares of 1e-30 vanish and squares of 1e30 overflow in float32; partial sums are float64."""
    for size in (1e-30, 1e30):
        table = TensorTable([torch.zeros(100)], backend="native", g=[torch.full((100,), size)])
        exact = 100 * torch.tensor(size).double().item() ** 2
        assert ops.sums(table, [("g", "g")]).values.item() == pytest.approx(exact, rel=1e-12)
