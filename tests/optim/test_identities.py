"""What must hold exactly, whatever the numbers: two ways to the same result give the same bits."""

import copy
import importlib.util
import io
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import looksam
from looksam_kernels.updates import BASES as BASES_OF_OPS
from tests import bases as tables
from tests.bases import SGD_HYPER, base_of
from tests.nightly import NIGHTLY
from tests.optim.cases import BASES, METHODS, QUICK, Base, Method, build, names_for
from tests.optim.independent import LAMB, Independent
from tests.optim.parity import from_timm
from tests.optim.problem import GROUPS, SHAPES, Closure, Problem
from tests.optim.test_against_formulas import EPS, deviation, exact_and_tolerance

FEW = settings(deadline=None, derandomize=True, max_examples=4)
VARIANTS = (
    *("sam-3", "asam-3", "looksam-3", "looksam-3-tensor", "layersam-3-trust_normalized", "looklayersam-3"),
    *("ASAM-3", "ssam-3", "gsam-3", "wsam-3", "wsam-3-coupled", "crsam-3", "vasso", "friendlysam", "sampa"),
)
PRINCIPAL = ("sam-3", "looksam-3", "layersam-3-trust_normalized", "looklayersam-3")
ALWAYS = ("matrix", "vector", "scalar", "empty", "kernel", "never", "flat", "some_steps", "from_zero")
FUSED = tuple(tables.BASES)
EVERY_BASE = (*FUSED, "RMSprop", "Adafactor")
K = 3

backends = pytest.mark.parametrize("backend", QUICK)
bases = pytest.mark.parametrize("base", EVERY_BASE)
principal = pytest.mark.parametrize("variant", PRINCIPAL)

PAIRS = list(
    dict.fromkeys(
        (
            *((variant, base) for variant in VARIANTS for base in ("sgd", "lamb", "RMSprop")),
            *((variant, base) for variant in PRINCIPAL for base in EVERY_BASE),
        )
    )
)
"""Every variant over three kinds of bases, every base under the principal variants; ``make nightly`` calculates all of their
products independently (test_against_formulas.py)."""


def on_backends(cases: list[tuple[str, str]]) -> Any:
    """Tests of what the optimizer does, not the ops: all cases on one backend, a fifth on the others."""
    return pytest.mark.parametrize(
        ("backend", "variant", "base"),
        [
            (backend, variant, base)
            for backend in QUICK
            for place, (variant, base) in enumerate(cases)
            if NIGHTLY or backend == QUICK[0] or place % 5 == 0
        ],
    )


pairs = on_backends(PAIRS)


def problem_for(variant: str, base: str) -> Problem:
    return Problem(names=names_for(METHODS[variant], BASES[base]))


def with_hyper(method: Method, **changed: Any) -> Method:
    return replace(method, hyper=tuple({**h, **changed} for h in method.hyper))


def passes_of(variant: str, step: int) -> int:
    return METHODS[variant].passes if step % METHODS[variant].period == 0 else 1


class Run:
    """Parameters, an optimizer over them and its closure."""

    def __init__(self, problem: Problem, method: Method, base: Base, backend: str) -> None:
        self.problem, self.method, self.base, self.backend = problem, method, base, backend
        self.params = problem.parameters()
        self.optimizer = build(problem, self.params, method, base, backend)
        self.closure = Closure(problem, self.params)
        self.t = 0

    def steps(self, n: int) -> "Run":
        for _ in range(n):
            self.optimizer.step(self.closure.begin(self.t))
            self.t += 1
        return self

    @property
    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.params]

    @property
    def state(self) -> list[dict]:
        """Every tensor of the state, and the plain values."""
        return [copy.deepcopy(dict(self.optimizer.state[p])) if p in self.optimizer.state else {} for p in self.params]


def begin(variant: str, base: str, backend: str, problem: Problem | None = None) -> Run:
    return Run(problem or problem_for(variant, base), METHODS[variant], BASES[base], backend)


def same_bits(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_same(a: Run, b: Run) -> None:
    assert same_bits(a.weights, b.weights)
    for x, y in zip(a.state, b.state, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert torch.equal(torch.as_tensor(x[name]), torch.as_tensor(y[name])), name


# -------------------------------------------------------------------------------------------------- rho = 0 and k = 1


@backends
@bases
@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if name not in ("ssam-3", "gsam-3", "wsam-3-coupled", "crsam-3", "sampa")]
)
def test_rho_0_equals_the_base_bit_for_bit_on_sharp_and_on_reuse_steps(variant, base, backend):
    """s is g, so q is exactly 0, so a reuse step is a base step. Other methods combine s and g with factors that round."""
    names = tuple(n for n in names_for(METHODS[variant], BASES[base]) if n in ALWAYS)
    method = with_hyper(METHODS[variant], rho=0.0)
    alone = Method(looksam.SAM, None, ({"rho": 0.0},) * 3, k=10**9)  # reuse or plain steps, all but the first
    ours = Run(Problem(names=names), method, BASES[base], backend).steps(2 * K + 1)
    plain = Run(Problem(names=names), alone, BASES[base], backend).steps(2 * K + 1)
    assert same_bits(ours.weights, plain.weights)


@backends
@pytest.mark.parametrize("base", ["RMSprop", "Adafactor"])
@principal
def test_rho_0_over_any_class_equals_the_class_by_itself_bit_for_bit(variant, base, backend):
    method = with_hyper(METHODS[variant], rho=0.0)
    problem = Problem(names=tuple(n for n in names_for(method, BASES[base]) if n in ALWAYS))
    ours = Run(problem, method, BASES[base], backend)
    params = problem.parameters()
    theirs = BASES[base].name(problem.groups(params, list(BASES[base].hyper)))
    closure = Closure(problem, params)
    for t in range(2 * K + 1):
        ours.steps(1)
        closure.begin(t)()
        theirs.step()
    assert same_bits(ours.weights, [p.detach() for p in params])


@backends
@pytest.mark.parametrize("base", ["sgd", "adamw", "lamb", "RMSprop"])
@pytest.mark.parametrize(
    ("look", "plain"),
    [("looksam-3", "sam-3"), ("looksam-3-tensor", "sam-3"), ("looklayersam-3", "layersam-3-trust_normalized")],
)
@FEW
@given(alpha=st.floats(0, 100))
def test_k_1_equals_sam_whatever_alpha_bit_for_bit(look, plain, base, backend, alpha):
    names = names_for(METHODS[look], BASES[base])
    looking = replace(with_hyper(METHODS[look], alpha=alpha), k=1, options=METHODS[plain].options)
    a = Run(Problem(names=names), looking, BASES[base], backend).steps(3)
    b = Run(Problem(names=names), replace(METHODS[plain], k=1), BASES[base], backend).steps(3)
    assert same_bits(a.weights, b.weights)


SAME_AS_SAM = {
    "gsam": Method(looksam.GSAM, hyper=tuple({"rho": rho, "alpha": 0.0} for rho in (0.3, 0.1, 0.2))),
    "wsam": Method(looksam.WSAM, options={"gamma": 0.5, "decouple": False}),
    "crsam": Method(looksam.CRSAM, options={"gamma": 0.0, "beta": 0.0}, passes=3),
    "vasso": Method(looksam.VaSSO, options={"theta": 1.0}, k=None),
    "friendlysam": Method(looksam.FriendlySAM, options={"sigma": 0.0}, k=None),
    "asam": Method(looksam.ASAM, options={"eta": 0.5}),  # T = 1 where there are fewer than two dimensions
}


@backends
@bases
@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": 0.5}], ids=["", "clip"])
@pytest.mark.parametrize("name", SAME_AS_SAM)
def test_with_its_extra_turned_off_a_variant_is_sam_bit_for_bit(name, clip, base, backend):
    method = SAME_AS_SAM[name]
    base = replace(BASES[base], options={**BASES[base].options, **clip})
    # What a tensor without a gradient leaves of the method is another matter.
    names = tuple(n for n in names_for(method, base) if n in ALWAYS and n != "some_steps")
    if name == "asam":
        names = tuple(n for n in names if len(SHAPES[n]) < 2)
    ours = Run(Problem(names=names), method, base, backend).steps(2 * K + 1)
    sam = Run(Problem(names=names), replace(METHODS["sam"], options={}, k=method.period), base, backend).steps(
        2 * K + 1
    )
    assert same_bits(ours.weights, sam.weights)
    assert ours.closure.calls == sam.closure.calls + (method.passes - 2) * 3


@backends
@pytest.mark.parametrize("base", ["sgd", "RMSprop"])
def test_the_first_step_of_sampa_is_the_bases_bit_for_bit(base, backend):
    """Without a y both gradients are taken at w; halves of two equal numbers add up exactly."""
    names = tuple(n for n in names_for(METHODS["sampa"], BASES[base]) if n in ALWAYS)
    ours = Run(Problem(names=names), with_hyper(METHODS["sampa"], lambda_=0.5), BASES[base], backend).steps(1)
    plain = Run(Problem(names=names), with_hyper(METHODS["sam"], rho=0.0), BASES[base], backend).steps(1)
    assert same_bits(ours.weights, plain.weights)


@backends
def test_gsams_radius_follows_a_learning_rate_that_is_a_tensor(backend):
    runs = []
    for make in (float, torch.tensor):
        sgd = Base("sgd", tuple({**h, "lr": make(h["lr"])} for h in SGD_HYPER), None)
        run = Run(Problem(), METHODS["gsam-3"], sgd, backend)
        for lr in (0.05, 0.125, 0.0625):  # of which float32 changes one
            for group in run.optimizer.param_groups:
                group["lr"] = make(lr)
            run.steps(K)
        runs.append(run)
    torch.testing.assert_close(runs[0].weights, runs[1].weights, rtol=1e-6, atol=1e-7)
    assert not same_bits(runs[0].weights, Run(Problem(), METHODS["gsam-3"], BASES["sgd"], backend).steps(3 * K).weights)


ONE_CLOSURE = [c for c in looksam.VARIANTS.values() if "k" in signature(c).parameters and c is not looksam.ESAM]


@pytest.mark.parametrize("cls", ONE_CLOSURE)  # of ESAM there are other tests: its closure is another
@FEW
@given(n=st.integers(1, 20), k=st.integers(1, 7))
def test_n_steps_call_the_closure_n_plus_ceil_n_over_k_times(cls, n, k):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = cls([p], "sgd", lr=0.01, k=k)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(optimizer.needs_second_pass)
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    for _ in range(n):
        at_w = float((p.detach() ** 2).sum())
        assert optimizer.step(closure).item() == at_w  # the first loss, at the unperturbed weights
    assert len(calls) == n + (2 if cls is looksam.CRSAM else 1) * -(-n // k)


# ------------------------------------------------------------------------------------------------ torch's own base steps

TORCH_CASES = {
    case: (BASES_OF_OPS[name].options, hyper)
    for name, base in tables.BASES.items()
    for case, hyper in base.hyper.items()
    if isinstance(BASES_OF_OPS[name].options, type) and case not in base.shared
}
# torch's class reads its own default for the first, whatever the group says
TORCH_CASES["adagrad"] = (
    torch.optim.Adagrad,
    tuple({**h, "initial_accumulator_value": 0.0} for h in TORCH_CASES["adagrad"][1]),
)


def ulps(a: torch.Tensor, b: torch.Tensor, before: torch.Tensor, last: torch.Tensor, state: dict) -> float:
    """|a - b| in units in the last place of what the last subtraction works on (the weight, the update, the result), and of
    the update as often as its own formula magnifies rounding.

    last: the update before, whose part in this one (momentum) may have hidden how large the rest is.
    """
    if a.numel() == 0:
        return 0.0
    update = (b - before).abs()
    size = torch.stack([before.abs(), b.abs(), update]).amax(0)
    unit = np.spacing(size.numpy()) + cancellation(state) * np.spacing((update + last.abs()).numpy())
    return float(np.max((a - b).abs().numpy() / unit))


def cancellation(state: dict) -> np.ndarray | float:
    """Centered RMSprop's variance v - mean^2 magnifies the rounding of v by v / (v - mean^2), an element each. RMSprop's buffer
    is the update before it is multiplied by lr: its last place is up to twice as coarse as that of the product."""
    if "grad_avg" in state:
        v, mean = state["square_avg"], state["grad_avg"]
        return torch.where(v > 0, v / (v - mean * mean), 1.0).numpy()
    return 1.0 if {"square_avg", "momentum_buffer"} <= state.keys() else 0.0


@backends
@pytest.mark.parametrize("rho_0", [True, False], ids=["looksam-rho-0", "sam-cheap"])
@pytest.mark.parametrize("name", list(TORCH_CASES))
def test_each_step_is_within_2_ulps_of_torchs_from_the_same_state(name, rho_0, backend, record_property):
    """Weights and every state tensor are set to torch's before each step, so errors do not add up."""
    cls, hyper = TORCH_CASES[name]
    problem = Problem(names=ALWAYS)
    params, theirs = problem.parameters(), problem.parameters()
    rho, k = {"rho": 0.0}, 10**9
    method = (
        Method(looksam.LookSAM, None, ({**rho, "alpha": 0.7},) * 3, k=2)
        if rho_0
        else Method(looksam.SAM, None, (rho,) * 3, k=k)
    )
    optimizer = build(problem, params, method, Base(base_of(name), hyper, None), backend)
    reference = cls(problem.groups(theirs, list(hyper)))
    closure, their_closure = Closure(problem, params), Closure(problem, theirs)
    worst, last = 0.0, [torch.zeros_like(p) for p in theirs]
    for t in range(20):
        before = [p.detach().clone() for p in theirs]
        with torch.no_grad():
            for p, q in zip(params, theirs, strict=True):
                p.copy_(q)
                for key, x in reference.state[q].items():
                    if torch.is_tensor(x) and torch.is_tensor(optimizer.state[p].get(key)):
                        optimizer.state[p][key].copy_(x)
        optimizer.step(closure.begin(t))
        their_closure.begin(t)()
        reference.step()
        rows = zip(params, theirs, before, last, strict=True)
        worst = max(worst, *(ulps(p.detach(), q.detach(), b, x, reference.state[q]) for p, q, b, x in rows))
        last = [q.detach() - b for q, b in zip(theirs, before, strict=True)]
    print(f"{name}: {worst} ulps")
    record_property("ulps", worst)
    assert worst <= 2


LAMB_OPTIONS = [
    {},
    {"max_grad_norm": None, "weight_decay": 0.0},
    {"weight_decay": 0.0, "always_adapt": True},
    {"trust_clip": True, "max_grad_norm": 0.3, "betas": (0.8, 0.9), "eps": 1e-3},
    {"bias_correction": False},
]
LAMB_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0}


@backends
@pytest.mark.parametrize("options", LAMB_OPTIONS, ids=str)
def test_lamb_alone_equals_its_formula(options, backend):
    problem = Problem(names=ALWAYS)
    h = [{**LAMB_DEFAULTS, "lr": 0.05, **options}] * len(ALWAYS)

    def trajectory(jitter: Callable) -> list:
        it = Independent(problem.w, h, LAMB(len(ALWAYS)), None, k=10**9, jitter=jitter)
        it.t = 1  # no step is a sharp one
        states = []
        for _ in range(12):
            it.step(partial(problem.gradients, jitter=jitter))
            states.append([x.copy() for x in it.w])
        return states

    params = problem.parameters()
    optimizer = looksam.LAMB(params, lr=0.05, backend=backend, **options)
    closure, ours = Closure(problem, params), []
    for t in range(12):
        optimizer.step(closure.begin(t + 1))
        ours.append([p.detach().numpy().copy() for p in params])
    assert closure.calls == 12
    rng = np.random.default_rng(0)
    noise = lambda x: x + 8 * EPS[torch.float64] * np.max(np.abs(x), initial=0) * rng.uniform(-1, 1, x.shape)  # noqa: E731
    exact = trajectory(lambda x: x)
    tolerance = np.max([deviation(trajectory(noise), exact) for _ in range(4)], axis=0) + 2e-15
    assert np.all(deviation(ours, exact) <= tolerance)


def timms(name: str) -> type:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return from_timm(name)


@backends
@pytest.mark.parametrize("options", LAMB_OPTIONS, ids=str)
def test_lamb_alone_equals_timms(options, backend):
    """timm counts steps per group, so every tensor has a gradient on every step here."""
    problem = Problem(names=("matrix", "vector", "scalar", "kernel", "flat", "from_zero"))
    params, theirs = problem.parameters(), problem.parameters()
    optimizer = looksam.LAMB(params, lr=0.05, backend=backend, **options)
    reference = timms("Lamb")(theirs, lr=0.05, **{**LAMB_DEFAULTS, **options})
    for t in range(12):
        optimizer.step(Closure(problem, params).begin(t))
        Closure(problem, theirs).begin(t)()
        reference.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(
            p, q, rtol=1e-12, atol=1e-13
        )  # 12 steps, some 20 roundings each, trust ratios up to 10


LARS_OPTIONS = [
    {"weight_decay": 0.1, "momentum": 0.9},
    {"weight_decay": 0.1, "momentum": 0.5, "nesterov": True, "trust_clip": True},
    {"weight_decay": 0.0, "momentum": 0.9, "dampening": 0.3},
    {"weight_decay": 0.0, "momentum": 0.0, "always_adapt": True, "eps": 0.1},
]


@backends
@pytest.mark.parametrize("options", LARS_OPTIONS, ids=str)
def test_lars_alone_equals_timms(options, backend):
    problem = Problem(names=ALWAYS)
    params, theirs = problem.parameters(), problem.parameters()
    optimizer = looksam.LARS(params, lr=0.3, trust_coefficient=0.1, backend=backend, **options)
    reference = timms("Lars")(theirs, lr=0.3, trust_coeff=0.1, **options)
    for t in range(12):
        optimizer.step(Closure(problem, params).begin(t))
        Closure(problem, theirs).begin(t)()
        reference.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@backends
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lion_alone_equals_timms(weight_decay, backend):
    problem = Problem(names=ALWAYS)
    params, theirs = problem.parameters(), problem.parameters()
    optimizer = looksam.Lion(params, lr=0.02, betas=(0.8, 0.9), weight_decay=weight_decay, backend=backend)
    reference = timms("Lion")(theirs, lr=0.02, betas=(0.8, 0.9), weight_decay=weight_decay)
    for t in range(12):
        optimizer.step(Closure(problem, params).begin(t))
        Closure(problem, theirs).begin(t)()
        reference.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@backends
def test_lars_over_a_perturbation_takes_the_norm_of_the_restored_weights(backend):
    """w = (3, 4) climbs far, to (9, 12) and ||w|| = 15; r belongs to ||w|| = 5. s = 2 at w + e, so r = 5 / (2 + 5)."""
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    own = {"lr": 1.0, "momentum": 0.0, "trust_coefficient": 1.0, "weight_decay": 1.0, "eps": 0.0}
    optimizer = looksam.SAM([p], "lars", rho=10.0, backend=backend, **own)
    looks = iter([[3.0, 4.0], [2.0, 0.0]])

    def closure() -> None:
        p.grad = torch.tensor(next(looks), dtype=torch.float64)

    optimizer.step(closure)
    expected = torch.tensor([3 - 5 / 7 * (2 + 3), 4 - 5 / 7 * 4], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@backends
@principal
def test_rho_0_over_muon_equals_muon_bit_for_bit(variant, backend):
    """It takes matrices only."""
    start = [torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(shape) for shape in ((3, 4), (6, 2), (1, 12))]
    own = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}
    results = []
    for alone in (False, True):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        method = METHODS[variant].optimizer
        optimizer: Any = torch.optim.Muon(params, **own)
        if not alone:
            optimizer = method(params, torch.optim.Muon, rho=0.0, k=2, backend=backend, **own)

        def closure(params: list = params) -> torch.Tensor:
            for p in params:
                p.grad = None
            loss = sum((p.sin() * p).sum() for p in params)
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        results.append([p.detach() for p in params])
    assert same_bits(*results)
    assert not same_bits(results[0], start)


# --------------------------------------------------------------------------------------------------------------- resume


@pairs
def test_resuming_at_every_phase_equals_the_uninterrupted_run_bit_for_bit(variant, base, backend):
    whole = begin(variant, base, backend).steps(K)
    resumed = []
    for _ in range(K):
        file = io.BytesIO()
        torch.save(whole.optimizer.state_dict(), file)
        file.seek(0)
        for state_dict in (copy.deepcopy(whole.optimizer.state_dict()), torch.load(file, weights_only=True)):
            run = begin(variant, base, backend)
            with torch.no_grad():
                for p, q in zip(run.params, whole.params, strict=True):
                    p.copy_(q)
            run.t = whole.t
            run.optimizer.load_state_dict(state_dict)
            resumed.append(run)
        whole.steps(1)
    whole.steps(2)
    for run in resumed:
        assert_same(run.steps(whole.t - run.t), whole)


# ---------------------------------------------------------------------------------------------------- the two call styles


@on_backends([(v, b) for v, b in PAIRS if METHODS[v].in_two_calls])
def test_both_call_styles_and_an_unmodified_loop_of_two_calls_give_the_same_bits(variant, base, backend):
    closures = begin(variant, base, backend)
    asks = begin(variant, base, backend)  # looks at what first_step returns
    old = begin(variant, base, backend)  # written for davda54/sam: always both calls, and two backward passes
    for t in range(2 * K + 1):
        closures.steps(1)
        asks.closure.begin(t)()
        sharp = asks.optimizer.needs_second_pass
        assert asks.optimizer.first_step(zero_grad=True) == sharp == (t % METHODS[variant].period == 0)
        if sharp:
            asks.problem.loss(asks.params, t, 2).backward()
            asks.optimizer.second_step(zero_grad=True)
        assert all(p.grad is None for p in asks.params)
        old.problem.loss(old.params, t, 1).backward()
        old.optimizer.first_step(zero_grad=True)
        old.problem.loss(old.params, t, 2).backward()
        old.optimizer.second_step(zero_grad=True)
        assert same_bits(closures.weights, asks.weights)
        assert same_bits(closures.weights, old.weights)
    assert_same(closures, asks)
    assert_same(closures, old)


# ---------------------------------------------------------------------------------------------- failures and bad values


@pairs
def test_a_closure_that_raises_in_any_pass_leaves_no_trace(variant, base, backend):
    """The weights at once, and everything else as the further run shows: it equals one in which nothing happened."""
    calm, hit = begin(variant, base, backend), begin(variant, base, backend)
    for t in range(K + 2):
        for number in range(1, passes_of(variant, t) + 1):
            for error in (RuntimeError, KeyboardInterrupt):

                def fail(called: int, number: int = number, error: type = error) -> None:
                    if called == number:
                        raise error("out of memory")

                before = hit.weights
                hit.closure.on_call = fail
                with pytest.raises(error, match="out of memory"):
                    hit.optimizer.step(hit.closure.begin(t))
                assert same_bits(before, hit.weights)
        hit.closure.on_call = None
        hit.steps(1)
        calm.steps(1)
        assert same_bits(calm.weights, hit.weights)
    assert_same(calm, hit)


@on_backends(list(product(VARIANTS, ["sgd", "adamw", "lamb", "RMSprop"])))
def test_a_non_finite_gradient_in_any_pass_changes_nothing_but_the_phase(variant, base, backend):
    for t, values in ((0, ("nan", "inf", "nan")), (K, ("inf", "nan", "inf")), (K + 1, ("nan", "inf"))):
        for number, value in zip(range(1, passes_of(variant, t) + 1), values, strict=False):
            check_non_finite(variant, base, t, number, float(value), backend)


@backends
def test_after_a_bad_first_step_a_wrapped_optimizer_still_creates_its_state(backend):
    """Also for a tensor that is absent on the step in between."""
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = looksam.LookSAM([a, b], torch.optim.RMSprop, k=2, backend=backend)
    for t in range(4):

        def closure(t: int = t) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (a**2).sum() + (0 if t == 1 else (b**2).sum())
            (loss * (float("inf") if t == 0 else 1.0)).backward()
            return loss

        optimizer.step(closure)
    assert (a < 1).all()
    assert (b < 1).all()


def check_non_finite(variant: str, base: str, t: int, number: int, value: float, backend: str) -> None:
    run = begin(variant, base, backend).steps(t)
    before, state, phases = run.weights, run.state, [group["phase"] for group in run.optimizer.param_groups]

    def spoil(called: int) -> None:
        if called == number:
            run.params[1].grad.view(-1)[-1] = value

    run.closure.on_call = spoil
    run.steps(1)
    assert same_bits(before, run.weights)
    for old, new in zip(state, run.state, strict=True):
        for name, x in new.items():
            if name in old:
                assert torch.equal(torch.as_tensor(x), torch.as_tensor(old[name])), name
            elif name not in ("backup", "master_param"):
                assert not torch.as_tensor(x).any(), name  # created, as for a step with zero gradients
    period = METHODS[variant].period
    assert [group["phase"] for group in run.optimizer.param_groups] == [(phase + 1) % period for phase in phases]
    run.closure.on_call = None
    calls = run.closure.calls
    run.steps(K)
    assert run.closure.calls == calls + sum(passes_of(variant, t + 1 + i) for i in range(K))
    assert all(torch.isfinite(p).all() for p in run.params)


@pairs
def test_the_storage_of_a_parameter_never_changes(variant, base, backend):
    run = begin(variant, base, backend)
    pointers = [p.data_ptr() for p in run.params]
    seen = []
    run.closure.on_call = lambda number: seen.append([p.data_ptr() for p in run.params])
    run.steps(K + 1)
    assert all(now == pointers for now in [*seen, [p.data_ptr() for p in run.params]])


@backends
@pytest.mark.parametrize(("variant", "kept"), [("sam", 0), ("ASAM-3", 0), ("gsam-3", 1), ("vasso", 1), ("crsam-3", 2)])
def test_a_gradient_is_freed_when_no_later_rule_reads_it(variant, kept, backend):
    run = begin(variant, "sgd", backend)
    made: list[weakref.ref] = []

    def count(number: int) -> None:
        if number == METHODS[variant].passes:
            assert sum(x() is not None for x in made) == kept
        made.append(weakref.ref(run.params[0].grad))

    run.closure.on_call = count
    run.steps(1)
    assert len(made) == METHODS[variant].passes
    run.closure.on_call = None
    run.optimizer.zero_grad()
    assert all(x() is None for x in made), "the step is over"


# --------------------------------------------------------------------------------------------------------- invariances


@backends
@principal
@pytest.mark.parametrize("base", ["sgd", "lamb"])
@FEW
@given(random=st.randoms(use_true_random=False))
def test_the_order_of_parameters_and_groups_changes_nothing(variant, base, backend, random):
    """Up to the order of summation; see test_against_formulas for where the tolerance comes from."""
    exact, tolerance = exact_and_tolerance(variant, base, torch.float64)
    run = begin(variant, base, backend)
    groups = []
    for group in run.problem.groups(
        run.params, [{**h, **b} for h, b in zip(run.method.hyper, run.base.hyper, strict=True)]
    ):
        random.shuffle(group["params"])
        groups.append(group)
    random.shuffle(groups)
    options = {"perturb_eps": run.optimizer.param_groups[0]["perturb_eps"], **run.base.options}
    run.optimizer = run.method.optimizer(groups, run.base.name, k=K, backend=backend, **options)
    run.steps(K + 2)
    error = deviation([[p.detach().numpy() for p in run.params]], [exact[K + 1]])[0]
    assert np.all(error <= tolerance[K + 1])


@backends
@pytest.mark.parametrize(
    "variant",
    [
        name
        for name in METHODS
        if not any(x in name for x in ("filter", "global", "unified", "both", "preconditioned"))
        and name not in ("sam", "gsam-3", "gsam-3-only")
    ],
)
@FEW
@given(power=st.integers(-30, 30))
def test_a_loss_scale_changes_neither_the_ascent_nor_the_reuse(variant, backend, power):
    """With lr / scale the whole run, and every perturbed weight in it, has the same bits: 2^n only moves exponents.

    The formula itself excludes GSAM's schedule, which follows lr; "trust_global", whose size is rho ||w_p|| / ||g||;
    unified SAM, whose e grows with g; preconditioned ascents, for which SGD has no second moment; and tensors with
    L_p = 1 by definition: those of zeros and those outside the layer filter.
    """
    visited: list[list[torch.Tensor]] = []
    for scale in (1.0, 2.0**power):
        method = replace(METHODS[variant], options={**METHODS[variant].options, "perturb_eps": 0.0})
        sgd = Base("sgd", tuple({"lr": lr / scale, "momentum": 0.9} for lr in (0.05, 0.1, 0.02)), None)
        names = tuple(name for name in names_for(method, sgd) if name != "from_zero" or not method.is_layerwise)
        run = Run(Problem(names=names), method, sgd, backend)
        path: list[torch.Tensor] = []

        def record(number: int, run: Run = run, path: list = path, scale: float = scale) -> None:
            path.extend(run.weights)
            for p in run.params:
                if p.grad is not None:
                    p.grad.mul_(scale)

        run.closure.on_call = record
        run.steps(K + 2)
        visited.append([*path, *run.weights])
    assert same_bits(*visited)


@pairs
def test_maximize_equals_minimising_the_negated_loss_bit_for_bit(variant, base, backend):
    flipped = replace(BASES[base], options={**BASES[base].options, "maximize": True})
    problem = problem_for(variant, base)
    up = Run(problem, METHODS[variant], flipped, backend)
    down = Run(problem, METHODS[variant], BASES[base], backend)

    def negate(run: Run) -> None:
        for p in run.params:
            if p.grad is not None:
                p.grad.neg_()

    up.closure.on_call = lambda number: negate(up)
    for _ in range(K + 2):
        up.steps(1)
        down.steps(1)
    assert same_bits(up.weights, down.weights)


@backends
@principal
@pytest.mark.parametrize("base", ["sgd", "lamb", "RMSprop"])
@pytest.mark.parametrize("joins", range(1, K + 1))
def test_a_group_that_joins_later_equals_one_without_gradients_until_then(variant, base, joins, backend):
    runs = [begin(variant, base, backend) for _ in range(2)]
    there, late = runs
    third = [p for p, name in zip(late.params, late.problem.names, strict=True) if name in GROUPS[2]]
    last = late.optimizer.param_groups[-1]
    given = {**METHODS[variant].hyper[2], **BASES[base].hyper[2]}
    given = {("base.alpha" if n == "alpha" and "base.alpha" in last else n): x for n, x in given.items()}
    if "base.alpha" in last:
        given["alpha"] = last["alpha"]
    groups = late.optimizer.param_groups[:2]
    kept = [{name: x for name, x in group.items() if name not in ("phase", "layer_filter")} for group in groups]
    options = {"k": K, "backend": backend, "perturb_eps": last["perturb_eps"], **METHODS[variant].options}
    late.optimizer = METHODS[variant].optimizer(kept, BASES[base].name, **options, **BASES[base].options)
    for t in range(K + joins + 2):

        def hide(number: int, t: int = t) -> None:
            for run in runs:
                for p, name in zip(run.params, run.problem.names, strict=True):
                    if name in GROUPS[2] and t < joins:
                        p.grad = None

        there.closure.on_call = late.closure.on_call = hide
        if t == joins:
            late.optimizer.add_param_group({"params": third, **given})
        there.steps(1)
        late.steps(1)
        assert same_bits(there.weights, late.weights)
        assert len({group["phase"] for group in late.optimizer.param_groups}) == 1
    assert there.closure.calls == late.closure.calls
