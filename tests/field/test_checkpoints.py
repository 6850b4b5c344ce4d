"""What is saved comes back as it was, and a checkpoint of something else is told apart."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import looksam
from tests.contract.support import PAIRS, PERIODIC, VARIANTS, build, network, train, works

PLAIN = {"lamb": looksam.LAMB, "lars": looksam.LARS, "lion": looksam.Lion}


def written_and_read(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Keys, their number, types and bits."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b) or a.keys() == b.keys(), f"{where}: {a.keys() ^ b.keys()}"
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def makers() -> dict[str, Any]:
    pairs = {f"{v} over {b}": (lambda params, v=v, b=b: build(params, v, b)) for v, b in PAIRS}
    return pairs | {name: (lambda params, cls=cls: cls(params, lr=0.01)) for name, cls in PLAIN.items()}


@pytest.mark.parametrize("name", makers())
def test_field_15_state_dict_after_loading_is_what_was_saved(name: str) -> None:
    model, other = network(), network(1)
    make = makers()[name]
    optimizer = make(
        [{"params": model[0].parameters(), "tag": "body"}, {"params": model[2].parameters(), "lr_scale": 0.5}]
    )
    train(model, optimizer, 3)
    optimizer.param_groups[1]["initial_lr"] = 0.5
    saved = copy.deepcopy(optimizer.state_dict())
    second = make([{"params": other[0].parameters()}, {"params": other[2].parameters()}])
    for _ in range(2):  # and again
        second.load_state_dict(written_and_read(saved))
        assert_equal(saved, second.state_dict())
    clone = copy.deepcopy(second)
    assert_equal(saved, clone.state_dict())
    clone.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert clone.param_groups[-1].keys() - {"tag"} == saved["param_groups"][0].keys() - {"tag"}


@pytest.mark.parametrize("name", PLAIN)
def test_field_15_timms_tests_of_a_state_dict(name: str) -> None:
    """The steps of timm's ``_test_state_dict``: a second optimizer, built on a copy of the weights, with the state of the
    first goes the same way, and keeps it with more groups of other learning rates."""
    weight, bias = (nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10)))
    x = torch.randn(5)
    make = PLAIN[name]
    optimizer = make([weight, bias], lr=1e-3)

    def step(w: nn.Parameter, b: nn.Parameter, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        (w @ x + b).square().sum().backward()
        opt.step()

    for _ in range(20):
        step(weight, bias, optimizer)
    w, b = copy.deepcopy(weight), copy.deepcopy(bias)
    second = make([w, b], lr=1e-3)
    before = copy.deepcopy(optimizer.state_dict())
    second.load_state_dict(before)
    assert optimizer.state_dict()["param_groups"] == second.state_dict()["param_groups"]
    for _ in range(20):
        step(weight, bias, optimizer)
        step(w, b, second)
        assert torch.equal(weight, w)
        assert torch.equal(bias, b)
    assert_equal(optimizer.state_dict(), second.state_dict())
    for group in before["param_groups"]:
        del group["maximize"]  # of a version before the option
    second.load_state_dict(before)
    assert second.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


OTHERS = [
    ("looksam", "sam"),
    ("sam", "looksam"),
    ("gsam", "sam"),
    ("sam", "gsam"),
    ("vasso", "looksam"),
    ("looksam", "vasso"),
    ("aesam", "sam"),
]


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop", "wrapped rmsprop"])
@pytest.mark.parametrize(
    ("saves", "loads"),
    [
        ("looksam", "sam"),
        ("sam", "looksam"),
        ("gsam", "sam"),
        ("vasso", "looksam"),
        ("looksam", "vasso"),
        ("sam", "gsam"),
        ("aesam", "sam"),
    ],
)
def test_field_09_a_checkpoint_of_another_variant_gives_the_base(saves: str, loads: str, base: str) -> None:
    """Its hyper-parameters and state are the base's; LookSAM's k does not make SAM-5 of SAM."""
    model, other = network(), network()
    optimizer = build(model.parameters(), saves, base, **({"k": 5} if saves in PERIODIC else {}))
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 0.007
    second = build(other.parameters(), loads, base)
    own = {name: second.param_groups[0][name] for name in second.param_groups[0].keys() - {"params"}}
    with pytest.warns(UserWarning, match="another variant"):
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    group = second.param_groups[0]
    assert group["lr"] == 0.007
    assert (group["rho"], group["phase"]) == (own["rho"], 0)
    assert group.keys() == {*own, "params"}
    for name in ("k", "alpha", "theta"):
        if name in inspect.signature(VARIANTS[loads]).parameters:
            assert group[name] == own[name]
    if "rmsprop" in base:
        assert group["base.alpha" if loads in ("looksam", "gsam") else "alpha"] == 0.99
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        mine, theirs = second.state[q], optimizer.state[p]
        assert not mine.keys() & {"q", "q_norm_sq", "m", "y"}
        for name in ("exp_avg", "exp_avg_sq", "square_avg", "momentum_buffer", "step"):
            if name in theirs:
                assert torch.equal(mine[name], theirs[name])
    train(other, second, 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_field_09_a_checkpoint_of_the_same_variant_is_no_other(variant: str) -> None:
    model = network()
    base = "rmsprop" if works(variant, "rmsprop") else "adamw"
    optimizer = build(model.parameters(), variant, base)
    train(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(model.parameters(), variant, base).load_state_dict(optimizer.state_dict())


OLDER = [
    (name, (*lacks, "precondition"))
    for names, lacks in (
        (
            ("looksam", "ssam", "gsam", "wsam", "friendlysam"),
            ("adaptive", "eta", "adaptive_filter", "normalization", "strength"),
        ),
        (("ssam", "gsam", "wsam"), ("adaptive_filter",)),
        (("sam", "asam", "looksam"), ("adaptive_filter", "normalization", "strength")),
        (("sam", "looksam"), ("normalization", "strength")),
        (("sam", "looksam", "ssam", "gsam", "wsam", "friendlysam"), ()),
    )
    for name in names
]
"""Variants, and what their checkpoints once lacked."""
ALIKE = {"sam", "asam", "ssam"}
"""Their groups have the same names, since SSAM can be adaptive."""


@pytest.mark.parametrize(("variant", "lacks"), OLDER)
def test_field_09_a_checkpoint_of_before_the_variant_had_an_option(variant: str, lacks: tuple[str, ...]) -> None:
    """It continues exactly where it was, and no other variant takes it for its own."""
    model, other = network(), network()
    options = {"lr": 0.1, "momentum": 0.9, **({"k": 3} if variant in PERIODIC else {})}
    optimizer = VARIANTS[variant](model.parameters(), "sgd", **options)
    train(model, optimizer, 4)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for name in lacks:
            group.pop(name, None)
    other.load_state_dict(model.state_dict())
    second = VARIANTS[variant](other.parameters(), "sgd", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(copy.deepcopy(saved))
    train(model, optimizer, 3)
    train(other, second, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    alike = ALIKE if variant in ALIKE and "eta" not in lacks else {variant}
    for name in dict.fromkeys(name for name, _ in OLDER):
        if name not in alike:
            third = VARIANTS[name](network().parameters(), "sgd", lr=0.1, momentum=0.9)
            with pytest.warns(UserWarning, match="another variant"):
                third.load_state_dict(copy.deepcopy(saved))


class WritesGamma(torch.optim.SGD):
    """Keeps a number in its groups, from its first step on, under a name that GSAM's and WSAM's groups have."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["gamma"] = group.get("gamma", 0.0) + 1.0


@pytest.mark.parametrize("variant", ["sam", "ssam", "looksam", "looklayersam"])
def test_field_09_a_name_that_the_wrapped_class_adds_makes_no_other_variant(variant: str) -> None:
    model = network()
    optimizer = VARIANTS[variant](model.parameters(), WritesGamma, lr=0.1, k=3)
    train(model, optimizer, 4)
    second = VARIANTS[variant](network().parameters(), WritesGamma, lr=0.1, k=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(optimizer.state_dict())
    assert (second.param_groups[0]["phase"], second.param_groups[0]["gamma"]) == (1, 4.0)


def test_field_09_a_checkpoint_of_another_variant_is_told_also_by_more_names_than_its_own() -> None:
    model = network()
    optimizer = looksam.LookSAM(model.parameters(), WritesGamma, lr=0.1, k=3)
    train(model, optimizer, 1)
    second = looksam.SAM(network().parameters(), WritesGamma, lr=0.1, k=3)
    with pytest.warns(UserWarning, match="another variant"):
        second.load_state_dict(optimizer.state_dict())
    assert second.param_groups[0]["phase"] == 0
