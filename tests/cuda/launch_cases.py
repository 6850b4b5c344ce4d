"""How many launches, and tables too large for one. Run by test_harness.py on the host harness; on a GPU by test_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import looksam
import looksam_kernels as lk
from looksam_kernels.backends import native
from tests.cuda import sanitize
from tests.kernels import cases
from tests.kernels.cases import BASE_CASES, BF16, COMBINATIONS, F16, F32, F64, RULE_GROUPS, Row
from tests.nightly import NIGHTLY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def launches() -> int:
    module = native._cuda if DEVICE == "cuda" else native._C
    return module.launches()


def tensors(count: int, size: int = 5) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1 + i % size, generator=random).to(DEVICE) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "base"),
    [
        *((1, "adamw"), (152, "adamw"), (152, "lars"), (152, "rmsprop"), (152, "lamb"), (400, "lamb")),
        *([(4000, "adamw")] if NIGHTLY or DEVICE == "cuda" else []),  # half a minute on the harness
    ],
)
def test_a_refresh_has_4_launches_and_a_reuse_2_and_one_more_each_for_lamb_and_lars(count: int, base: str) -> None:
    params = [torch.nn.Parameter(w) for w in tensors(count)]
    kwargs: dict[str, Any] = {"max_grad_norm": None} if base == "lamb" else {}
    optimizer = looksam.LookSAM(params, base, k=2, backend="native", lr=0.01, **kwargs)

    def closure() -> None:
        for p, g in zip(params, tensors(count), strict=True):
            p.grad = g

    counts = []
    for _ in range(4):
        before = launches()
        optimizer.step(closure)
        counts.append(launches() - before)
    more = base in ("lamb", "lars")
    assert counts[2:] == [4 + more, 2 + more], "after a first cycle, which also files the table"


def test_rows_of_two_dtypes_share_their_launches() -> None:
    rows = [Row((33,), F32), Row((70,), BF16), Row((5,), BF16, master=True), Row((), F32)]
    made = cases.table(rows, cases.columns(rows, DEVICE), "native")
    c = COMBINATIONS["s"].coefficients(rows, DEVICE)._replace(inputs=("g",))
    for _ in range(2):
        before = launches()
        lk.perturb(made, c)
    assert launches() - before == 1


def compare(rows: list[Row], base: str, direction: str, groups: list[dict[str, Any]]) -> None:
    c = COMBINATIONS[direction].coefficients(rows, DEVICE)
    start = cases.columns(rows, DEVICE)
    results = []
    for backend, columns in (("native", start), ("reference", start), ("reference", cases.widened(start))):
        columns = cases.copy(columns)
        made = cases.table(rows, columns, backend)
        found = lk.sums(made, (("g", "g"), ("g", "s"), ("w", "w"))).values
        lk.perturb(made, c._replace(d=0.05 * c.d))
        lk.step(made, base, c, groups)
        results.append((columns, found))
    (mine, found), (baseline, _), (truth, exact) = results
    assert torch.allclose(found, exact, rtol=1e-5, atol=1e-5)
    for name in ("w", "exp_avg", "step"):
        for row in range(len(rows)):
            cases.assert_close(f"{name} of row {row}", mine[name][row], baseline[name][row], truth[name][row])


def test_more_rows_than_a_launch_takes() -> None:
    compare([Row((1 + i % 3,)) for i in range(4097)], *BASE_CASES["adamw"][:1], "g + c q", BASE_CASES["adamw"][1])


@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_more_groups_than_a_launch_takes(order: str) -> None:
    count = 130
    of_row = [i if order == "sorted" else 37 * i % count for i in range(count)]
    groups = [{**BASE_CASES["lamb"][1][i % 3], "lr": 0.01 + 0.001 * i} for i in range(count)]
    compare([Row((1 + i % 7,), group=g) for i, g in enumerate(of_row)], "lamb", "g + c q", groups)


def test_more_groups_than_the_epilogue_takes() -> None:
    rows = [Row((1 + i % 7,), group=i) for i in range(130)]
    cols = cases.columns(rows, DEVICE)
    groups = [{"rho": 0.01 * i, "perturb_eps": 1e-12} for i in range(130)]
    _, mine = lk.measure(cases.table(rows, cols, "native"), "sam", groups)
    _, theirs = lk.measure(cases.table(rows, cols, "reference"), "sam", groups)
    assert torch.allclose(mine.d, theirs.d, rtol=1e-5)


def test_a_dtype_that_the_kernel_of_the_row_does_not_know() -> None:
    rows = [Row((65,), BF16, master=True), Row((65,), F32), Row((65,), F64)]
    cols = cases.columns(rows, DEVICE)
    foreign = {"g": F16, "s": F64, "q": BF16, "exp_avg": BF16, "exp_avg_sq": F32}
    for column, dtype in foreign.items():
        cols[column] = [None if x is None else x.to(dtype) for x in cols[column]]
    c = COMBINATIONS["s + c q, q <- mean of g"].coefficients(rows, DEVICE)
    results = []
    for backend in ("native", "reference"):
        columns = cases.copy(cols)
        lk.step(cases.table(rows, columns, backend), *BASE_CASES["adamw"][:1], c, BASE_CASES["adamw"][1])
        results.append(columns)
    for name in ("w", "b", "exp_avg", "exp_avg_sq", "q"):
        for mine, theirs in zip(results[0][name], results[1][name], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_messages_name_column_and_row() -> None:
    rows = [Row((4,)), Row((5,))]
    cols = cases.columns(rows, DEVICE)
    cols["step"][1] = cols["step"][1].double()
    with pytest.raises(TypeError, match="'step', row 1"):
        lk.step(
            cases.table(rows, cols, "native"),
            *BASE_CASES["adam"][:1],
            COMBINATIONS["s"].coefficients(rows, DEVICE),
            BASE_CASES["adam"][1],
        )


@pytest.mark.parametrize("base", ["sgd-nesterov", "adamw", "lamb"])
@pytest.mark.parametrize("variant", ["SAM", "LookSAM", "LookLayerSAM"])
def test_six_steps_follow_the_reference(variant: str, base: str) -> None:
    """Six: two sharp and four reuse steps. nvcc contracts products and sums, so each step has other roundings than the
    baseline's, and training multiplies what is there by 1 + lr times the curvature: after twelve steps the distance says more
    about the function that is trained than about the kernels. Rows share norms, and with them their errors; that of a short row
    may pass through 0 in the baseline, so what is allowed is the largest of all rows.
    """
    name, (hyper, *_) = BASE_CASES[base]
    options = {
        key: value for key, value in hyper.items() if key not in ("always_adapt", "trust_clip", "bias_correction")
    }
    ends = []
    for backend, dtype in (("native", F32), ("reference", F32), ("reference", F64)):
        params = [torch.nn.Parameter(w.to(dtype)) for w in tensors(9, size=70)]
        optimizer = getattr(looksam, variant)(params, name, backend=backend, **options)
        targets = [torch.linspace(-1, 1, p.numel(), dtype=dtype, device=DEVICE) for p in params]

        def closure(params: Any = params, targets: Any = targets, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = sum(((p - t) ** 4).sum() + (p.sin() ** 2).sum() for p, t in zip(params, targets, strict=True))
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.step(closure)
        ends.append([p.detach() for p in params])
    mine, baseline, truth = (torch.cat([p.flatten().double() for p in end]) for end in ends)
    error, allowed = (mine - truth).abs().max(), (baseline - truth).abs().max()
    assert error <= 4 * allowed + 6 * cases.FEW_ULPS * torch.finfo(F32).eps


def test_what_the_sanitizers_run() -> None:
    sanitize.main(DEVICE)


def test_a_column_is_uploaded_by_the_launch_that_uploads_it_not_before() -> None:
    """An op that fails on its way there leaves nothing behind that the next one takes for addresses."""
    rows = [Row((33,)), Row((5,))]
    cols = cases.columns(rows, DEVICE)
    made = cases.table(rows, {**cols, "q_norm_sq": [x.float() for x in cols["q_norm_sq"]]}, "native")
    with pytest.raises(TypeError, match=r"'q_norm_sq', row 0: .*must be Double"):
        lk.measure(made, "looksam_reuse", RULE_GROUPS)
    made["q_norm_sq"] = cols["q_norm_sq"]
    found, _ = lk.measure(made, "looksam_reuse", RULE_GROUPS)
    again, _ = lk.measure(cases.table(rows, cols, "native"), "looksam_reuse", RULE_GROUPS)
    assert torch.equal(found.values, again.values)


def test_an_lr_on_another_device_is_fetched_or_refused() -> None:
    """Its address would be read as one of this device."""
    rows = [Row((33,))]
    name, groups = BASE_CASES["adam"]
    c = COMBINATIONS["s"].coefficients(rows, DEVICE)
    tensors = [{**h, "lr": torch.tensor(h["lr"], dtype=torch.float64)} for h in groups]
    results = []
    for chosen in (groups, tensors):
        cols = cases.columns(rows, DEVICE)
        lk.step(cases.table(rows, cols, "native"), name, c, chosen)
        results.append(cols["w"])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    nowhere = [{**h, "lr": torch.tensor(h["lr"], device="meta")} for h in groups]
    with pytest.raises(Exception, match="meta"):
        lk.step(cases.table(rows, cases.columns(rows, DEVICE), "native"), name, c, nowhere)
    two = [{**h, "lr": torch.full((2,), h["lr"], device=DEVICE)} for h in groups]
    with pytest.raises(ValueError, match="lr has 2 elements"):
        lk.step(cases.table(rows, cases.columns(rows, DEVICE), "native"), name, c, two)


def test_tensors_that_share_their_elements_until_they_are_written_get_their_own() -> None:
    rows = [Row((33,))]
    cols = cases.columns(rows, DEVICE)
    before = cases.copy(cols)
    clones = {name: [torch._lazy_clone(x) for x in column] for name, column in cols.items()}
    name, groups = BASE_CASES["adam"]
    lk.step(
        cases.table(rows, clones, "native"), name, COMBINATIONS["s, q = s - c g"].coefficients(rows, DEVICE), groups
    )
    assert cases.same_bits(cols, before)
    assert not torch.equal(clones["w"][0], cols["w"][0])
    assert clones["step"][0].item() == cols["step"][0].item() + 1


def test_reading_a_norm_is_not_writing_it() -> None:
    rows = [Row((33,))]
    cols = cases.columns(rows, DEVICE)
    before = cols["q_norm_sq"][0]._version
    lk.measure(cases.table(rows, cols, "native"), "looksam_reuse", RULE_GROUPS)
    assert cols["q_norm_sq"][0]._version == before


def test_what_a_table_keeps_on_the_device_does_not_grow_with_the_mixes_of_dtypes_it_has_seen() -> None:
    rows = [Row((33,)) for _ in range(6)]
    cols = cases.columns(rows, DEVICE)
    made = cases.table(rows, cols, "native")
    counts = []
    for mix in range(40):
        g = [x.to((F32, BF16, F16, F64)[mix >> i & 3]) for i, x in enumerate(cols["g"])]
        made["g"] = g
        found = lk.sums(made, (("g", "g"),)).values
        fresh = lk.sums(cases.table(rows, {**cols, "g": g}, "native"), (("g", "g"),)).values
        assert torch.equal(found, fresh)
        counts.append(len(made.handle.arrays()))
    assert max(counts) == counts[-1] <= 8 * 14


def test_numbers_that_do_not_fit_the_table_are_errors() -> None:
    """Kernels would read past their end."""
    rows = [Row((33,)), Row((5,), group=1)]
    cols = cases.columns(rows, DEVICE)
    made = cases.table(rows, cols, "native")
    c = COMBINATIONS["s"].coefficients(rows[:1], DEVICE)
    with pytest.raises(ValueError, match=r"coefficients\.d has 1 numbers, not the 2"):
        lk.step(made, "adam", c, BASE_CASES["adam"][1])
    with pytest.raises(ValueError, match="row 1 is in group 1, but there are only 1"):
        lk.measure(made, "sam", RULE_GROUPS[:1])
    cols["step"][0].resize_(0)
    with pytest.raises(ValueError, match="'step', row 0: 0 elements"):
        lk.step(made, "adam", COMBINATIONS["s"].coefficients(rows, DEVICE), BASE_CASES["adam"][1])


def test_a_tensor_that_has_changed_since_the_last_op_is_read_as_it_is_now_or_refused() -> None:
    rows = [Row((4, 6))]
    cols = cases.columns(rows, DEVICE)
    made = cases.table(rows, cols, "native")
    (g,) = cols["g"]
    assert g is not None
    changes = [lambda: g.data * 2, lambda: g.data.t().contiguous().t(), lambda: g.data.to(BF16), lambda: g.data.to(F64)]
    for change in changes:
        for _ in range(2):
            found = lk.sums(made, (("g", "g"), ("g", "w"))).values
            assert torch.equal(found, lk.sums(cases.table(rows, cols, "native"), (("g", "g"), ("g", "w"))).values)
        g.data = change()
    g.data = g.data[:2]
    with pytest.raises(ValueError, match="'g', row 0: the shape has changed"):
        lk.sums(made, (("g", "g"),))
    g.data = cols["s"][0].clone()
    lk.sums(made, (("g", "g"),))
    g.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="'g', row 0 has no memory"):
        lk.sums(made, (("g", "g"),))
