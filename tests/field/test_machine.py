"""Random lives of an optimizer, against the plain reference.

Hypothesis draws sequences of what users, schedulers, trainers and other libraries do around a step. After each of them
the weights of every backend are those of the reference, to rounding. A hundred sequences are always the same;
``make nightly`` draws two thousand anew every time.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.optim import lr_scheduler

import looksam
from tests.field import test_state as changes
from tests.field import test_weights as moves
from tests.field.support import BACKENDS, BASES, HYPER, ONLY_OURS, STYLES, Side, assert_close, reference
from tests.nightly import NIGHTLY

SHAPES = [(3, 4), (5,), (), (4, 3), (5,), (0,), (2, 2), (1,)]
"""Of the parameters, by number; those that come later begin again at the first."""
VARIANTS = ("sam", "looksam", "layersam", "looklayersam", "asam", "gsam", "vasso")
BASES_HERE = ("sgd", "adamw", "lamb", "rmsprop", "wrapped sgd", "wrapped adamw")
CHANGES = {name: change for name, change in changes.CHANGES.items() if name != "new state, no defaultdict"}
"""Without the one after which torch's own classes miss the rows of new parameters."""
AT = st.integers(0, 20)
"""Which parameter or group, modulo how many there are."""


class Bag(nn.Module):
    """Parameters that come and go. L = sum_p sum(a (w - c)^2) / 2 + (sum_p sum(u tanh w))^2 / 2, a in (0.2, 1.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0
        for _ in range(5):
            self.add()

    def add(self) -> nn.Parameter:
        generator = torch.Generator().manual_seed(self.made)
        shape = SHAPES[self.made % len(SHAPES)]
        w, c, u = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        p = nn.Parameter(w)
        name = f"w{self.made}"
        self.register_parameter(name, p)
        self.register_buffer(f"c_{name}", c)
        self.register_buffer(f"u_{name}", 0.2 * u)
        self.made += 1
        return p

    def loss(self, absent: Collection[int]) -> Tensor:
        total = coupled = torch.zeros((), dtype=torch.float64)
        for i, (name, p) in enumerate(self.named_parameters()):
            if i not in absent:
                c, u = self.get_buffer(f"c_{name}"), self.get_buffer(f"u_{name}")
                total = total + ((0.2 + c.abs().tanh()) * (p - c) ** 2).sum() / 2
                coupled = coupled + (u * p.tanh()).sum()
        return total + coupled**2 / 2


def matrices(p: Tensor) -> bool:
    """A layer filter."""
    return p.ndim >= 2


class Raised(Exception):
    pass


class Life(Side):
    """One side, with a model whose parameters may be absent from a pass, and passes that may raise."""

    absent: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    raises_in: int | None = None

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        super().__init__(model, optimizer)
        self.saved: Any = None
        self.scheduler: Any = None

    def backward(self) -> Tensor:
        number = self.passes
        self.before_pass.get(number, lambda side: None)(self)
        self.passes += 1
        for p in self.params:
            p.grad = None
        loss: Tensor = self.model.loss(self.absent[number])  # type: ignore[operator]
        loss.backward()
        if self.raises_in == number:
            raise Raised
        return loss

    def step(self, style: str, before_pass: Any = None) -> None:
        try:
            super().step(style, before_pass)
        except Raised:
            if style == "two calls":
                self.optimizer.abandon()

    def checkpoint(self) -> Any:
        """Through a file. State of parameters that are in no group is dropped first: torch cannot save it."""
        here = [p for g in self.groups for p in g["params"]]
        for state in self.states:
            for p in [p for p in state if not any(p is other for other in here)]:
                del state[p]
        file = io.BytesIO()
        torch.save(self.inner.state_dict(), file)
        file.seek(0)
        content = {"optimizer": torch.load(file)}
        if not self.ours:
            own = self.optimizer
            content["own"] = copy.deepcopy((own.hyper, own.phase, [own.kept.get(p, {}) for p in here]))
        return content

    def load(self, content: Any) -> None:
        self.inner.load_state_dict(content["optimizer"])
        if not self.ours:
            here = [p for g in self.groups for p in g["params"]]
            self.optimizer.hyper, self.optimizer.phase, kept = copy.deepcopy(content["own"])
            self.optimizer.kept = {p: entries for p, entries in zip(here, kept, strict=True) if entries}

    @property
    def states(self) -> list[dict[Any, Any]]:
        return [self.inner.state] if self.ours else [self.inner.state, self.optimizer.kept]

    def forget_scheduler(self) -> None:
        self.scheduler = None


class Lives(RuleBasedStateMachine):
    """All backends and the reference, through one life."""

    @initialize(variant=st.sampled_from(VARIANTS), base=st.sampled_from(BASES_HERE), split=st.booleans())
    def begin(self, variant: str, base: str, split: bool) -> None:
        optimizer, options = BASES[base]
        options = {**options, "lr": min(options["lr"], 0.05)}
        if base == "rmsprop":
            options["centered"] = (
                False  # the square of the mean must not exceed the mean square, which edits may make it
            )
        hyper = {**HYPER[variant]}
        if variant not in ("vasso",):
            hyper["k"] = 2
        if "layer" in variant:
            hyper["layer_filter"] = matrices
        self.variant, self.base, self.wrapped = variant, base, not isinstance(optimizer, str)
        self.recipe = (optimizer, hyper, options)

        def groups(model: nn.Module) -> list[dict[str, Any]]:
            params = [*model.parameters()]
            return [{"params": params[:2]}, {"params": params[2:]}] if split else [{"params": params}]

        self.sides: list[Life] = []
        for backend in BACKENDS:
            model = Bag()
            self.sides.append(Life(model, self.new(groups(model), backend)))
        model = Bag()
        self.sides.append(Life(model, reference(groups(model), variant, optimizer, hyper, options)))

    def new(self, groups: list[dict[str, Any]], backend: str) -> looksam.SharpnessAware:
        optimizer, hyper, options = self.recipe
        cls = looksam.VARIANTS[self.variant]
        return cls(groups, optimizer, backend=backend, **hyper, **ONLY_OURS.get(self.variant, {}), **options)

    @property
    def plain(self) -> Life:
        return self.sides[-1]

    def each(self, change: Callable[[Life], Any]) -> None:
        for side in self.sides:
            change(side)

    def grouped(self) -> list[int]:
        """The numbers of the parameters that are in a group."""
        here = [p for g in self.plain.groups for p in g["params"]]
        return [i for i, p in enumerate(self.plain.params) if any(p is q for q in here)]

    # Steps -----------------------------------------------------------------------------------------------------------

    @rule(style=st.sampled_from(STYLES), number=st.integers(1, 3))
    def steps(self, style: str, number: int) -> None:
        for _ in range(number):
            self.each(lambda side: side.step(style))

    @rule(style=st.sampled_from(STYLES), first=st.sets(AT, max_size=2), second=st.sets(AT, max_size=2))
    def step_with_absent_gradients(self, style: str, first: set[int], second: set[int]) -> None:
        count, always = len(self.plain.params), self.trained()[:1]
        absent = tuple(frozenset(i % count for i in chosen) - set(always) for chosen in (first, second))

        def step(side: Life) -> None:
            side.absent = absent  # type: ignore[assignment]
            side.step(style)
            side.absent = (frozenset(), frozenset())

        self.each(step)

    @rule(
        style=st.sampled_from(STYLES),
        at=st.integers(0, 1),
        what=st.sampled_from([*(f"weights: {name}" for name in moves.MOVES), *(f"state: {x}" for x in CHANGES)]),
        raises=st.booleans(),
    )
    def step_with_a_change_inside(self, style: str, at: int, what: str, raises: bool) -> None:
        """After which the second pass may raise."""
        kind, name = what.split(": ", 1)
        if at == 1 and name in ("other values", "there and back"):
            return  # gone when w is restored
        change = (moves.MOVES if kind == "weights" else CHANGES)[name]

        def step(side: Life) -> None:
            side.raises_in = 1 if raises else None
            side.step(style, {at: change})
            side.raises_in = None

        self.each(step)

    @rule(style=st.sampled_from(STYLES), at=st.integers(0, 1))
    def step_that_raises(self, style: str, at: int) -> None:
        before = [[p.detach().clone() for p in side.params] for side in self.sides]

        def step(side: Life) -> None:
            side.raises_in = at
            side.step(style)
            side.raises_in = None

        sharp = self.plain.optimizer.is_sharp
        self.each(step)
        if at == 0 or sharp:
            for weights, side in zip(before, self.sides, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(weights, side.params, strict=True))

    # State -----------------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from([*CHANGES]))
    def change_state(self, name: str) -> None:
        self.each(CHANGES[name])

    @rule(at=AT, name=st.sampled_from(["q", "m", "exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "step"]))
    def delete_an_entry(self, at: int, name: str) -> None:
        number = at % len(self.plain.params)

        def delete(side: Life) -> None:
            for entries in side.dicts(side.params[number]):
                value = entries.pop(name, None)
                if value is not None and name not in ("q", "m", "momentum_buffer") and (self.wrapped or not side.ours):
                    entries[name] = 0 * value  # which torch's classes would miss

        if name != "momentum_buffer" or self.base in ("sgd", "wrapped sgd"):
            self.each(delete)

    # Weights ---------------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from([*moves.MOVES]))
    def move_weights(self, name: str) -> None:
        self.each(moves.MOVES[name])

    def trained(self) -> list[int]:
        return [i for i in self.grouped() if self.plain.params[i].requires_grad and self.plain.params[i].numel()]

    @rule(at=AT)
    def freeze(self, at: int) -> None:
        number = at % len(self.plain.params)
        if [i for i in self.trained() if i != number]:
            self.each(lambda side: side.params[number].requires_grad_(False))

    @rule()
    def unfreeze(self) -> None:
        self.each(lambda side: [p.requires_grad_(True) for p in side.params])

    # Groups ----------------------------------------------------------------------------------------------------------

    @rule(lr=st.sampled_from([None, 0.02]), frozen=st.booleans())
    def add_group(self, lr: float | None, frozen: bool) -> None:
        def add(side: Life) -> None:
            p = side.model.add()  # type: ignore[operator]
            p.requires_grad_(not frozen)
            side.forget_scheduler()
            own = {} if lr is None else {"lr": lr}
            k = {"k": self.plain.optimizer.hyper[0]["k"]} if "k" in self.recipe[1] else {}
            if side.ours:
                side.optimizer.add_param_group({"params": [p], **own, **k})
            else:
                side.inner.add_param_group({"params": [p], **own})
                side.optimizer.hyper.append({**self.first_hyper(), **k})

        if self.plain.model.made < 12:
            self.each(add)

    def first_hyper(self) -> dict[str, Any]:
        """What the constructor gave."""
        return {**self.recipe[1], **({"max_grad_norm": 1.0} if self.base == "lamb" else {})}

    @rule(at=AT)
    def add_parameter_to_a_group(self, at: int) -> None:
        def add(side: Life) -> None:
            groups = side.groups
            groups[at % len(groups)]["params"].append(side.model.add())  # type: ignore[operator]

        if self.plain.model.made < 12:
            self.each(add)

    @rule(at=AT, with_state=st.booleans())
    def take_a_parameter_out(self, at: int, with_state: bool) -> None:
        here = self.grouped()
        number = here[at % len(here)]
        if not [i for i in self.trained() if i != number]:
            return

        def take(side: Life) -> None:
            p = side.params[number]
            for group in side.groups:
                group["params"] = [q for q in group["params"] if q is not p]
            for state in side.states if with_state else ():
                state.pop(p, None)

        self.each(take)

    @rule(at=AT)
    def put_parameters_back(self, at: int) -> None:
        """Into a group, in place, with the state that they still have."""
        outside = [i for i in range(len(self.plain.params)) if i not in self.grouped()]
        self.each(lambda side: side.groups[at % len(side.groups)]["params"].extend(side.params[i] for i in outside))

    @rule(at=AT)
    def replace_a_parameter(self, at: int) -> None:
        here = self.grouped()
        number = here[at % len(here)]

        def replace(side: Life) -> None:
            name, old = [*side.model.named_parameters()][number]
            new = nn.Parameter(0.9 * old.detach(), requires_grad=old.requires_grad)
            side.model._parameters[name] = new
            for group in side.groups:
                group["params"] = [new if q is old else q for q in group["params"]]
            for state in side.states:
                state.pop(old, None)

        self.each(replace)

    @rule(at=AT)
    def split_a_group(self, at: int) -> None:
        def split(side: Life) -> None:
            side.forget_scheduler()
            number = at % len(side.groups)
            group = side.groups[number]
            side.groups.append({**group, "params": group["params"][1:], "lr": group["lr"] * 0.9})
            group["params"] = group["params"][:1]
            if not side.ours:
                side.optimizer.hyper.append(dict(side.optimizer.hyper[number]))

        self.each(split)

    @rule(how=st.sampled_from(["copies", "reversed", "merged", "one less"]))
    def regroup(self, how: str) -> None:
        first = {p for p in self.plain.groups[0]["params"] if p.requires_grad and p.numel()}
        if how == "one less" and (len(self.plain.groups) < 2 or not first):
            return

        def change(side: Life) -> None:
            side.forget_scheduler()
            lists = [side.inner.param_groups] if side.ours else [side.inner.param_groups, side.optimizer.hyper]
            if how == "copies":
                side.inner.param_groups = [{**g, "params": [*g["params"]]} for g in side.groups]
            elif how == "reversed":
                for each in lists:
                    each.reverse()
            elif how == "merged":
                side.groups[0]["params"] = [p for g in side.groups for p in g["params"]]
                for each in lists:
                    del each[1:]
            else:
                for each in lists:
                    del each[-1]

        self.each(change)

    # Hyper-parameters ------------------------------------------------------------------------------------------------

    @rule(
        at=AT,
        name=st.sampled_from(["lr", "rho", "alpha", "weight_decay", "momentum", "betas", "theta", "eta"]),
        value=st.floats(0, 1, width=16),
    )
    def set_hyper_parameter(self, at: int, name: str, value: float) -> None:
        number = at % len(self.plain.groups)
        of_method = name in self.plain.optimizer.hyper[number]
        if not of_method and name not in self.plain.groups[number]:
            return
        if name == "alpha" and not of_method:
            return  # RMSprop's: under another name in ours where the method has one
        scaled: Any = {
            "lr": 0.05 * value,
            "rho": 0.3 * value,
            "weight_decay": 0.1 * value,
            "momentum": 0.9 * value,
            "betas": (0.9 * value, 0.99),
            "theta": 0.1 + 0.9 * value,
        }.get(name, value)
        if name == "momentum" and value == 0:
            return  # with and without it are different states
        if of_method:
            self.each(lambda side: side.set_hyper(number, **{name: scaled}))
        else:
            self.each(lambda side: side.groups[number].update({name: scaled}))

    @precondition(lambda self: "k" in self.recipe[1])
    @rule(k=st.integers(1, 3))
    def set_period(self, k: int) -> None:
        def change(side: Life) -> None:
            for i in range(len(side.groups)):
                side.set_hyper(i, k=k)

        self.each(change)

    @rule(name=st.sampled_from(["step", "one cycle"]))
    def make_a_scheduler(self, name: str) -> None:
        def make(side: Life) -> None:
            for group in side.groups:
                group.pop("initial_lr", None)
            side.scheduler = (
                lr_scheduler.StepLR(side.inner, 2, 0.8)
                if name == "step"
                else lr_scheduler.OneCycleLR(side.inner, 0.05, total_steps=100, cycle_momentum=False)
            )

        self.each(make)

    @rule()
    def advance_the_scheduler(self) -> None:
        self.each(lambda side: None if side.scheduler is None else side.scheduler.step())

    # Copies and checkpoints ------------------------------------------------------------------------------------------

    @rule(new=st.booleans())
    def save_and_load(self, new: bool) -> None:
        """Into the same optimizer, or into a new one."""

        def change(side: Life) -> None:
            content = side.checkpoint()
            side.forget_scheduler()
            if new and side.ours:
                groups = [{"params": g["params"]} for g in side.groups]
                side.optimizer = self.new(groups, side.optimizer.backend)
            side.load(content)

        self.each(change)

    @rule()
    def save(self) -> None:
        def change(side: Life) -> None:
            shapes = [[p.shape for p in g["params"]] for g in side.groups]
            side.saved = (shapes, side.checkpoint(), [p.detach().clone() for p in side.params])

        self.each(change)

    @rule()
    def go_back(self) -> None:
        """To what was saved, where the groups are alike."""

        def change(side: Life) -> None:
            if side.saved is None:
                return
            shapes, content, weights = side.saved
            if shapes != [[p.shape for p in g["params"]] for g in side.groups] or len(weights) != len(side.params):
                return
            side.forget_scheduler()
            side.load(copy.deepcopy(content))
            with torch.no_grad():
                for p, w in zip(side.params, weights, strict=True):
                    p.copy_(w)

        self.each(change)

    @rule(by_pickle=st.booleans())
    def copy_all(self, by_pickle: bool) -> None:
        def change(side: Life) -> None:
            pair = (side.model, side.optimizer)
            side.model, side.optimizer = pickle.loads(pickle.dumps(pair)) if by_pickle else copy.deepcopy(pair)
            side.forget_scheduler()

        self.each(change)

    # What always holds -----------------------------------------------------------------------------------------------

    @invariant()
    def weights_are_those_of_the_reference(self) -> None:
        for backend, side in zip(BACKENDS, getattr(self, "sides", ()), strict=False):
            for i, (a, b) in enumerate(zip(side.params, self.plain.params, strict=True)):
                assert_close(a.detach(), b.detach(), f"{backend}, parameter {i}")


Lives.TestCase.settings = settings(
    max_examples=2000 if NIGHTLY else 100,
    stateful_step_count=20,
    derandomize=not NIGHTLY,
    deadline=None,
    database=None,
    suppress_health_check=[*HealthCheck],
    phases=[p for p in Phase if NIGHTLY or p is not Phase.shrink],
)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
class TestLives(Lives.TestCase):  # type: ignore[misc, name-defined]
    """Collected by pytest."""
