"""Sentences 8 to 20: torch.optim.Optimizer."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

import looksam
from looksam_kernels import backend_info
from looksam_kernels.updates import BASES
from tests import bases
from tests.contract.support import (
    PERIODIC,
    REUSING,
    VARIANTS,
    Closure,
    assert_same,
    backward,
    build,
    network,
    on_backends,
    on_bases,
    on_host_free_pairs,
    on_pairs,
    on_sharp_variants_in_two_calls,
    on_variants,
    states,
    train,
    weights,
)


def loop(
    backend: str, steps: int = 3, variant: str = "looksam", base: str = "sgd", **kwargs: Any
) -> list[torch.Tensor]:
    model = network()
    train(model, build(model.parameters(), variant, base, backend=backend, **kwargs), steps)
    return weights(model)


@on_backends
def test_contract_08_hyper_parameters_are_read_at_each_step(backend: str) -> None:
    model = network()
    optimizer = build(model.parameters(), backend=backend, lr=123.0, rho=9.0, alpha=9.0)
    optimizer.param_groups[0].update(lr=0.1, rho=0.1, alpha=0.7)
    train(model, optimizer, 3)
    assert_same(loop(backend), weights(model))


@on_backends
@pytest.mark.parametrize(("name", "value"), [("rho", 0.5), ("alpha", 0.1), ("adaptive", True), ("lr", 0.01)])
def test_contract_08_per_group(backend: str, name: str, value: Any) -> None:
    """The group that differs moves otherwise, and by a joint norm the other one may too, but not before the first step."""
    variant = "sam" if name == "adaptive" else "looksam"
    results = []
    for own in ({}, {name: value}):
        model = network()
        groups = [{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()], **own}]
        train(model, build(groups, variant, backend=backend), 3)
        results.append(weights(model))
    assert not torch.equal(results[0][2], results[1][2])


@on_backends
@on_bases
def test_contract_09_add_param_group_fills_in_defaults(backend: str, base: str) -> None:
    if base == "wrapped adagrad":
        pytest.skip("torch's Adagrad creates its state in the constructor and has none for groups that come later")
    model = network()
    optimizer = build([model[0].weight], "looksam", base, backend=backend)
    train(model, optimizer, 3)
    optimizer.add_param_group({"params": [model[2].weight]})
    assert optimizer.param_groups[1].keys() == optimizer.param_groups[0].keys()
    assert optimizer.param_groups[1]["phase"] == 1
    before = weights(model)
    train(model, optimizer, 2)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
    assert moved == [True, False, True, False]


@pytest.mark.parametrize(
    ("params", "error"),
    [
        (torch.ones(2), TypeError),
        ([], ValueError),
        ([("name", nn.Parameter(torch.ones(1))), nn.Parameter(torch.ones(1))], (TypeError, ValueError)),
        ([{"params": [("name", nn.Parameter(torch.ones(1)))]}, {"params": [nn.Parameter(torch.ones(1))]}], ValueError),
    ],
    ids=["tensor", "empty", "mixed in a group", "mixed groups"],
)
def test_contract_10_constructor_errors_of_torch(params: Any, error: Any) -> None:
    with pytest.raises(error) as of_torch:
        torch.optim.SGD(copy.deepcopy(params), lr=0.1)
    with pytest.raises(error) as ours:
        looksam.SAM(params, "sgd", lr=0.1)
    assert ours.type is of_torch.type


def test_contract_18_complex_parameters_are_a_clear_error() -> None:
    with pytest.raises(TypeError, match="complex64"):
        looksam.SAM([torch.ones(2, dtype=torch.complex64, requires_grad=True)], "sgd", lr=0.1)


def test_contract_10_duplicates() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate"):
        looksam.SAM([p, p], "sgd", lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        looksam.SAM([{"params": [p]}, {"params": [p]}], "sgd", lr=0.1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rho": -0.1}, "rho.*-0.1"),
        ({"k": 0}, "k.*0"),
        ({"k": 1.5}, "k.*1.5"),
        ({"alpha": -1}, "alpha.*-1"),
        ({"base_optimizer": "sdg"}, "sdg"),
        ({"norm_scope": "layer"}, "norm_scope.*layer"),
        ({"lr": -1.0}, "-1.0"),
        ({"lr": torch.tensor([1.0, 2.0]), "base_optimizer": "adam"}, "1-element"),
        ({"max_grad_norm": 0.0}, "max_grad_norm.*0"),
        ({"differentiable": True}, "differentiable"),
    ],
)
@pytest.mark.parametrize("in_group", [False, True])
def test_contract_10_values_out_of_range(kwargs: dict[str, Any], message: str, in_group: bool) -> None:
    p = nn.Parameter(torch.ones(2))
    base = kwargs.get("base_optimizer", "sgd")
    own = {name: value for name, value in kwargs.items() if name != "base_optimizer"}
    if in_group and not own.keys() <= {"rho", "alpha", "k", "norm_scope"}:
        pytest.skip("torch does not look at these of a group either")
    params, kwargs = ([{"params": [p], **own}], {"lr": 0.1}) if in_group else ([p], {"lr": 0.1, **own})
    with pytest.raises(ValueError, match=message):
        looksam.LookSAM(params, base, **kwargs)


@pytest.mark.parametrize(
    ("variant", "given", "message"),
    [
        ("sam", {"rho": float("nan")}, "rho must be finite and at least 0, not nan"),
        ("asam", {"eta": -0.1}, "eta must be at least 0, not -0.1"),
        ("gsam", {"alpha": -0.1}, "alpha must be at least 0, not -0.1"),
        ("gsam", {"rho": 0.1, "rho_min": 0.2}, "rho_min must be at least 0 and at most rho, not 0.2"),
        ("gsam", {"lr_max": 0.1, "lr_min": 0.1}, "lr_max must be larger than lr_min, or None, not 0.1"),
        ("wsam", {"gamma": 1.0}, r"gamma must be in \[0, 1\), not 1.0"),
        ("wsam", {"gamma": -0.1}, r"gamma must be in \[0, 1\), not -0.1"),
        ("crsam", {"gamma": -1.0}, "gamma must be at least 0, not -1.0"),
        ("crsam", {"beta": -1.0}, "beta must be at least 0, not -1.0"),
        ("vasso", {"theta": 0.0}, r"theta must be in \(0, 1\], not 0.0"),
        ("vasso", {"theta": 1.1}, r"theta must be in \(0, 1\], not 1.1"),
        ("friendlysam", {"sigma": -1.0}, "sigma must be at least 0, not -1.0"),
        ("friendlysam", {"lambda_": 1.5}, r"lambda_ must be in \[0, 1\], not 1.5"),
        ("sampa", {"lambda_": -0.5}, r"lambda_ must be in \[0, 1\], not -0.5"),
    ],
)
@pytest.mark.parametrize("in_group", [False, True])
def test_contract_10_values_out_of_a_variants_range(
    variant: str, given: dict[str, Any], message: str, in_group: bool
) -> None:
    p = nn.Parameter(torch.ones(2))
    params, kwargs = ([{"params": [p], **given}], {}) if in_group else ([p], given)
    with pytest.raises(ValueError, match=f"^{message}$"):
        VARIANTS[variant](params, "sgd", lr=0.1, **kwargs)
    edges = {"theta": 1.0, "lambda_": 1.0, "gamma": 0.0, "rho_min": 0.05, "lr_max": 0.1}
    VARIANTS[variant]([p], "sgd", lr=0.1, **{name: x for name, x in edges.items() if name in given})


@on_variants
def test_contract_10_every_number_of_a_variant_has_a_range(variant: str) -> None:
    parameters = inspect.signature(VARIANTS[variant]).parameters.values()
    own = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} - {"params", "base_optimizer", "backend"}
    no_numbers = {"adaptive", "decouple", "layer_filter", "adaptive_filter", "process_group"}
    assert own - no_numbers <= VARIANTS[variant].ranges.keys()


SHARED = {
    "k": (looksam.LookSAM, 2, 3),
    "norm_scope": (looksam.LookSAM, "global", "tensor"),
    "layer_scale": (looksam.LayerSAM, "trust", "unit"),
    "decouple": (looksam.WSAM, True, False),
    "perturb_eps": (looksam.SAM, 1e-12, 1e-3),
    "max_grad_norm": (looksam.SAM, 1.0, None),
    "nonfinite": (looksam.SAM, "skip", "ignore"),
}


@pytest.mark.parametrize("name", SHARED)
def test_contract_10_values_that_groups_share(name: str) -> None:
    cls, *values = SHARED[name]
    groups = [{"params": [nn.Parameter(torch.ones(2))], name: x} for x in values]
    first, second = map(repr, values)
    with pytest.raises(ValueError, match=f"{name} must be the same in all groups: {first} and {second}"):
        cls(groups, "sgd", lr=0.1)


@pytest.mark.parametrize("base", [name for name, row in BASES.items() if row.options is not None])
def test_contract_09_lamb_clips_unless_told_otherwise_and_no_other_base_does(base: str) -> None:
    optimizer = looksam.SAM([nn.Parameter(torch.ones(2))], base)
    assert optimizer.param_groups[0]["max_grad_norm"] == (1.0 if base == "lamb" else None)


def test_contract_10_an_option_of_the_class_alone_in_one_group() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "amsgrad": x} for x in (False, True)]
    with pytest.raises(ValueError, match="amsgrad=True in one group only is not supported"):
        looksam.SAM(groups, "adam", lr=0.1)


@on_backends
def test_contract_10_a_refused_group_leaves_the_optimizer_as_it_was(backend: str) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = build([p], "sam", "sgd", backend=backend)
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert [group["params"] for group in optimizer.param_groups] == [[p]]
    p.grad = torch.ones(2)
    assert optimizer.first_step()


@on_backends
def test_contract_11_names_survive(backend: str) -> None:
    model = network()
    named = build(model.named_parameters(), backend=backend)
    unnamed = build(model.parameters(), backend=backend)
    names = [name for name, _ in model.named_parameters()]
    assert named.param_groups[0]["param_names"] == names
    train(model, named, 1)
    unnamed.load_state_dict(named.state_dict())
    assert unnamed.param_groups[0]["param_names"] == names
    fresh = build(model.parameters(), backend=backend)
    named.load_state_dict(fresh.state_dict())
    assert named.param_groups[0]["param_names"] == names
    train(model, named, 2)


@on_backends
@on_pairs
@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_contract_12_copies_keep_everything(backend: str, variant: str, base: str, copier: str) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, base, k=3, backend=backend)
    train(model, optimizer, 2)
    pair = {"model": model, "optimizer": optimizer}
    clone = copy.deepcopy(pair) if copier == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert clone["optimizer"].param_groups[0]["params"][0] is next(clone["model"].parameters())
    assert_same(states(optimizer), states(clone["optimizer"]))
    train(model, optimizer, 4)
    train(clone["model"], clone["optimizer"], 4)
    assert_same(weights(model), weights(clone["model"]))
    inner, group = clone["optimizer"].base_optimizer, clone["optimizer"].param_groups[0]
    inner.param_groups[0]["lr"] = 0.5
    assert group["lr"] == 0.5
    group["lr"] = 0.25
    assert inner.param_groups[0]["lr"] == 0.25


@on_backends
@on_pairs
def test_contract_13_resume_at_every_phase(backend: str, variant: str, base: str) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, base, k=3, backend=backend)
    for _ in range(4):
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        other = network(1)
        second = build(other.parameters(), variant, base, k=3, backend=backend)
        second.load_state_dict(saved["optimizer"])
        other.load_state_dict(saved["model"])
        train(other, second, 4)
        straight = copy.deepcopy({"model": model, "optimizer": optimizer})
        train(straight["model"], straight["optimizer"], 4)
        assert_same(weights(straight["model"]), weights(other))
        assert_same(states(straight["optimizer"]), states(second))
        train(model, optimizer, 1)


TORCHS = {
    f"{case}-{i}": (BASES[name].options, options)
    for name, base in bases.BASES.items()
    for case, hyper in base.hyper.items()
    for i, options in enumerate(hyper[:2])
    if isinstance(BASES[name].options, type) and case not in base.shared
}
"""torch's own classes, with the hyper-parameters of one group and of another."""


@on_backends
@pytest.mark.parametrize("name", TORCHS)
def test_contract_13_checkpoint_of_the_base_alone(backend: str, name: str) -> None:
    """Everything goes on as it was, the hyper-parameters whose names LookSAM has too included: with rho = 0 as the base."""
    cls, options = TORCHS[name]
    model = network()
    base = cls(model.parameters(), **options)
    train(model, base, 3)
    other = copy.deepcopy(model)
    optimizer = looksam.LookSAM(other.parameters(), cls, k=2, backend=backend, rho=0.0, alpha=0.3)
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    train(other, optimizer, 3)
    train(model, base, 3)
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
    group = optimizer.param_groups[0]
    assert (group["phase"], group["rho"], group["alpha"]) == (1, 0.0, 0.3)
    # torch's SGD counts nothing; the buffer that it brought counts as one step
    assert optimizer.state[other[0].weight]["step"] == (6 if cls is not torch.optim.SGD else 4)


@on_backends
@pytest.mark.parametrize("variant", REUSING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contract_14_float32_state_of_low_precision_parameters(backend: str, variant: str, dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    optimizer = build(model.parameters(), variant, "adamw", backend=backend)
    train(model, optimizer, 3)
    other = network(dtype=dtype)
    second = build(other.parameters(), variant, "adamw", backend=backend)
    second.load_state_dict(optimizer.state_dict())
    for a, b in zip(states(optimizer), states(second), strict=True):
        assert a.keys() == b.keys() >= {"master_param", "q", "exp_avg"}
        assert {x.dtype for name, x in b.items() if name != "q_norm_sq"} == {torch.float32}
        assert_same(a, b)


@on_backends
@on_pairs
def test_contract_15_only_parameters_are_keys_of_state(backend: str, variant: str, base: str) -> None:
    model = network()
    optimizer = build(model.parameters(), variant, base, backend=backend)
    train(model, optimizer, 3)
    assert set(optimizer.state) <= set(model.parameters())
    assert optimizer.state_dict().keys() == {"state", "param_groups"}
    assert optimizer.param_groups[0]["phase"] == (1 if variant in PERIODIC else 0)


@on_backends
@pytest.mark.parametrize("base", ["sgd", "wrapped rmsprop"])
@pytest.mark.parametrize("style", ["closure", "two calls"])
def test_contract_16_hooks_fire_once(backend: str, base: str, style: str) -> None:
    model = network()
    optimizer = build(model.parameters(), "looksam", base, backend=backend)
    calls: list[str] = []

    def hook(name: str) -> Any:
        return lambda *_: calls.append(name)

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    optimizer.register_step_pre_hook(hook("pre"))
    optimizer.register_step_post_hook(hook("post"))
    closure = Closure(model, optimizer)
    try:
        for _ in range(3):
            calls.clear()
            if style == "closure":
                optimizer.step(closure)
            else:
                closure()
                if optimizer.first_step(zero_grad=True):
                    closure()
                    optimizer.second_step()
            assert calls == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in handles:
            handle.remove()


@on_backends
@pytest.mark.parametrize("base", ["sgd", "wrapped rmsprop"])
def test_contract_16_state_dict_hooks_fire_once(backend: str, base: str) -> None:
    model = network()
    optimizer = build(model.parameters(), "looksam", base, backend=backend)
    train(model, optimizer, 2)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: calls.append("save post"))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save pre", "save post", "load pre", "load post"]


@on_backends
def test_contract_16_what_hooks_return_is_used(backend: str) -> None:
    model = network()
    optimizer = build(model.parameters(), backend=backend)
    train(model, optimizer, 1)

    def halve(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**g, "lr": g["lr"] / 2} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.05


@on_backends
@pytest.mark.parametrize("base", ["sgd", "wrapped rmsprop"])
def test_contract_16_one_profiler_range(backend: str, base: str) -> None:
    model = network()
    optimizer = build(model.parameters(), "looksam", base, backend=backend)
    closure = Closure(model, optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(closure)
        optimizer.step(closure)
    ranges = [event.name for event in profile.events() if event.name.startswith("Optimizer.step#")]
    assert ranges == ["Optimizer.step#LookSAM.step"] * 2


def test_contract_16_hooks_fire_once_around_a_step_of_a_subclass() -> None:
    """torch puts them around the subclass's ``step``, so that the one which it calls has none."""

    class Own(looksam.SAM):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    model = network()
    optimizer = Own(model.parameters(), "sgd", lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step(Closure(model, optimizer))
    assert calls == ["pre", "post"]


@pytest.mark.skipif(not backend_info("cpu")["native"].available, reason="without the extension torch's wrapper stays")
def test_contract_16_nothing_around_a_step_that_nobody_listens_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's range for the profiler costs as much as a step on small tensors."""
    entered: list[str] = []
    record = torch.autograd.profiler.record_function
    monkeypatch.setattr(torch.autograd.profiler, "record_function", lambda name: entered.append(name) or record(name))
    model = network()
    optimizer = build(model.parameters(), "looksam", "sgd")
    optimizer.step(Closure(model, optimizer))
    assert not any("step" in name for name in entered)
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.step(Closure(model, optimizer))
    assert [name for name in entered if "step" in name] == ["Optimizer.step#LookSAM.step"]


@on_backends
@pytest.mark.parametrize("base", ["sgd", "wrapped rmsprop"])
@pytest.mark.parametrize("style", ["closure", "two calls"])
@pytest.mark.parametrize("on_base", [False, True])
def test_contract_17_schedulers(backend: str, base: str, style: str, on_base: bool) -> None:
    model = network()
    optimizer = build(model.parameters(), "looksam", base, backend=backend, lr=1.0)
    target = optimizer.base_optimizer if on_base else optimizer
    closure = Closure(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [StepLR(target, 1, gamma=0.5), LambdaLR(target, lambda epoch: 0.5**epoch)]
        for step in range(3):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5**step)
            if style == "closure":
                optimizer.step(closure)
            else:
                closure()
                if optimizer.first_step(zero_grad=True):
                    closure()
                    optimizer.second_step()
            schedulers[0].step()
    plateau = ReduceLROnPlateau(target, patience=0, factor=0.1)
    for _ in range(4):
        plateau.step(optimizer.step(closure).detach() * 0 + 1)
    assert optimizer.param_groups[0]["lr"] < 0.1
    OneCycleLR(target, max_lr=0.1, total_steps=5, cycle_momentum=base == "sgd")


@on_backends
@on_pairs
def test_contract_18_awkward_gradients(backend: str, variant: str, base: str) -> None:
    names = ("plain", "none", "zero", "scalar", "empty", "first", "second")
    p = {name: nn.Parameter(torch.ones({"scalar": (), "empty": (0,)}.get(name, (3,)))) for name in names}
    optimizer = build(list(p.values()), variant, base, k=2, lr=0.01, backend=backend)
    calls = 0

    def closure(kept: None = None) -> torch.Tensor:
        nonlocal calls
        optimizer.zero_grad()
        here = [
            "plain",
            "scalar",
            "empty",
            *(["first"] if calls % 3 == 0 else []),
            *(["second"] if calls % 3 == 1 else []),
        ]
        calls += 1
        loss = sum(((p[name] * 1.5).square().sum() for name in here), start=torch.zeros(()))
        return backward(optimizer, loss + 0 * p["zero"].sum())

    for _ in range(5):
        optimizer.step(closure)
    assert torch.equal(p["none"].detach(), torch.ones(3))
    assert all(x.isfinite().all() for x in p.values())
    assert p["plain"].max() < 1
    assert p["scalar"] < 1


@on_backends
@on_sharp_variants_in_two_calls
def test_contract_18_abandon_restores_a_tensor_whose_gradient_is_gone(backend: str, variant: str) -> None:
    params = [nn.Parameter(torch.linspace(1, 2, 3)), nn.Parameter(torch.tensor(0.5))]
    optimizer = build(params, variant, "sgd", lr=0.01, backend=backend)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    assert optimizer.first_step()
    assert not torch.equal(before[0], params[0].detach())
    params[0].grad = None
    optimizer.abandon()
    assert_same(before, [p.detach() for p in params])


@on_backends
@pytest.mark.parametrize("pass_", [0, 1])
def test_contract_18_sparse_gradients_are_a_clear_error(backend: str, pass_: int) -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = build(embedding.parameters(), "sam", k=1, backend=backend)
    before, calls = weights(embedding), 0

    def closure() -> torch.Tensor:
        nonlocal calls
        optimizer.zero_grad()
        loss = embedding(torch.tensor([1, 2])).square().sum()
        loss.backward()
        if calls != pass_:
            embedding.weight.grad = embedding.weight.grad.to_dense()
        calls += 1
        return loss

    with pytest.raises(TypeError, match="sparse"):
        optimizer.step(closure)
    assert_same(before, weights(embedding))


@on_backends
@on_pairs
def test_contract_19_maximize(backend: str, variant: str, base: str) -> None:
    """Maximizing f is minimizing -f: the same weights, update and perturbation turned round."""
    results = []
    for maximize in (False, True):
        model = network()
        optimizer = build(model.parameters(), variant, base, maximize=maximize, backend=backend)
        closure = Closure(model, optimizer, scale=(lambda loss: -loss) if maximize else (lambda loss: loss))
        for _ in range(4):
            optimizer.step(closure)
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_contract_19_foreach_and_fused_change_nothing(flag: str) -> None:
    assert_same(loop("reference", base="adamw"), loop("reference", base="adamw", **{flag: True}))


def test_contract_19_flags_that_torch_refuses() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        looksam.SAM(model.parameters(), "adamw", foreach=True, fused=True)
    with pytest.raises(ValueError, match="differentiable"):
        looksam.SAM(model.parameters(), torch.optim.AdamW, differentiable=True)


@on_backends
@on_pairs
def test_contract_20_tensor_lr(backend: str, variant: str, base: str) -> None:
    if base == "wrapped adagrad":
        pytest.skip("torch's Adagrad takes a tensor lr only with foreach")
    number, tensor = (
        loop(backend, 4, variant, base, lr=lr(0.01)) for lr in (float, lambda x: torch.tensor(x, dtype=torch.float64))
    )
    for a, b in zip(number, tensor, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@on_backends
def test_contract_20_tensor_lr_follows_a_scheduler_and_a_checkpoint(backend: str) -> None:
    model = network()
    optimizer = build(model.parameters(), lr=torch.tensor(0.1), backend=backend)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2)


class NoHostReads(TorchDispatchMode):
    """What a GPU would be waited for: ``.item()``, ``float(x)``, ``if x``."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read by the host"
        return function(*args, **(kwargs or {}))


@on_host_free_pairs
def test_contract_20_no_value_is_read_by_the_host(variant: str, base: str) -> None:
    """The steps that the tests on a GPU run without synchronisation and capture in graphs, where every operation is torch's."""
    model = network()
    optimizer = build(model.parameters(), variant, base, backend="reference")
    train(model, optimizer, 2)
    x, y = torch.randn(8, 5), torch.randn(8, 3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with NoHostReads():
        for _ in range(4):
            optimizer.step(closure)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@on_host_free_pairs
def test_contract_20_no_host_sync(variant: str, base: str) -> None:
    model = network().cuda()
    optimizer = (
        build(model.parameters(), variant, base, capturable=True)
        if base == "adamw"
        else build(model.parameters(), variant, base)
    )
    x, y = torch.randn(8, 5, device="cuda"), torch.randn(8, 3, device="cuda")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(state["step"].is_cuda for state in optimizer.state.values())
