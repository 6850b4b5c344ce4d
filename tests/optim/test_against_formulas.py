"""Every optimizer over every base does what the formulas say: 12 steps next to a calculation that shares only the loss.

The tolerance. Two correct programs round in different places, and 12 steps of a non-linear problem amplify that by an amount
nobody can guess. So it is measured: the independent calculation runs again with every gradient, perturbation, direction and
new weight moved at random by up to 8 units in the last place of its tensor's largest entry (each is the result of no more
than 16 roundings of half a unit). An optimizer may be as far from the exact run as the farthest of four such runs, plus two
units of the weights themselves, because the last store rounds too.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from independent import (
    LAMB,
    SGD,
    Adam,
    AdamW,
    FromTorch,
    Independent,
    ascent_asam,
    ascent_layer,
    ascent_sam,
)
from problem import SHAPES, Closure, Problem

import looksam
import looksam_kernels

STEPS, K = 12, 3
BACKENDS = [name for name, info in looksam_kernels.backend_info("cpu").items() if info.available]
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


@dataclass(frozen=True)
class Method:
    """``hyper``: one dict a group. ``options``: what is the same in all groups. The layer-wise ascents come with those."""

    optimizer: type
    ascent: Any
    hyper: tuple = ({"rho": 0.3}, {"rho": 0.1}, {"rho": 0.2})
    options: dict = field(default_factory=dict)
    norm_scope: str | None = None
    k: int = K


def layer_filter(p: torch.Tensor) -> bool:
    return p.ndim >= 2


ALPHAS = tuple({"rho": rho, "alpha": alpha} for rho, alpha in ((0.3, 0.7), (0.1, 0.3), (0.2, 0.0)))
ADAPTIVE = ({"rho": 0.5, "eta": 0.01}, {"rho": 0.4, "eta": 0.1}, {"rho": 0.2, "adaptive": False})

METHODS = {
    "sam": Method(looksam.SAM, ascent_sam, options={"perturb_eps": 0.01}, k=1),
    "sam-3": Method(looksam.SAM, ascent_sam),
    "asam-3": Method(looksam.SAM, ascent_asam, ADAPTIVE, {"adaptive": True, "perturb_eps": 0.01}),
    "looksam-3": Method(looksam.LookSAM, ascent_sam, ALPHAS, {"perturb_eps": 0.01}, "global"),
    "looksam-3-tensor": Method(looksam.LookSAM, ascent_sam, ALPHAS, {}, "tensor"),
    "layersam-3-trust_normalized": Method(looksam.LayerSAM, None),
    "layersam-trust": Method(looksam.LayerSAM, None, options={"layer_scale": "trust"}, k=1),
    "layersam-3-trust_global": Method(looksam.LayerSAM, None, options={"layer_scale": "trust_global"}),
    "layersam-3-unit": Method(looksam.LayerSAM, None, options={"layer_scale": "unit"}),
    "layersam-3-filter": Method(looksam.LayerSAM, None, options={"layer_filter": layer_filter}),
    "layersam-3-trust-filter": Method(
        looksam.LayerSAM,
        None,
        options={"layer_scale": "trust", "layer_filter": layer_filter},
    ),
    "looklayersam-3": Method(looksam.LookLayerSAM, None, ALPHAS, {}, "global"),
    "looklayersam-3-tensor-trust": Method(looksam.LookLayerSAM, None, ALPHAS, {"layer_scale": "trust"}, "tensor"),
}


@dataclass(frozen=True)
class Base:
    name: Any
    hyper: tuple
    independent: Any
    options: dict = field(default_factory=dict)


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
    {**ADAM_HYPER[1], "always_adapt": True},
    {**ADAM_HYPER[2]},
)
LAMB_PLAIN = (ADAM_HYPER[0], ADAM_HYPER[1], {**ADAM_HYPER[2], "trust_clip": True})
RMSPROP_HYPER = (
    {"lr": 0.02, "alpha": 0.9, "eps": 1e-6, "momentum": 0.5, "weight_decay": 0.01},
    {"lr": 0.01, "alpha": 0.5, "eps": 1e-3, "momentum": 0.0, "weight_decay": 0.0},
    {"lr": 0.05, "alpha": 0.99, "eps": 1e-8, "momentum": 0.9, "weight_decay": 0.1},
)
ADAFACTOR_HYPER = (
    {"lr": 0.05, "beta2_decay": -0.8, "d": 1.0, "eps": (1e-12, 1e-3), "weight_decay": 0.01},
    {"lr": 0.02, "beta2_decay": -0.5, "d": 2.0, "eps": (1e-6, 1e-2), "weight_decay": 0.0},
    {"lr": 0.01, "beta2_decay": -0.8, "d": 1.5, "eps": (1e-9, 1e-4), "weight_decay": 0.1},
)
optim = torch.optim

BASES = {
    "sgd": Base("sgd", SGD_HYPER, SGD),
    "sgd-clip": Base("sgd", SGD_HYPER, SGD, {"max_grad_norm": 0.5}),
    "adam": Base("adam", ADAM_HYPER, Adam),
    "adamw": Base("adamw", ADAM_HYPER, AdamW),
    "lamb": Base("lamb", LAMB_HYPER, LAMB, {"max_grad_norm": 1.0}),
    "lamb-noclip": Base("lamb", LAMB_PLAIN, LAMB, {"max_grad_norm": None}),
    "RMSprop": Base(
        optim.RMSprop,
        RMSPROP_HYPER,
        lambda n: FromTorch(n, optim.RMSprop, ("lr", "alpha", "eps", "momentum", "weight_decay")),
    ),
    "Adafactor": Base(
        optim.Adafactor,
        ADAFACTOR_HYPER,
        lambda n: FromTorch(n, optim.Adafactor, ("lr", "beta2_decay", "eps", "d", "weight_decay")),
    ),
}


def group_hypers(method: Method, base: Base) -> list[dict]:
    """One dict a group, as a user gives it: where the base has an argument of the variant's name, it is base_<name>."""
    return [
        {**h, **{("base_" + n if n in h else n): x for n, x in b.items()}}
        for h, b in zip(method.hyper, base.hyper, strict=True)
    ]


def hypers(method: Method, base: Base) -> list[dict]:
    """One dict a group, complete, as the independent calculation reads it."""
    defaults = {"perturb_eps": 1e-12, "adaptive": False, "eta": 0.01, "alpha": 0.7}
    if method.optimizer in (looksam.LayerSAM, looksam.LookLayerSAM):
        defaults["perturb_eps"] = 0.0  # the layer-wise formulas have none
    return [{**defaults, **method.options, **base.options, **h} for h in group_hypers(method, base)]


def names_for(method: Method, base: Base) -> tuple[str, ...]:
    left_out = set()
    if method.norm_scope == "tensor":
        # In a tensor of one element s is parallel to g: its own q is 0, up to a rounding that the reuse would blow up. See
        # test_reuse_of_a_single_element_is_not_rounding_noise.
        left_out.add("scalar")
    if base.name is optim.Adafactor:
        left_out |= {"empty", "empty_matrix"}  # see test_a_wrapped_optimizer_never_sees_an_empty_tensor
    return tuple(name for name in SHAPES if name not in left_out)


def independent_run(problem: Problem, method: Method, base: Base, jitter: Any = lambda x: x) -> list[list[np.ndarray]]:
    h = problem.hyper(hypers(method, base))
    n = len(problem.names)
    ascent = method.ascent
    if method.optimizer in (looksam.LayerSAM, looksam.LookLayerSAM):
        inside = method.options.get("layer_filter", lambda p: True)
        scale = method.options.get("layer_scale", "trust_normalized")
        ascent = ascent_layer(scale, [inside(x) for x in problem.w])
    it = Independent(problem.w, h, base.independent(n), ascent, method.k, method.norm_scope, jitter)
    trajectory = []
    for _ in range(STEPS):
        it.step(lambda w, t, number: problem.gradients(w, t, number, jitter))
        trajectory.append([x.copy() for x in it.w])
    return trajectory


def build(problem: Problem, params: list, method: Method, base: Base, backend: str) -> Any:
    options = dict(method.options, k=method.k, backend=backend)
    if method.norm_scope:
        options["norm_scope"] = method.norm_scope
    options.setdefault("perturb_eps", hypers(method, base)[0]["perturb_eps"])
    # What belongs to the base is given where a user would: as an argument when it is the same for all, else per group.
    groups = problem.groups(params, group_hypers(method, base))
    return method.optimizer(groups, base.name, **options, **base.options)


def run(problem: Problem, method: Method, base: Base, backend: str) -> list[list[np.ndarray]]:
    params = problem.parameters()
    optimizer = build(problem, params, method, base, backend)
    assert optimizer.backend == backend
    closure = Closure(problem, params)
    trajectory = []
    for step in range(STEPS):
        optimizer.step(closure.begin(step))
        trajectory.append([p.detach().double().numpy().copy() for p in params])
    assert closure.calls == STEPS + -(-STEPS // method.k)
    return trajectory


def deviation(a: list, b: list) -> np.ndarray:
    """Largest difference of each tensor so far: (steps, tensors), growing with the steps."""
    far = [
        [np.max(np.abs(x - y), initial=0.0) for x, y in zip(xs, ys, strict=True)] for xs, ys in zip(a, b, strict=True)
    ]
    return np.maximum.accumulate(np.array(far))


@cache
def exact_and_tolerance(method_name: str, base_name: str, dtype: torch.dtype) -> tuple[list, np.ndarray]:
    method, base = METHODS[method_name], BASES[base_name]
    problem = Problem(names=names_for(method, base), dtype=dtype)
    exact = independent_run(problem, method, base)
    rng = np.random.default_rng(1)

    def jitter(x: np.ndarray) -> np.ndarray:
        return x + 8 * EPS[dtype] * np.max(np.abs(x), initial=0.0) * rng.uniform(-1, 1, x.shape)

    moved = [deviation(independent_run(problem, method, base, jitter), exact) for _ in range(4)]
    last_store = np.array([[2 * EPS[dtype] * np.max(np.abs(x), initial=0.0) for x in xs] for xs in exact])
    return exact, np.max(moved, axis=0) + last_store


@cache
def measured(method_name: str, base_name: str, dtype: torch.dtype, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """(errors, tolerances), each (steps, tensors)."""
    method, base = METHODS[method_name], BASES[base_name]
    exact, tolerance = exact_and_tolerance(method_name, base_name, dtype)
    problem = Problem(names=names_for(method, base), dtype=dtype)
    return deviation(run(problem, method, base, backend), exact), tolerance


PRINCIPAL = ("sam-3", "looksam-3", "layersam-3-trust_normalized", "looklayersam-3")


def combinations() -> list:
    """Everything in double precision; what differs only in an option is not repeated in each precision and base."""
    few = {("sam-3", "sgd"), ("looksam-3", "adamw"), ("looklayersam-3", "lamb")}  # Triton's interpreter is slow
    return [
        pytest.param(backend, dtype, m, b, id=f"{backend}-{str(dtype)[6:]}-{m}-{b}")
        for backend in BACKENDS
        for dtype in (torch.float64, torch.float32)
        for m in METHODS
        for b in BASES
        if (
            m in PRINCIPAL or (dtype == torch.float64 and b in ("sgd", "adam", "adamw", "lamb", "RMSprop", "Adafactor"))
        )
        and (backend != "triton" or (m, b) in few)
    ]


@pytest.mark.parametrize(("backend", "dtype", "method", "base"), combinations())
def test_optimizer_equals_the_formulas(backend, dtype, method, base, record_property):
    error, tolerance = measured(method, base, dtype, backend)
    record_property("error", float(error.max()))
    record_property("error_in_tolerances", float(np.max(error / np.maximum(tolerance, 1e-300))))
    names = names_for(METHODS[method], BASES[base])
    wrong = [
        f"step {t}, {names[i]}: {error[t, i]:.2e} > {tolerance[t, i]:.2e}" for t, i in np.argwhere(error > tolerance)
    ]
    assert not wrong, "; ".join(wrong[:6])


@pytest.mark.parametrize(
    ("backend", "dtype", "method", "base"), [c for c in combinations() if c.values[0] != "reference"]
)
def test_backend_errs_at_most_twice_as_much_as_the_reference(backend, dtype, method, base):
    error, _ = measured(method, base, dtype, backend)
    reference, _ = measured(method, base, dtype, "reference")
    exact, _ = exact_and_tolerance(method, base, dtype)
    ulp = EPS[dtype] * np.array([[np.max(np.abs(x), initial=0.0) for x in xs] for xs in exact])
    # The largest error of a tensor: single entries of a rounding error are luck.
    assert np.all(error[-1] <= 2 * reference[-1] + 4 * ulp[-1])


@pytest.mark.parametrize("method", PRINCIPAL)
@pytest.mark.parametrize(("name", "cls"), [("sgd", optim.SGD), ("adam", optim.Adam), ("adamw", optim.AdamW)])
def test_torchs_class_is_the_base_of_that_name(method, name, cls):
    """Bit for bit, so what is shown above for a name holds for the class."""
    m, base = METHODS[method], BASES[name]
    by_name = run(Problem(), m, base, "reference")
    by_class = run(Problem(), m, Base(cls, base.hyper, base.independent), "reference")
    assert deviation(by_name, by_class).max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrapped_optimizer_never_sees_an_empty_tensor(backend):
    """Adafactor divides by the number of elements."""
    w, empty = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.empty(0))
    optimizer = looksam.SAM([w, empty], optim.Adafactor, backend=backend)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (w**2).sum() + (empty**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (w < 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reuse_of_a_single_element_is_not_rounding_noise(backend):
    """Per tensor, the q of one element is 0: s is parallel to g. Its rounding must not be blown up to alpha ||g||."""
    w = torch.linspace(-2, 2, 64, dtype=torch.float64)
    params = [torch.nn.Parameter(x.clone()) for x in w]
    optimizer = looksam.LookSAM(params, "sgd", lr=0.1, rho=0.1, k=2, alpha=0.7, norm_scope="tensor", backend=backend)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(p**4 / 4 + (p - 0.3) ** 2 for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)
    before = torch.stack([p.detach() for p in params])
    optimizer.step(closure)
    after = torch.stack([p.detach() for p in params])
    expected = before - 0.1 * (before**3 + 2 * (before - 0.3))
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)
