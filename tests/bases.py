"""The fused bases as the tests know them: options, hyper-parameters, and each one's update stated a second time.

Every test that goes over the bases reads this table; one that is not in it fails
tests/kernels/test_reference.py::test_every_base_has_a_row. A row is all that a new base adds to the tests, beside its
update in tests/optim/independent.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.optim import independent

Hyper = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Of three groups."""


@dataclass(frozen=True)
class Base:
    """One fused base. A case's name is the base's, or begins with it and a dash."""

    independent: type
    """Its update in NumPy."""
    options: dict[str, Any]
    """What a user gives, for a network of a few weights."""
    kernels: dict[str, dict[str, Any]]
    """Cases of the op matrix: what the ops read beside lr and weight_decay. At least one in which all states are there."""
    hyper: dict[str, Hyper]
    """Cases of the optimizers."""
    shared: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Case -> what all groups share."""


_ADAM = {"betas": (0.9, 0.99), "eps": 1e-8}
_LAMB = {"betas": (0.9, 0.99), "eps": 1e-6}

SGD_HYPER = (
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.5, "dampening": 0.2},
    {"lr": 0.02, "weight_decay": 0.1},
)
ADAM_HYPER = (
    {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01},
    {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0},
    {"lr": 0.1, "betas": (0.0, 0.999), "eps": 1e-8, "weight_decay": 0.2},
)
LAMB_HYPER = (
    {**ADAM_HYPER[0], "trust_clip": True},
    {**ADAM_HYPER[1], "always_adapt": True, "bias_correction": False},
    {**ADAM_HYPER[2]},
)
LAMB_PLAIN = (ADAM_HYPER[0], ADAM_HYPER[1], {**ADAM_HYPER[2], "trust_clip": True})
RMSPROP_HYPER = (
    {"lr": 0.02, "alpha": 0.9, "eps": 1e-6, "momentum": 0.5, "weight_decay": 0.01, "centered": False},
    {"lr": 0.01, "alpha": 0.5, "eps": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "centered": False},
    {"lr": 0.05, "alpha": 0.99, "eps": 1e-8, "momentum": 0.9, "weight_decay": 0.1, "centered": False},
)
# Centered: what rounding leaves of a small variance is divided by eps, which is therefore not small here.
CENTERED_HYPER = (
    {**RMSPROP_HYPER[0], "eps": 0.1, "centered": True},
    {**RMSPROP_HYPER[1], "eps": 0.03, "centered": True},
    {**RMSPROP_HYPER[2]},
)
# SAMPa looks at w - lr y, which must not run away: no large lr here and in ADADELTA_HYPER.
LARS_HYPER = (
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "trust_coefficient": 0.5, "eps": 1e-3},
    {
        "lr": 0.02,
        "momentum": 0.5,
        "nesterov": True,
        "weight_decay": 0.0,
        "trust_coefficient": 1.5,
        "always_adapt": True,
    },
    {"lr": 0.04, "momentum": 0.0, "weight_decay": 0.2, "trust_coefficient": 0.5, "trust_clip": True},
)
LARS_HYPER = tuple({"eps": 1e-8, "always_adapt": False, "trust_clip": False, **h} for h in LARS_HYPER)
LION_HYPER = (
    {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1},
    {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0.0},
    {"lr": 0.03, "betas": (0.0, 0.8), "weight_decay": 0.3},
)
ADAGRAD_HYPER = (
    {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 1e-6, "weight_decay": 0.01},
    {"lr": 0.05, "lr_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-3, "weight_decay": 0.0},
    {"lr": 0.2, "lr_decay": 0.5, "initial_accumulator_value": 1.0, "eps": 1e-10, "weight_decay": 0.1},
)
ADADELTA_HYPER = (
    {"lr": 0.1, "rho": 0.9, "eps": 1e-3, "weight_decay": 0.01},
    {"lr": 0.05, "rho": 0.5, "eps": 1e-2, "weight_decay": 0.0},
    {"lr": 0.2, "rho": 0.99, "eps": 1e-4, "weight_decay": 0.1},
)

ADAN_HYPER = (
    {"lr": 0.05, "betas": (0.98, 0.92, 0.99), "eps": 1e-3, "weight_decay": 0.1, "no_prox": False},
    {"lr": 0.02, "betas": (0.5, 0.9, 0.8), "eps": 1e-2, "weight_decay": 0.0, "no_prox": False},
    {"lr": 0.03, "betas": (0.0, 0.5, 0.9), "eps": 1e-4, "weight_decay": 0.3, "no_prox": True},
)

BASES: dict[str, Base] = {
    "sgd": Base(
        independent.SGD,
        options={"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
        kernels={
            "sgd": {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
            "sgd-momentum": {"momentum": 0.9, "dampening": 0.5, "nesterov": False},
            "sgd-nesterov": {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
        },
        hyper={"sgd": SGD_HYPER, "sgd-clip": SGD_HYPER},
        shared={"sgd-clip": {"max_grad_norm": 0.5}},
    ),
    "adam": Base(independent.Adam, {"lr": 1e-2}, {"adam": _ADAM}, {"adam": ADAM_HYPER}),
    "adamw": Base(independent.AdamW, {"lr": 1e-2}, {"adamw": _ADAM}, {"adamw": ADAM_HYPER}),
    "lamb": Base(
        independent.LAMB,
        options={"lr": 1e-2},
        kernels={
            "lamb": {**_LAMB, "always_adapt": False, "trust_clip": False, "bias_correction": True},
            "lamb-clip": {**_LAMB, "always_adapt": True, "trust_clip": True, "bias_correction": False},
        },
        hyper={"lamb": LAMB_HYPER, "lamb-noclip": LAMB_PLAIN},
        shared={"lamb": {"max_grad_norm": 1.0}, "lamb-noclip": {"max_grad_norm": None}},
    ),
    "lars": Base(
        independent.LARS,
        options={"lr": 1.0, "trust_coefficient": 0.1, "weight_decay": 1e-2},
        kernels={"lars": {"momentum": 0.9, "dampening": 0.1, "nesterov": False}},
        hyper={"lars": LARS_HYPER, "lars-clip": LARS_HYPER},
        shared={"lars-clip": {"max_grad_norm": 0.5}},
    ),
    "lion": Base(
        independent.Lion,
        options={"lr": 1e-3, "weight_decay": 0.1},
        kernels={"lion": {"betas": (0.9, 0.99)}},
        hyper={"lion": LION_HYPER},
    ),
    "adagrad": Base(
        independent.Adagrad,
        options={"lr": 1e-2},
        kernels={"adagrad": {"lr_decay": 0.1, "eps": 1e-10}},
        hyper={"adagrad": ADAGRAD_HYPER},
    ),
    "rmsprop": Base(
        independent.RMSprop,
        options={"lr": 1e-3, "momentum": 0.9, "centered": True, "eps": 1e-3},
        kernels={
            "rmsprop": {"alpha": 0.9, "eps": 1e-8, "momentum": 0.0, "centered": False},
            "rmsprop-momentum": {"base.alpha": 0.9, "alpha": 0.3, "eps": 1e-8, "momentum": 0.9, "centered": False},
            "rmsprop-centered": {"alpha": 0.9, "eps": 1e-8, "momentum": 0.9, "centered": True},
        },
        hyper={"rmsprop": RMSPROP_HYPER, "rmsprop-centered": CENTERED_HYPER},
    ),
    "adadelta": Base(
        independent.Adadelta,
        options={"lr": 1.0},
        kernels={"adadelta": {"base.rho": 0.9, "rho": 0.05, "eps": 1e-6}},
        hyper={"adadelta": ADADELTA_HYPER},
    ),
    "adan": Base(
        independent.Adan,
        options={"lr": 1e-2, "weight_decay": 0.02},
        kernels={
            "adan-no_prox": {"betas": (0.9, 0.8, 0.99), "eps": 1e-6, "no_prox": True},
            "adan": {"betas": (0.9, 0.8, 0.99), "eps": 1e-6, "no_prox": False},
        },
        hyper={"adan": ADAN_HYPER},
    ),
}


def base_of(case: str) -> str:
    """The base of a case."""
    return case.partition("-")[0]


def with_all_states(base: str) -> dict[str, Any]:
    """What the ops read of a base in the last of its cases, in which all its states are there."""
    return list(BASES[base].kernels.values())[-1] if base in BASES else {}


def by_own_names(options: dict[str, Any]) -> dict[str, Any]:
    """Options as the base alone has them: base.<name> is its <name>, and the variant's <name> is none of its."""
    prefix = "base."
    return options | {name.removeprefix(prefix): x for name, x in options.items() if name.startswith(prefix)}
