from contextlib import nullcontext

import pytest
import torch

import looksam
from looksam.lab.config import TrainConfig
from looksam.lab.methods import (
    BASES,
    VARIANTS,
    Method,
    build_optimizer,
    canonical_name,
    check_options,
    parse_method,
    select_options,
)
from tests.contract.support import backward


def model():
    one = torch.nn.Module()
    one.w = torch.nn.Parameter(torch.ones(3))
    return one


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("sgd", Method(None, "sgd")),
        ("LAMB", Method(None, "lamb")),
        ("sam", Method("sam", "sgd")),
        ("sam-5", Method("sam", "sgd", 5)),
        ("LookSAM-10", Method("looksam", "sgd", 10)),
        ("layersam+adamw", Method("layersam", "adamw")),
        ("looklayersam-5+lamb", Method("looklayersam", "lamb", 5)),
        ("GSAM-2+adamw", Method("gsam", "adamw", 2)),
        ("friendlysam+lamb", Method("friendlysam", "lamb")),
        ("SAM:rho=.5", Method("sam", "sgd", settings=(("rho", 0.5),))),
        (
            "sgd:weight_decay=8e-2,nesterov=True",
            Method(None, "sgd", None, (("nesterov", True), ("weight_decay", 0.08))),
        ),
        (
            "looksam+adam:betas=[0.9,0.98],alpha=1",
            Method("looksam", "adam", None, (("alpha", 1), ("betas", (0.9, 0.98)))),
        ),
    ],
)
def test_grammar(text, method):
    assert parse_method(text) == method


def test_default_base_applies_to_variants_only():
    assert parse_method("sam", "adamw").base == "adamw"
    assert parse_method("sam+sgd", "adamw").base == "sgd"
    assert parse_method("sgd", "adamw").base == "sgd"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loksam-5", "unknown name 'loksam'; variants are .*looksam.*base optimizers are .*sgd"),
        (
            "sam+momentum",
            f"unknown base 'momentum'; bases are {', '.join(sorted(BASES))}",
        ),
        ("sgd-5", "takes neither -K nor \\+BASE"),
        ("sgd+adam", "takes neither -K nor \\+BASE"),
        ("sam-0", "K must be at least 1"),
        ("vasso-2", "vasso has no period K"),
        ("sam-", "not of the form"),
        ("", "not of the form"),
        ("sam-5-5", "not of the form"),
        ("sam:roh=1", "sam takes no option 'roh'; it takes .*rho"),
        ("sam-5:k=2", "sam takes no option 'k'"),
        ("sgd:alpha=1", "sgd takes no option 'alpha'; it takes .*nesterov"),
        ("sam:rho", "'rho' is not of the form OPTION=VALUE"),
        ("sgd:", "'' is not of the form OPTION=VALUE"),
        ("sam:rho=1,rho=2", "rho is given twice"),
        ("sam:rho=NaN", "NaN is not a finite number"),
        ("sam:rho=1e400", "1e400 is not a finite number"),
        ("sam:rho=inf", "inf is not a finite number"),
    ],
)
def test_errors_say_what_is_valid(text, message):
    with pytest.raises(ValueError, match=message):
        parse_method(text)


@pytest.mark.parametrize(
    "text", ["sgd", "sam", "looksam-5", "looklayersam-3+lamb", "sam+adam", "sam-5+adam:betas=[0.9,0.98],rho=0.1"]
)
def test_canonical_name_is_stable_and_parses_back(text):
    assert canonical_name(text) == text
    head, colon, settings = text.partition(":")
    assert canonical_name(head.upper() + colon + settings) == text


def test_canonical_name_states_the_default_base_unless_sgd():
    assert canonical_name("looksam-5", "lamb") == "looksam-5+lamb"
    assert canonical_name("looksam-5+sgd", "lamb") == "looksam-5"


def test_every_variant_of_the_library_is_a_method():
    assert set(looksam.VARIANTS) <= set(VARIANTS)


@pytest.mark.parametrize("base", sorted(BASES))
@pytest.mark.parametrize("period", ["", "-3"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_builds_and_steps_on_every_base(variant, period, base):
    name = f"{variant}{period}+{base}"
    works_over = getattr(VARIANTS[variant], "bases", None)
    if works_over and base not in works_over:
        with pytest.raises(ValueError, match=f"{variant} works over sgd, .*, not over {base}"):
            parse_method(name)
        return
    if period and "k" not in Method(variant, base).parameters():
        with pytest.raises(ValueError, match=f"{variant} has no period K"):
            parse_method(name)
        return
    assert parse_method(name) == Method(variant, base, 3 if period else None)
    trained = model()
    optimizer = build_optimizer(TrainConfig(name, lr=0.1, weight_decay=0.0, clip=1.0), trained, 10)
    assert type(optimizer) is VARIANTS[variant]
    assert optimizer.param_groups[0].get("k") == (3 if period else optimizer.defaults.get("k"))

    def closure(kept=None, previous=False):
        optimizer.zero_grad()
        return backward(optimizer, (trained.w**2).sum())

    assert float(optimizer.step(closure).detach()) == 3.0
    with getattr(optimizer, "plain_weights", nullcontext)():
        assert (trained.w < 1).all()


def test_values_reach_the_optimizer():
    config = TrainConfig(
        "looksam-7", lr=0.3, momentum=0.8, weight_decay=0.01, clip=2.0, options=(("alpha", 0.2), ("rho", 0.1))
    )
    group = build_optimizer(config, model(), 10).param_groups[0]
    expected = {
        "k": 7,
        "lr": 0.3,
        "momentum": 0.8,
        "weight_decay": 0.01,
        "alpha": 0.2,
        "rho": 0.1,
        "max_grad_norm": 2.0,
    }
    assert {name: group[name] for name in expected} == expected


def test_what_the_run_knows_reaches_the_optimizer():
    assert build_optimizer(TrainConfig("aesam"), model(), 42).param_groups[0]["total_steps"] == 42
    assert build_optimizer(TrainConfig("esam", seed=7), model(), 42).param_groups[0]["seed"] == 7
    assert build_optimizer(TrainConfig("esam", options=(("seed", 5),)), model(), 42).param_groups[0]["seed"] == 5


def test_defaults_of_a_base():
    group = build_optimizer(TrainConfig("sgd"), model(), 10).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)


def test_options_go_to_the_methods_that_take_them():
    options = {"looksam.rho": 0.2, "rho": 0.1, "alpha": 0.3}
    assert select_options("sgd", options) == ()
    assert select_options("sam", options) == (("rho", 0.1),)
    assert select_options("looksam-5", options) == (("alpha", 0.3), ("rho", 0.2))


def test_options_of_bases_reach_them():
    assert select_options("sgd", {"nesterov": True, "rho": 0.1}) == (("nesterov", True),)
    assert select_options("sam+adam", {"betas": (0.5, 0.6), "nesterov": True}) == (("betas", (0.5, 0.6)),)
    config = TrainConfig("sam+adam", options=(("betas", (0.5, 0.6)),))
    assert build_optimizer(config, model(), 10).param_groups[0]["betas"] == (0.5, 0.6)
    config = TrainConfig("sgd", options=(("nesterov", True), ("lr", 0.3)))
    group = build_optimizer(config, model(), 10).param_groups[0]
    assert (group["nesterov"], group["lr"]) == (True, 0.3)


def test_a_preconditioned_method_is_one_of_the_grammar():
    text = "looksam-5+adamw:precondition=true,rho=0.2"
    assert canonical_name(text) == text
    group = build_optimizer(TrainConfig(text, options=select_options(text, {})), model(), 10).param_groups[0]
    assert (group["precondition"], group["rho"]) == (True, 0.2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_q_dtype_is_an_option_of_the_methods_that_keep_a_q(variant):
    base = "+adamw" if variant == "msam" else ""
    optimizer = build_optimizer(TrainConfig(variant + base), model(), 10)
    keeps = "q_dtype" in optimizer.param_groups[0]
    assert parse_method(variant + base).takes("q_dtype", by_name=True) == keeps
    if keeps:
        text = f"{variant}:q_dtype=bfloat16"
        group = build_optimizer(TrainConfig(text, options=select_options(text, {})), model(), 10).param_groups[0]
        assert group["q_dtype"] == "bfloat16"


def test_an_option_of_the_variants_never_means_the_bases_of_that_name():
    options = {"alpha": 0.5, "rho": 0.1}
    assert select_options("rmsprop", options) == ()
    assert select_options("adadelta", options) == ()
    assert select_options("looksam+rmsprop", options) == (("alpha", 0.5), ("rho", 0.1))
    assert select_options("sam+rmsprop", options) == (("rho", 0.1),)
    assert select_options("rmsprop", {"rmsprop.alpha": 0.5}) == (("alpha", 0.5),)
    assert select_options("adadelta:rho=0.8", options) == (("rho", 0.8),)


def test_the_settings_of_a_method_win():
    options = {"rho": 0.1, "looksam.rho": 0.2, "looksam.alpha": 0.3}
    assert select_options("looksam-5:rho=0.4", options) == (("alpha", 0.3), ("rho", 0.4))


def test_an_option_that_nobody_takes_is_an_error():
    check_options(["sgd", "sam"], {"rho": 0.1})
    with pytest.raises(ValueError, match=r"takes the option 'alpha'; they take: .*rho"):
        check_options(["sgd", "sam"], {"alpha": 0.1})
    with pytest.raises(ValueError, match=r"'looksam\.rho'"):
        check_options(["sam"], {"looksam.rho": 0.1})
