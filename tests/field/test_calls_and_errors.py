"""Calls that would learn nothing, arguments that mean nothing: each says so, in words that name the remedy."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import looksam
from tests.contract.support import (
    SHARP,
    VARIANTS,
    Closure,
    WrappedRMSprop,
    assert_same,
    build,
    data,
    network,
    on_backends,
    states,
    train,
    weights,
)

BASES = pytest.mark.parametrize("base", ["sgd", "wrapped rmsprop"])


def gradients(model: nn.Module) -> Tensor:
    x, y = data()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


# A pass without a gradient ------------------------------------------------------------------------------------------


@on_backends
@BASES
@pytest.mark.parametrize("variant", sorted(set(SHARP) - {"esam"}))
def test_field_06_a_closure_that_makes_no_gradients_is_an_error(backend: str, base: str, variant: str) -> None:
    """As ``loss.backward(); opt.step(lambda: loss)``. (ESAM calls backward itself.)"""
    model = network()
    optimizer = build(model.parameters(), variant, base, backend=backend)
    train(model, optimizer, 2)
    before, state = weights(model), states(optimizer)
    optimizer.zero_grad()
    loss = gradients(model)
    with pytest.raises(RuntimeError, match=r"made no gradient.*closure must zero.*backward"):
        optimizer.step(lambda: loss)
    assert_same(before, weights(model))
    assert_same(state, states(optimizer))
    train(model, optimizer, 2)


@on_backends
def test_field_06_second_step_without_a_second_backward_is_an_error(backend: str) -> None:
    model = network()
    optimizer = build(model.parameters(), backend=backend)
    before = weights(model)
    gradients(model)
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"between first_step\(\) and second_step\(\)"):
        optimizer.second_step()
    assert_same(before, weights(model))


@on_backends
def test_field_06_some_parameters_may_lack_it(backend: str) -> None:
    model = network()
    optimizer = build(model.parameters(), backend=backend)

    def after(call: int) -> None:
        if call == 1:
            model[0].weight.grad = None

    before = weights(model)
    optimizer.step(Closure(model, optimizer, after=after))
    assert torch.equal(before[0], model[0].weight)
    assert not torch.equal(before[2], model[2].weight)


# step, replaced by others -------------------------------------------------------------------------------------------


@on_backends
@BASES
def test_field_06_two_calls_do_not_go_through_the_public_step(backend: str, base: str) -> None:
    """Someone has put a function in its place that runs a closure of theirs."""
    model, plain = network(), network()
    optimizer, other = (
        build(model.parameters(), base=base, backend=backend),
        build(plain.parameters(), base=base, backend=backend),
    )
    optimizer.step = lambda *_: pytest.fail("the trainer's step was called")  # type: ignore[method-assign]
    for _ in range(4):
        for net, opt in ((model, optimizer), (plain, other)):
            gradients(net)
            if opt.first_step(zero_grad=True):
                gradients(net)
                opt.second_step(zero_grad=True)
    assert_same(weights(plain), weights(model))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("k", [1, 2])
def test_field_06_schedulers_and_hooks_see_each_step_of_two_calls_once(k: int) -> None:
    model = network()
    optimizer = build(model.parameters(), "sam", k=k)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    for step in range(4):
        gradients(model)
        if optimizer.first_step(zero_grad=True):
            assert len(seen) == 2 * step
            gradients(model)
            optimizer.second_step(zero_grad=True)
        scheduler.step()
        assert seen == ["pre", "post"] * (step + 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("style", ["two calls", "closure", "empty"])
def test_field_06_lightnings_manual_optimization(tmp_path: Path, style: str) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    x, y = data()
    batches = DataLoader(TensorDataset(x, y), batch_size=4)

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = network(), False

        def training_step(self, batch: Any, _: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(self.net(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            if style == "closure":
                optimizer.step(closure)
                return
            closure()
            if style == "empty":
                optimizer.step()
            elif optimizer.first_step(zero_grad=True):
                closure()
                optimizer.second_step()

        def configure_optimizers(self) -> Any:
            return build(self.parameters())

    module = Module()
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    if style == "empty":
        with pytest.raises(RuntimeError, match="made no gradient"):
            trainer.fit(module, batches)
        return
    trainer.fit(module, batches)
    assert trainer.global_step == 3
    alone = network()
    optimizer = build(alone.parameters())
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):

        def closure(rows: slice = rows) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(alone(x[rows]), y[rows])
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same(weights(alone), weights(module.net))


# Arguments ----------------------------------------------------------------------------------------------------------


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


NUMBERS = {
    name: [
        x for x, allowed in cls.ranges.items() if x in looksam.messages.arguments(cls) and allowed.kind == "a number"
    ]
    for name, cls in VARIANTS.items()
}


@pytest.mark.parametrize(("variant", "name"), [(v, name) for v, names in NUMBERS.items() for name in names])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), np.float32("inf"), True, "1", [0.1], torch.ones(2)])
def test_field_09_what_is_no_finite_number_is_refused(variant: str, name: str, value: Any) -> None:
    required = {"total_steps": 5} if "total_steps" in NUMBERS[variant] else {}
    cls = VARIANTS[variant]
    good = cls([parameter()], "sgd", lr=0.1, momentum=0.9, **required)
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        cls([parameter()], "sgd", lr=0.1, momentum=0.9, **{**required, name: value})
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        good.add_param_group({"params": [parameter()], name: value})
    assert len(good.param_groups) == 1
    good.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        good.step(lambda: pytest.fail("a wrong value is found before the closure is called"))


OF_BASES = [
    (base, name)
    for base in ("sgd", "adamw", "lamb", "lars", "lion", "rmsprop", "adadelta", "adagrad")
    for name in ("lr", "weight_decay", "eps", "betas", "momentum", "max_grad_norm")
    if name in looksam.SAM([parameter()], base, lr=0.1).param_groups[0]
]


@pytest.mark.parametrize(("base", "name"), OF_BASES)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), "1", True])
def test_field_09_numbers_of_the_base(base: str, name: str, value: Any) -> None:
    optimizer = looksam.SAM([parameter()], base, lr=0.1)
    value = (value, 0.9) if name == "betas" else value
    with pytest.raises((TypeError, ValueError), match=name):
        looksam.SAM([parameter()], base, **{"lr": 0.1, name: value})
    optimizer.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        optimizer.step(lambda: pytest.fail("called"))


@pytest.mark.parametrize(
    ("base", "name", "value"),
    [
        ("sgd", "nesterov", "yes"),
        ("sgd", "maximize", 1),
        ("rmsprop", "centered", None),
        ("lamb", "trust_clip", 0),
        ("sgd", "lr", (0.1,)),
        ("sgd", "momentum", [0.9]),
        ("adamw", "betas", 0.9),
        ("adamw", "betas", (0.9,)),
        ("adan", "betas", (0.9, 0.9)),
    ],
)
def test_field_09_flags_and_tuples_of_the_base(base: str, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"SAM: {name} must be a "):
        looksam.SAM([parameter()], base, **{"lr": 0.1, name: value})
    optimizer = looksam.SAM([parameter()], base, lr=0.1)
    with pytest.raises(TypeError, match=f"SAM: {name} must be a "):
        optimizer.add_param_group({"params": [parameter()], name: value})
    optimizer.param_groups[0][name] = value
    with pytest.raises(TypeError, match=f"SAM: {name} must be a "):
        optimizer.step(lambda: pytest.fail("called"))


@pytest.mark.parametrize("make", [np.int64, np.array])
def test_field_09_numbers_of_numpy_are_numbers(make: Any) -> None:
    """And are Python's in the groups: a checkpoint read with ``weights_only`` can hold no others."""
    given = {
        "k": make(3),
        "rho": np.float32(0.25),
        "alpha": np.array(0.5),
        "lr": np.float64(0.125),
        "momentum": np.float16(0.5),
    }
    optimizer = looksam.LookSAM([parameter()], "sgd", **given)
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in given} == {"k": 3, "rho": 0.25, "alpha": 0.5, "lr": 0.125, "momentum": 0.5}
    group["rho"] = np.float32(0.5)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.first_step()
    optimizer.second_step()
    assert {type(group[name]) for name in given} == {int, float}


def test_field_09_a_changed_value_is_checked_against_the_others() -> None:
    optimizer = looksam.LookSAM([{"params": [parameter()]}, {"params": [parameter()]}], "sgd", lr=0.1)
    optimizer.param_groups[1]["k"] = 3
    for _ in range(2):  # it stays an error
        with pytest.raises(ValueError, match="k must be the same in all groups: 5 and 3"):
            optimizer.step(lambda: 0)
    optimizer.param_groups[1]["k"] = 5
    optimizer.step(lambda: 0)
    gsam = looksam.GSAM([parameter()], "sgd", lr=0.1, rho=0.1, rho_min=0.05)
    gsam.param_groups[0]["rho"] = 0.01
    with pytest.raises(ValueError, match=r"rho_min must be at least 0 and at most rho, not 0\.05"):
        gsam.step(lambda: 0)


MISTAKES: list[tuple[str, Any, type[Exception], str]] = [
    (
        "SAM",
        lambda p: looksam.SAM([p], "sgd", lr=0.1, roh=0.1),
        TypeError,
        "SAM over sgd has no argument 'roh'.*'rho'.*adaptive",
    ),
    (
        "alhpa",
        lambda p: looksam.LookSAM([p], "adamw", alhpa=0.1),
        TypeError,
        "LookSAM over adamw has no.*'alhpa'.*'alpha'",
    ),
    ("weight", lambda p: looksam.SAM([p], "adamw", weigth_decay=0.1), TypeError, "'weigth_decay'.*'weight_decay'"),
    ("model", lambda p: looksam.SAM([p], "sgd", lr=0.1, modell=None), TypeError, "'modell'.*'model'"),
    (
        "adaptive",
        lambda p: looksam.CRSAM([p], "sgd", lr=0.1, adaptive=True),
        TypeError,
        "CRSAM over sgd has no.*'adaptive'.*gamma",
    ),
    (
        "wrapped",
        lambda p: looksam.SAM([p], WrappedRMSprop, apha=0.9),
        TypeError,
        "SAM over WrappedRMSprop.*'apha'.*'alpha'",
    ),
    (
        "string",
        lambda p: looksam.SAM([p], "sgd", lr=0.1, rho="0.05"),
        TypeError,
        r"SAM: rho must be a number.*'0.05' \(str\)",
    ),
    ("bool", lambda p: looksam.SAM([p], "sgd", lr=0.1, rho=True), TypeError, "SAM: rho must be a number.*not True"),
    ("float", lambda p: looksam.SAM([p], "sgd", lr=0.1, k=2.0), ValueError, "k must be a whole number.*2.0"),
    (
        "flag",
        lambda p: looksam.SAM([p], "sgd", lr=0.1, adaptive="no"),
        TypeError,
        "SAM: adaptive must be.*True or False.*'no'",
    ),
    (
        "decouple",
        lambda p: looksam.WSAM([p], "sgd", lr=0.1, decouple=1),
        TypeError,
        "WSAM: decouple must be.*True or False.*1",
    ),
    (
        "near",
        lambda p: looksam.LookSAM([p], "sgd", norm_scope="globl"),
        ValueError,
        "norm_scope must be one of.*'global'",
    ),
    (
        "model=str",
        lambda p: looksam.SAM([p], "sgd", model="x"),
        TypeError,
        r"model must be a torch.nn.Module.*'x' \(str\)",
    ),
    ("same_rng", lambda p: looksam.SAM([p], "sgd", same_rng=1), TypeError, "same_rng must be True or False, not 1"),
    (
        "LAMB",
        lambda p: looksam.LAMB([p], weigth_decay=0.1),
        TypeError,
        "LAMB has no argument 'weigth_decay'; did you mean 'weight_decay'.*lr, betas",
    ),
    ("LARS", lambda p: looksam.LARS([p], momentun=0.1), TypeError, "LARS has no.*'momentun'.*'momentum'"),
    ("Lion", lambda p: looksam.Lion([p], eps=1e-8), TypeError, r"Lion has no argument 'eps'\. It takes lr, betas"),
    ("base", lambda p: looksam.SAM([p], "SGD"), ValueError, "'SGD'.*did you mean 'sgd'"),
    (
        "instance",
        lambda p: looksam.SAM([p], torch.optim.SGD([p])),
        TypeError,
        "base_optimizer.*not an instance of SGD; give the class",
    ),
    ("backend", lambda p: looksam.SAM([p], "sgd", backend="cuda"), ValueError, "unknown backend 'cuda'.*'native'"),
    (
        "module",
        lambda p: looksam.SAM(nn.Linear(2, 2), "sgd"),
        TypeError,
        r"an instance of Linear: give model.parameters\(\)",
    ),
    ("lr", lambda p: looksam.SAM([p], "sgd", lr="0.1"), TypeError, r"SAM: lr must be a number.*'0.1' \(str\)"),
    (
        "group",
        lambda p: looksam.SAM([{"params": [p], "roh": 0.1}], "sgd"),
        TypeError,
        "SAM: a parameter group has no 'roh'.*'rho'",
    ),
    ("short key", lambda p: looksam.SAM([{"params": [p], "rh": 0.1}], "sgd"), TypeError, "'rh'.*'rho'"),
    ("none", lambda p: looksam.SAM(None, "sgd"), TypeError, r"params: \'NoneType\' object is not iterable; give model"),
    ("names", lambda p: looksam.SAM({"w": p}, "sgd"), TypeError, r"not a dict: give its \.values\(\)"),
    ("one group", lambda p: looksam.SAM({"params": [p]}, "sgd"), TypeError, r"not a dict: give \[group\]"),
    ("no params", lambda p: looksam.SAM([{"rho": 0.1}], "sgd"), ValueError, "parameter group 0 has no 'params'"),
    (
        "filter",
        lambda p: looksam.SAM([p], "sgd", adaptive=True, adaptive_filter="bias"),
        TypeError,
        r"adaptive_filter must be a function.*'bias' \(str\)",
    ),
    ("load None", lambda p: looksam.SAM([p], "sgd").load_state_dict(None), TypeError, r"state_dict\(\).*None"),
    ("load {}", lambda p: looksam.SAM([p], "sgd").load_state_dict({}), ValueError, "no 'param_groups', but nothing"),
    (
        "load a model",
        lambda p: looksam.SAM([p], "sgd").load_state_dict({"0.weight": p}),
        ValueError,
        "no 'param_groups', but only the keys '0.weight'",
    ),
    (
        "loss",
        lambda p: looksam.SAM([p], "sgd").step(torch.ones(())),
        TypeError,
        "step takes a function.*not a tensor.*closure",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_field_09_errors_name_class_argument_value_and_remedy(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make(nn.Parameter(torch.ones(2000)))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert len(str(caught.value)) < 500


def test_field_09_keys_of_others_in_a_group_are_theirs() -> None:
    """Those of timm, of schedulers, of the users' own loops, also where they come later."""
    foreign = {
        "name": "head",
        "initial_lr": 0.1,
        "lr_scale": 0.5,
        "layer_id": 3,
        "max_lr": 1,
        "tag": object(),
        "x": 1,
        "lr0": 2,
    }
    model = network()
    for groups in ([{"params": model.parameters(), **foreign}], model.parameters()):
        optimizer = looksam.LookLayerSAM(groups, "sgd", lr=0.1)
        optimizer.param_groups[0].update(foreign)
        train(model, optimizer, 2)
        assert foreign.items() <= optimizer.param_groups[0].items()


def test_field_09_a_slip_in_a_group_that_comes_later_is_found_at_the_step() -> None:
    model = network()
    optimizer = looksam.SAM(model.parameters(), "sgd", lr=0.1)
    train(model, optimizer, 1)
    before = weights(model)
    optimizer.param_groups[0]["roh"] = 0.1
    with pytest.raises(TypeError, match=r"SAM: a parameter group has no 'roh'; did you mean 'rho'\?"):
        train(model, optimizer, 1)
    assert_same(before, weights(model))
    del optimizer.param_groups[0]["roh"]
    train(model, optimizer, 1)


def of_any_width(model: nn.Linear, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """A closure that follows the width that the layer has now."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(1, model.weight.shape[1])).square().sum()
        loss.backward()
        return loss

    return closure


@on_backends
@pytest.mark.parametrize("base", ["adamw", "wrapped rmsprop"])
def test_field_09_a_resized_parameter_is_named_where_its_state_does_not_fit(backend: str, base: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = build(model.parameters(), "looksam", base, backend=backend)
    closure = of_any_width(model, optimizer)
    optimizer.step(closure)
    model.weight.data = torch.ones(2, 5)
    with pytest.raises(ValueError, match=r"parameter 0 has the shape \(2, 5\), but its state '\w+' the shape \(2, 3\)"):
        optimizer.step(closure)
    optimizer.state.pop(model.weight)
    optimizer.step(closure)
    optimizer.step(closure)


@on_backends
def test_field_09_a_parameter_without_state_may_be_resized(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = looksam.SAM(model.parameters(), "sgd", lr=0.1, backend=backend)
    for size in (3, 5):
        model.weight.data = torch.ones(2, size)
        for _ in range(2):
            optimizer.step(of_any_width(model, optimizer))


def test_field_09_an_unknown_option_of_a_class_that_takes_any_is_its_own() -> None:
    class Open(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
            super().__init__(params, lr)
            self.defaults.update(options)

    assert looksam.SAM([parameter()], Open, whatever=3).param_groups[0]["whatever"] == 3


# Types and help -----------------------------------------------------------------------------------------------------


def test_field_16_16_names_for_type_checkers_are_those_that_run() -> None:
    from typing import get_args

    from looksam import bases, types
    from looksam.hyper import RANGES
    from looksam_kernels import backends

    assert set(get_args(types.BaseName)) == set(bases.FUSED)
    for name, literal in (("norm_scope", types.NormScope), ("layer_scale", types.LayerScale)):
        assert RANGES[name].text == f"one of {', '.join(map(repr, get_args(literal)))}"
    assert get_args(types.BackendName) == backends.ORDER


def test_field_16_16_help_shows_an_example_that_runs() -> None:
    text = inspect.getdoc(looksam.LookSAM) or ""
    example = textwrap.dedent(text.split("Example::\n")[1])
    model = network()
    names = {"LookSAM": looksam.LookSAM, "model": model, "F": F, "loader": [data()] * 2}
    before = weights(model)
    exec(example, names)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert names["optimizer"].param_groups[0]["phase"] == 2
    for argument in ("lr", "weight_decay", "max_grad_norm", "model"):
        assert f"``{argument}``" in text
