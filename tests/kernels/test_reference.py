"""The oracle itself: against torch.optim, against cases worked out by hand, and against LAMB stated a second time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import looksam_kernels as lk
from looksam_kernels import TensorTable
from looksam_kernels.formulas import Coefficients
from looksam_kernels.updates import BASES
from tests import bases
from tests.kernels.cases import BASE_CASES

F64 = torch.float64
STEPS = 12


def table(w: list[Tensor], **columns: list[Tensor | None]) -> TensorTable:
    return TensorTable(w, backend="reference", **columns)


def directly(rows: int) -> Coefficients:
    """d = g."""
    return Coefficients(("g",), torch.ones(1, rows, dtype=F64), None, torch.tensor(0.0))


# Base updates -------------------------------------------------------------------------------------------------------


def follow(base: str, options: dict[str, Any], gradients: list[list[Tensor]], start: list[Tensor]) -> list[Tensor]:
    """The parameters after as many steps as there are gradients."""
    w = [x.clone() for x in start]
    first = {"sum": options.get("initial_accumulator_value", 0.0)}
    states = {name: [torch.full_like(x, first.get(name, 0.0)) for x in w] for name in BASES[base].states}
    made = table(w, **states, step=[torch.zeros(()) for _ in w])
    for g in gradients:
        made["g"] = g
        lk.step(made, base, directly(len(w)), [options])
    return w


SGD = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}


def test_every_base_has_a_row() -> None:
    assert list(bases.BASES) == [name for name, row in BASES.items() if row.update is not None]
    for name, base in bases.BASES.items():
        assert {bases.base_of(case) for case in (*base.kernels, *base.hyper)} == {name}


def of_torch() -> list[Any]:
    """The op matrix's cases of the bases that torch has, each with every group's lr and decay."""
    params = []
    for case, (name, groups) in BASE_CASES.items():
        for group in groups:
            if isinstance(BASES[name].options, type):
                named = bases.by_own_names(group)
                options = {key: x for key, x in named.items() if not key.startswith("base.")}
                params.append(pytest.param(name, options, id=f"{case}-{group['lr']}"))
    return params


@pytest.mark.parametrize(("base", "options"), of_torch())
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_bases_are_those_of_torch(base: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Two ulps of the largest weight a step: torch rounds the same few operations, in its own order."""
    random = torch.Generator().manual_seed(0)
    shapes = ((3,), (), (7, 5))
    start = [torch.randn(s, generator=random, dtype=F64).to(dtype) for s in shapes]
    gradients = [[torch.randn(s, generator=random, dtype=F64).to(dtype) for s in shapes] for _ in range(STEPS)]

    parameters = [torch.nn.Parameter(x.clone()) for x in start]
    theirs = BASES[base].options
    assert theirs is not None
    optimizer = theirs(parameters, **options)
    for g in gradients:
        for p, grad in zip(parameters, g, strict=True):
            p.grad = grad.clone()
        optimizer.step()

    for mine, other in zip(follow(base, options, gradients, start), parameters, strict=True):
        ulp = torch.finfo(dtype).eps * max(1.0, other.abs().max().item())
        assert (mine - other).abs().max().item() <= 2 * STEPS * ulp


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("always_adapt", [False, True])
@pytest.mark.parametrize("trust_clip", [False, True])
def test_lamb_stated_again(weight_decay: float, always_adapt: bool, trust_clip: bool) -> None:
    """You et al. 2020 as timm and apex have it: bias-corrected moments, decay inside the trust ratio."""
    beta1, beta2, eps, lr = 0.9, 0.99, 1e-6, 0.01
    options = {
        "lr": lr,
        "betas": (beta1, beta2),
        "eps": eps,
        "weight_decay": weight_decay,
        "always_adapt": always_adapt,
        "trust_clip": trust_clip,
        "bias_correction": True,
    }
    random = torch.Generator().manual_seed(1)
    start = [torch.randn(5, generator=random, dtype=F64), torch.zeros(4, dtype=F64), torch.tensor(3.0, dtype=F64)]
    gradients = [[torch.randn(x.shape, generator=random, dtype=F64) for x in start] for _ in range(STEPS)]

    expected = []
    for row, x in enumerate(start):
        w, m, v = x.flatten().tolist(), [0.0] * x.numel(), [0.0] * x.numel()
        for t, of_step in enumerate(gradients, start=1):
            g = of_step[row].flatten().tolist()
            m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g, strict=True)]
            v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g, strict=True)]
            u = [
                a / (1 - beta1**t) / (math.sqrt(b / (1 - beta2**t)) + eps) + weight_decay * c
                for a, b, c in zip(m, v, w, strict=True)
            ]
            trust = 1.0
            if weight_decay or always_adapt:
                w_norm, u_norm = math.hypot(*w), math.hypot(*u)
                trust = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
            trust = min(trust, 1.0) if trust_clip else trust
            w = [a - lr * trust * b for a, b in zip(w, u, strict=True)]
        expected.append(torch.tensor(w, dtype=F64).view(x.shape))

    for mine, other in zip(follow("lamb", options, gradients, start), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_lion_by_hand() -> None:
    """m = (0.5, -1, 0), d = (-1, 1, 0), beta1 = 0.5: 0.5 m + 0.5 d = (-0.25, 0, 0), so of the signs only the first moves."""
    w, m = torch.tensor([1.0, 2.0, 3.0], dtype=F64), torch.tensor([0.5, -1.0, 0.0], dtype=F64)
    d = torch.tensor([-1.0, 1.0, 0.0], dtype=F64)
    made = table([w], g=[d], exp_avg=[m], step=[torch.zeros(())])
    lk.step(made, "lion", directly(1), [{"lr": 0.5, "betas": (0.5, 0.75), "weight_decay": 0.5}])
    torch.testing.assert_close(w, torch.tensor([0.75 + 0.5, 1.5, 2.25], dtype=F64))
    torch.testing.assert_close(m, torch.tensor([0.125, -0.5, 0.0], dtype=F64))


def test_lars_by_hand() -> None:
    """||w_p|| = 5, ||d_p|| = 2, so r = 0.1 x 5 / (2 + 0.2 x 5 + 2) = 0.1 and w -= 0.5 x 0.1 (d + 0.2 w); a tensor of zeros
    has r = 1."""
    w = [torch.tensor([3.0, 4.0], dtype=F64), torch.zeros(2, dtype=F64)]
    g = [torch.tensor([0.0, 2.0], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)]
    made = table(w, g=g, step=[torch.zeros(()) for _ in w])
    own = {"trust_coefficient": 0.1, "eps": 2.0, "always_adapt": False, "trust_clip": False}
    groups = [{**SGD, **own, "lr": 0.5, "weight_decay": 0.2}]
    sums, c = lk.measure(made, "at_w", groups, trust_ratio=True)
    assert sums.of("w", "w").tolist() == [25.0, 0.0]
    assert c.trust is not None
    assert c.trust.tolist() == pytest.approx([0.1, 1.0])
    lk.step(made, "lars", c, groups)
    torch.testing.assert_close(w[0], torch.tensor([3 - 0.05 * 0.6, 4 - 0.05 * 2.8], dtype=F64))
    torch.testing.assert_close(w[1], torch.tensor([-0.5, 0.0], dtype=F64))
    for options, expected in (
        ({"trust_clip": True}, 0.1 / 0.5),
        ({"trust_clip": True, "lr": 0.05}, 1.0),
        ({"weight_decay": 0.0}, 1.0),
        ({"weight_decay": 0.0, "always_adapt": True}, 0.5 / 4),
    ):
        fresh = table([torch.tensor([3.0, 4.0], dtype=F64)], g=g[:1])
        _, c = lk.measure(fresh, "at_w", [{**groups[0], **options}], trust_ratio=True)
        assert c.trust is not None
        assert c.trust.item() == pytest.approx(expected)


# By hand ------------------------------------------------------------------------------------------------------------


def test_sam_by_hand() -> None:
    """w = (1, 2), g = (3, 4): ||g|| = 5, e = 0.1 g / 5 = (0.06, 0.08). With s = (1, 0), SGD of lr 0.5: w = (0.5, 2)."""
    w = torch.tensor([1.0, 2.0], dtype=F64)
    made = table([w], b=[torch.empty_like(w)], g=[torch.tensor([3.0, 4.0], dtype=F64)], step=[torch.zeros(())])
    groups = [{**SGD, "lr": 0.5, "rho": 0.1}]
    sums, c = lk.measure(made, "sam", groups)
    assert sums.total("g", "g").item() == 25.0
    lk.perturb(made, c)
    torch.testing.assert_close(w, torch.tensor([1.06, 2.08], dtype=F64))
    assert made["b"][0].tolist() == [1.0, 2.0]
    made["s"] = [torch.tensor([1.0, 0.0], dtype=F64)]
    _, c = lk.measure(made, "at_perturbed", groups, found_inf=c.found_inf)
    lk.step(made, "sgd", c, groups)
    assert w.tolist() == [0.5, 2.0]


def test_asam_by_hand() -> None:
    """w = (-2, 1), eta = 0, g = (1, 2): T g = (2, 2), e = rho T^2 g / ||T g|| = sqrt(8) (4, 2) / sqrt(8)."""
    w = torch.tensor([-2.0, 1.0], dtype=F64)
    made = table([w], b=[torch.empty_like(w)], g=[torch.tensor([1.0, 2.0], dtype=F64)])
    _, c = lk.measure(made, "asam", [{"rho": math.sqrt(8)}], adaptive=[0.0])
    lk.perturb(made, c, [0.0])
    torch.testing.assert_close(w, torch.tensor([2.0, 3.0], dtype=F64))


def test_looksam_by_hand() -> None:
    """g = (3, 4), s = (5, 5): <g,s>/||g||^2 = 35/25, q = (0.8, -0.6), of length 1 and orthogonal to g. Then with the
    next g = (0, 2): d = g + 0.5 (2 / 1) q = (0.8, 1.4)."""
    w = torch.zeros(2, dtype=F64)
    made = table(
        [w],
        g=[torch.tensor([3.0, 4.0], dtype=F64)],
        s=[torch.tensor([5.0, 5.0], dtype=F64)],
        q=[torch.zeros(2, dtype=F64)],
        q_norm_sq=[torch.zeros((), dtype=F64)],
        step=[torch.zeros(())],
    )
    groups = [{**SGD, "lr": 1.0, "alpha": 0.5}]
    _, c = lk.measure(made, "looksam_refresh", groups)
    lk.step(made, "sgd", c, groups)
    torch.testing.assert_close(made["q"][0], torch.tensor([0.8, -0.6], dtype=F64))
    torch.testing.assert_close(made["q_norm_sq"][0], torch.tensor(1.0, dtype=F64))
    assert w.tolist() == [-5.0, -5.0]
    made["g"] = [torch.tensor([0.0, 2.0], dtype=F64)]
    _, c = lk.measure(made, "looksam_reuse", groups)
    lk.step(made, "sgd", c, groups)
    torch.testing.assert_close(w, torch.tensor([-5.8, -6.4], dtype=F64))


@pytest.mark.parametrize(
    ("rule", "lengths"),
    [
        ("trust_normalized", (0.1 * 3 / math.sqrt(14), 0.1 * 2 / math.sqrt(14), 0.1 / math.sqrt(14))),
        ("trust", (0.1 * 3, 0.1 * 2, 0.1)),
        ("trust_global", (0.1 * 3 / 7, 0.1 * 2 / 7, 0.1 / 7)),
        ("unit", (0.1, 0.1, 0.1)),
    ],
)
def test_layersam_by_hand(rule: str, lengths: tuple[float, ...]) -> None:
    """||w_p|| = 3, 2, 1 and ||g_p|| = 2, 3, 6, ||g|| = 7: how far each tensor moves, by the reading of the paper."""
    w = [torch.tensor([x, 0.0], dtype=F64) for x in (3.0, 2.0, 1.0)]
    g = [torch.tensor([0.0, x], dtype=F64) for x in (2.0, 3.0, 6.0)]
    made = table(w, b=[torch.empty_like(x) for x in w], g=g)
    _, c = lk.measure(made, rule, [{"rho": 0.1, "layer_scaled": 1.0}])
    lk.perturb(made, c)
    moved = [(x - b).norm().item() for x, b in zip(w, made["b"], strict=True)]
    assert moved == pytest.approx(lengths, rel=1e-12)


def test_clipping_and_maximize_by_hand() -> None:
    """||d|| = 5 clipped to 1; maximize turns the step round, not the clipping."""
    w = [torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64)]
    made = table(
        w, g=[torch.tensor([3.0], dtype=F64), torch.tensor([4.0], dtype=F64)], step=[torch.zeros(()) for _ in w]
    )
    groups = [{**SGD, "lr": 1.0, "maximize": True}]
    _, c = lk.measure(made, "at_w", groups, max_grad_norm=1.0)
    lk.step(made, "sgd", c, groups)
    assert [x.item() for x in w] == pytest.approx([0.6, 0.8])


def test_found_inf_by_hand() -> None:
    w = torch.tensor([1.0], dtype=F64)
    made = table([w], b=[torch.empty_like(w)], g=[torch.tensor([math.inf], dtype=F64)], step=[torch.zeros(())])
    _, c = lk.measure(made, "sam", [{"rho": 0.1}])
    assert c.found_inf.item() == 1.0
    lk.perturb(made, c)
    lk.step(made, "sgd", c, [SGD])
    assert w.item() == 1.0
    assert made["step"][0].item() == 0.0


def test_low_precision_rows_are_rounded_once() -> None:
    """bfloat16 w + e is the nearest bfloat16 to the float32 sum."""
    w = torch.tensor([1.0, -3.0, 0.01]).bfloat16()
    g = torch.tensor([0.3, 0.7, -0.2]).bfloat16()
    c = Coefficients(("g",), torch.tensor([[0.123]], dtype=F64), None, torch.tensor(0.0))
    expected = (w.float() + torch.tensor(0.123) * g.float()).bfloat16()
    lk.perturb(table([w], b=[torch.empty_like(w)], g=[g]), c)
    assert torch.equal(w, expected)
