"""``nonfinite="ignore"``: no step is left out, and the last gradient is not read for the check alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looksam
from looksam_kernels import backend_info, ops
from looksam_kernels.formulas import ASCENTS, DESCENTS, Hyper, Sums, kept_norm
from tests.contract.support import OPTIONS, VARIANTS, Closure, build, network, states, train, weights, works

BACKENDS = [name for name, info in backend_info("cpu").items() if info.available]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of Triton's interpreter
on_backends = pytest.mark.parametrize("backend", BACKENDS)
HYPER: dict[str, Any] = {
    "rho": 0.1,
    "alpha": 0.7,
    "strength": 0.5,
    "gamma": 0.3,
    "beta": 0.2,
    "theta": 0.5,
    "lambda_": 0.2,
    "lr": 0.1,
}
HYPER |= {"momentum": 0.9, "betas": (0.9, 0.99), "weight_decay": 0.1, "layer_scale": "trust", "layer_scaled": 1.0}


@pytest.mark.parametrize("rule", DESCENTS)
def test_a_formula_reads_all_of_its_sums_but_those_that_are_only_checked(rule: str) -> None:
    descent, needed = DESCENTS[rule], ops.pairs_of(rule, check=False)
    hyper = Hyper([HYPER], [0, 0], torch.device("cpu"))

    def evaluate(pairs: Any) -> None:
        descent.formula(Sums(tuple(pairs), torch.ones(len(pairs), 2, dtype=torch.float64)), hyper)

    assert {*needed} == {*descent.pairs} - {*descent.only_checked}
    evaluate(needed)
    for missing in needed:
        with pytest.raises(ValueError, match="not in"):
            evaluate([pair for pair in needed if pair != missing])


@pytest.mark.parametrize("rule", DESCENTS)
def test_clipping_and_lars_need_the_sums_of_the_check(rule: str) -> None:
    for options in ({"clip": True}, {"trust_ratio": True}):
        assert ops.pairs_of(rule, **options, check=False) == ops.pairs_of(rule, **options)


@on_backends
@pytest.mark.parametrize("variant", VARIANTS)
def test_finite_gradients_give_the_same_bits(backend: str, variant: str) -> None:
    if backend == "triton" and variant not in ("sam", "wsam"):
        pytest.skip("the interpreter takes seconds a step; tests/kernels/test_ops.py has every rule without sums")
    for base in ("adamw",) if backend == "triton" else ("adamw", "lamb", "lars", "wrapped rmsprop"):
        if not works(variant, base):
            continue
        ends = []
        for nonfinite in ("skip", "ignore"):
            model = network()
            optimizer = build(model.parameters(), variant, base, backend=backend, nonfinite=nonfinite)
            train(model, optimizer, 2)
            ends.append((weights(model), states(optimizer)))
        assert all(map(torch.equal, ends[0][0], ends[1][0]))
        for one, other in zip(ends[0][1], ends[1][1], strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


READS = {
    ("sam", "adamw", None): ([("g", "g")], [], []),
    ("looksam", "adamw", None): ([("g", "g")], [("g", "s")], [("g", "g"), ("q", "q")]),
    ("ssam", "adamw", None): ([("g", "g")], [("s", "s")], []),
    ("wsam", "adamw", None): ([("g", "g")], [], []),
    ("sam", "lamb", None): ([("g", "g")], [], []),
    ("sam", "lamb", 1.0): ([("g", "g")], [("s", "s")], [("g", "g")]),
    ("sam", "lars", None): ([("g", "g"), ("w", "w")], [("s", "s")], [("g", "g"), ("w", "w")]),
}
"""Variant, base and limit of the norm -> the sums that the perturbation, the sharp step's update and the next step take."""


@on_backends
@pytest.mark.parametrize(("case", "expected"), READS.items(), ids=lambda x: " ".join(map(str, x)) if len(x[0]) else "")
def test_the_sums_that_are_taken(backend: str, case: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, base, limit = case
    model = network()
    options = {"max_grad_norm": limit, "nonfinite": "ignore", "backend": backend}
    optimizer = build(model.parameters(), variant, base, **options)
    taken, unknown = [], ops._unknown

    def noted(*args: Any) -> Any:
        taken.append([*unknown(*args)])
        return unknown(*args)

    monkeypatch.setattr(ops, "_unknown", noted)
    train(model, optimizer, 2)
    assert tuple(taken) == expected


@on_backends
@pytest.mark.parametrize("base", ["adamw", "wrapped rmsprop"])
@pytest.mark.parametrize("variant", ["sam", "looksam", "vasso"])
def test_what_is_not_finite_goes_into_weights_and_state_and_the_step_counts(
    backend: str, variant: str, base: str
) -> None:
    """Except in SAM's first gradient, which only says where the second is taken."""
    if backend == "triton" and (variant, base) != ("looksam", "adamw"):
        pytest.skip("the interpreter takes seconds a step")
    passes = [(0, 0), (0, 1), *([] if variant == "vasso" else [(1, 0)])]
    for (step, call), value in zip(passes, (torch.inf, torch.nan, torch.inf), strict=False):
        model = network()
        optimizer = build(model.parameters(), variant, base, backend=backend, nonfinite="ignore")
        train(model, optimizer, step)
        optimizer.step(Closure(model, optimizer, after=spoiled(model, call, value)))
        found = [*model.parameters(), *(x for p in model.parameters() for x in optimizer.state[p].values())]
        assert all(x.isfinite().all() for x in found) == (variant == "sam" and call == step == 0)
        assert all(optimizer.state[p]["step"].item() == step + 1 for p in model.parameters())
        assert optimizer.skipped_steps.item() == 0


def test_what_decides_by_the_gradient_leaves_no_step_out_either() -> None:
    for variant in ("aesam", "aelooksam"):
        model = network()
        optimizer = build(model.parameters(), variant, "adamw", nonfinite="ignore")
        optimizer.step(Closure(model, optimizer, after=spoiled(model, 0, torch.nan)))
        assert not all(p.isfinite().all() for p in model.parameters())
        assert optimizer.param_groups[0]["mu"] == 0.0


def spoiled(model: nn.Module, call: int, value: float) -> Callable[[int], None]:
    """Puts the value into one element of the gradient of pass ``call``."""

    def after(number: int) -> None:
        if number == call:
            next(model.parameters()).grad.view(-1)[0] = value

    return after


@on_backends
def test_the_weights_are_then_those_of_torch(backend: str) -> None:
    ours, theirs = (nn.Parameter(torch.ones(6)) for _ in range(2))
    optimizer = looksam.SAM([ours], "sgd", lr=0.5, k=10**6, backend=backend, nonfinite="ignore")
    optimizer.param_groups[0]["phase"] = 1
    peer = torch.optim.SGD([theirs], lr=0.5)
    for p in (ours, theirs):
        p.grad = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, 0.0, 2.0])
    optimizer.first_step()
    peer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_sharp_step_whose_first_gradient_is_not_finite_is_not_perturbed() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = looksam.SAM([p], "sgd", lr=0.5, nonfinite="ignore")
    p.grad = torch.tensor([1.0, torch.inf, 2.0])
    optimizer.first_step()
    assert torch.equal(p, torch.ones(3))
    p.grad = torch.ones(3)
    optimizer.second_step()
    assert torch.equal(p, torch.full((3,), 0.5))


@on_backends
@pytest.mark.parametrize("style", ["closure", "two calls", "unscaled"])
def test_with_a_scaler_every_step_is_checked(backend: str, style: str) -> None:
    for variant, call in (("sam", 0), ("sam", 1), ("looksam", 1))[2 * (backend == "triton") :]:
        model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.zeros(()))  # makes the scale
        optimizer = build(model.parameters(), variant, "adamw", backend=backend, nonfinite="ignore")
        closure = Closure(model, optimizer, scale=scaler.scale, after=spoiled(model, call, torch.inf))
        before = weights(model)
        if style == "closure":
            scaler.step(optimizer, closure)
        else:
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            if style == "unscaled":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, before, weights(model)))
        assert scaler.get_scale() == 32.0
        assert optimizer.skipped_steps.item() == 1


def test_other_values_are_errors_that_name_both() -> None:
    for cls in (looksam.SAM, looksam.LookSAM):
        with pytest.raises(ValueError, match="nonfinite must be one of 'skip', 'ignore', not 'none'"):
            cls(network().parameters(), "sgd", lr=0.1, nonfinite="none")
    for cls in (looksam.LAMB, looksam.LARS, looksam.Lion):
        with pytest.raises(ValueError, match=r"nonfinite must be one of 'skip', 'ignore'.*did you mean 'ignore'"):
            cls(network().parameters(), nonfinite="ignored")
    with pytest.raises(TypeError, match="nonfinite must be a name, one of 'skip', 'ignore', not "):
        looksam.SAM(network().parameters(), "sgd", lr=0.1, nonfinite=False)


@pytest.mark.parametrize("name", ["LAMB", "LARS", "Lion"])
def test_an_optimizer_by_itself_has_it_too(name: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = getattr(looksam, name)([p], nonfinite="ignore", max_grad_norm=None)
    p.grad = torch.full((3,), torch.nan)
    optimizer.step()
    assert all(x.isnan().all() for x in optimizer.state[p].values() if x.shape == p.shape)
    assert p.isnan().all() or name == "Lion"  # the sign of NaN is 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoints_hold_it_and_older_ones_need_not(variant: str) -> None:
    optimizer = build(network().parameters(), variant, nonfinite="ignore")
    saved = optimizer.state_dict()
    other = build(network().parameters(), variant)
    other.load_state_dict(saved)
    assert [g["nonfinite"] for g in other.param_groups] == ["ignore"]
    for group in saved["param_groups"]:
        del group["nonfinite"]
    model = network()
    other = build(model.parameters(), variant, nonfinite="ignore", **OPTIONS.get(variant, {}))
    other.load_state_dict(saved)
    train(model, other, 1)
    assert [g["nonfinite"] for g in other.param_groups] == ["ignore"]


def test_a_change_in_the_groups_counts_from_the_next_step_on() -> None:
    model = network()
    optimizer = build(model.parameters(), "sam", "adamw")
    optimizer.step(Closure(model, optimizer, after=spoiled(model, 1, torch.nan)))
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer.param_groups[0]["nonfinite"] = "ignore"
    optimizer.param_groups[0]["phase"] = 0
    optimizer.step(Closure(model, optimizer, after=spoiled(model, 1, torch.nan)))
    assert not all(p.isfinite().all() for p in model.parameters())
    optimizer.param_groups[0]["nonfinite"] = "sometimes"
    with pytest.raises(ValueError, match="one of 'skip', 'ignore'"):
        optimizer.step(Closure(model, optimizer))


def test_a_wrapped_class_with_an_argument_of_that_name_keeps_its_own() -> None:
    class Own(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, nonfinite: float = 0.0) -> None:
            super().__init__(params, lr)
            for group in self.param_groups:
                group["nonfinite"] = nonfinite
            self.defaults["nonfinite"] = nonfinite

    p = nn.Parameter(torch.ones(2))
    optimizer = looksam.SAM([p], Own, lr=0.1, nonfinite="ignore", base_nonfinite=3.0)
    assert optimizer.param_groups[0]["nonfinite"] == "ignore"
    assert optimizer.base_optimizer.param_groups[0]["nonfinite"] == 3.0


def test_the_rules_of_the_perturbation_read_what_they_measure() -> None:
    """Nothing of theirs is there for the check alone, so that it costs nothing."""
    hyper = Hyper([{**HYPER, "sigma": 0.5, "layer_scaled": 1.0, "normalization": 1.0}], [0], torch.device("cpu"))
    for name, rule in ASCENTS.items():
        if name.startswith("extrapolate"):
            continue  # follows along_previous, whose sum it has
        for missing in rule.pairs:
            pairs = tuple(pair for pair in rule.pairs if pair != missing)
            values: Tensor = torch.ones(len(pairs), 1, dtype=torch.float64)
            with pytest.raises(ValueError, match="not in"):
                rule.formula(Sums(pairs, values), hyper)


CHECK_READS = {
    **dict.fromkeys(("sam", "asam", "layersam", "esam", "aesam", "wsam", "vasso", "friendlysam"), 1),
    **dict.fromkeys(("crsam", "sampa"), 2),
    **dict.fromkeys(("looksam", "looklayersam", "aelooksam", "ssam", "gsam", "msam", "s2sam"), 0),
}
"""How many columns a sharp step reads for the check alone: the table in docs/costs.md, in bytes there."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_check_reads_is_what_the_documentation_says(variant: str) -> None:
    plan = build(network().parameters(), variant).variant.sharp
    taken = []
    for check in (True, False):
        known: set[Any] = set()
        read: list[str] = []
        for rule in (*(x.ascent for x in plan.passes if x.ascent), plan.descent):
            new = {*ops.pairs_of(rule, check=check)} - known
            read += {x for pair in new for x in pair if kept_norm(pair) is None}
            known |= new
        taken.append(read)
    assert len(taken[0]) - len(taken[1]) == CHECK_READS[variant]
