"""Items 1 and 7: what stands in ``opt.state`` and ``opt.param_groups`` is what the next step reads, and what it writes."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import looksam
from looksam.hyper import FILTERS
from tests.field.support import (
    BASES,
    HYPER,
    MAIN,
    PAIRS,
    TOLERANCE,
    Pair,
    Side,
    network,
    on_backends,
    on_pairs,
    on_styles,
)

Change = Callable[[Side], None]


def in_every_dict(edit: Callable[[dict[str, Any]], None], only: int | None = None) -> Change:
    """``edit`` on the state of every parameter, or of one alone."""

    def change(side: Side) -> None:
        for i, p in enumerate(side.params):
            if only is None or i == only:
                for entries in side.dicts(p):
                    edit(entries)

    return change


def tensors(entries: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in entries.items() if isinstance(x, Tensor)}


def zero_in_place(entries: dict[str, Any]) -> None:
    for x in tensors(entries).values():
        if x.ndim:
            x.zero_()


def zero_by_new_tensors(entries: dict[str, Any]) -> None:
    entries.update({name: torch.zeros_like(x) for name, x in tensors(entries).items() if x.ndim})


def double(entries: dict[str, Any]) -> None:
    entries.update({name: 2 * x for name, x in tensors(entries).items() if x.ndim})


def double_in_place(entries: dict[str, Any]) -> None:
    for x in tensors(entries).values():
        if x.ndim:
            x.mul_(2)


def swap_for_clones(entries: dict[str, Any]) -> None:
    """As an offload to the host and back leaves it."""
    entries.update({name: x.clone() for name, x in tensors(entries).items()})


def swap_and_spoil(entries: dict[str, Any]) -> None:
    """The tensors that were there are used for something else."""
    for name, x in tensors(entries).items():
        entries[name] = x.clone()
        x.fill_(100.0)


def in_another_memory_order(entries: dict[str, Any]) -> None:
    entries.update({name: x.mT.contiguous().mT for name, x in tensors(entries).items() if x.ndim >= 2})


def as_views_of_a_larger_tensor(entries: dict[str, Any]) -> None:
    """As a library that keeps all state in one flat buffer leaves it: at odd addresses, too."""
    for name, x in tensors(entries).items():
        if x.ndim:
            flat = torch.full((x.numel() + 3,), 7.0, dtype=x.dtype)
            entries[name] = flat[1 : 1 + x.numel()].view(x.shape)
            entries[name].copy_(x)


def clear_the_state(side: Side) -> None:
    side.inner.state.clear()
    if not side.ours:
        side.optimizer.kept.clear()


def a_new_state(make: Callable[[dict[Any, Any]], Any], entries: Callable[[dict[str, Any]], Any]) -> Change:
    def change(side: Side) -> None:
        side.inner.state = make({p: entries(state) for p, state in side.inner.state.items()})
        if not side.ours:
            side.optimizer.kept = {p: entries(state) for p, state in side.optimizer.kept.items()}

    return change


def a_new_empty_state(side: Side) -> None:
    side.inner.state = defaultdict(dict)
    if not side.ours:
        side.optimizer.kept = {}


def copied(entries: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(dict(entries))


def delete_the_dict_of_one(side: Side) -> None:
    side.inner.state.pop(side.params[2], None)
    if not side.ours:
        side.optimizer.kept.pop(side.params[2], None)


def empty_dict_for_one(side: Side) -> None:
    delete_the_dict_of_one(side)
    side.inner.state[side.params[2]] = {}


def exchange_two(side: Side) -> None:
    """Of equal shape: the moments follow another parameter."""
    a, b = next((a, b) for a, b in itertools.combinations(side.params, 2) if a.shape == b.shape)
    for state in (side.inner.state, *(() if side.ours else (side.optimizer.kept,))):
        if a in state and b in state:
            state[a], state[b] = state[b], state[a]


CHANGES: dict[str, Change] = {
    "zeroed in place": in_every_dict(zero_in_place),
    "zeroed by new tensors": in_every_dict(zero_by_new_tensors),
    "zeroed for one": in_every_dict(zero_by_new_tensors, only=2),
    "doubled": in_every_dict(double),
    "doubled in place": in_every_dict(double_in_place),
    "clones": in_every_dict(swap_for_clones),
    "clones of one": in_every_dict(swap_for_clones, only=3),
    "clones, old ones spoilt": in_every_dict(swap_and_spoil),
    "memory order": in_every_dict(in_another_memory_order),
    "views": in_every_dict(as_views_of_a_larger_tensor),
    "cleared": clear_the_state,
    "cleared dicts": in_every_dict(dict.clear),
    "cleared dict of one": in_every_dict(dict.clear, only=0),
    "deleted dict of one": delete_the_dict_of_one,
    "empty dict for one": empty_dict_for_one,
    "new state": a_new_state(lambda rows: defaultdict(dict, rows), copied),
    "new state, no defaultdict": a_new_state(dict, copied),
    "new state, same tensors": a_new_state(lambda rows: defaultdict(dict, rows), dict),
    "new empty state": a_new_empty_state,
    "exchanged": exchange_two,
}
KINDS = ("cleared", "clones, old ones spoilt", "zeroed for one", "new state, same tensors")
"""A change of each kind, for the pairs that do not go through all of them."""
MOST = (("looksam", "adamw"), ("looksam", "wrapped adamw"))


def matrix(all_changes: Iterable[str], kinds: Iterable[str]) -> pytest.MarkDecorator:
    """Every change for the pairs of MOST, one of each kind for the others."""
    rows = [(*pair, change) for pair in PAIRS for change in (all_changes if pair in MOST else kinds)]
    return pytest.mark.parametrize(("variant", "base", "change"), rows)


@on_backends
@on_styles
@matrix(CHANGES, KINDS)
def test_item_01_state_changed_between_steps(backend: str, style: str, variant: str, base: str, change: str) -> None:
    """After one step (q is new) and after two (it has been used)."""
    pair = Pair(variant, base, backend, style)
    for number in (1, 2):
        pair.steps(number)
        pair.both(CHANGES[change])
    pair.steps(3)
    pair.assert_equal()


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
@pytest.mark.parametrize("at", [0, 1])
def test_item_01_state_changed_within_a_step(backend: str, style: str, base: str, at: int) -> None:
    """Before the first pass of a sharp step, or between its passes, when the gradients or the weights are not the last."""
    for change in ("zeroed by new tensors", "clones, old ones spoilt", "new state", "views"):
        pair = Pair("looksam", base, backend, style)
        pair.steps(2)
        pair.steps(1, {at: CHANGES[change]})
        pair.steps(2)
        pair.assert_equal()


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
def test_item_01_each_single_entry_deleted(backend: str, style: str, base: str) -> None:
    """It begins anew where it is missing; the others stay."""
    names = {"sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq", "step"], "lamb": ["exp_avg", "exp_avg_sq"]}
    for name in [*names.get(base, []), "q"]:
        pair = Pair("looksam", base, backend, style)
        pair.steps(3)

        def change(side: Side, name: str = name) -> None:
            for entries in side.dicts(side.params[2]):
                fresh = {"exp_avg", "exp_avg_sq"} & {name}
                found = next((key for key in entries if key == name or key.endswith("." + name)), None)
                if found is None:
                    continue
                value = entries.pop(found)
                if not side.ours and fresh:  # torch's own class would miss it
                    entries[name] = torch.zeros_like(value)
                if not side.ours and name == "step":
                    entries[name] = torch.zeros(())

        pair.both(change)
        pair.steps(3)
        pair.assert_equal()


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
@pytest.mark.parametrize("within", [False, True])
def test_item_01_clipping_follows_what_is_done_to_q(backend: str, style: str, base: str, within: bool) -> None:
    """The norm of q is kept beside it, and clipping relies on that. Here every step is clipped."""
    for change in ("zeroed in place", "zeroed for one", "doubled", "doubled in place", "clones, old ones spoilt"):
        pair = Pair("looksam", base, backend, style, hyper={"max_grad_norm": 0.02})
        pair.steps(1)  # a sharp step, which writes q; a reuse step follows
        if not within:
            pair.both(CHANGES[change])
        pair.steps(1, {0: CHANGES[change]} if within else {})
        pair.steps(2)
        pair.assert_equal()


@on_backends
def test_item_01_a_copy_follows_what_was_done_to_q(backend: str) -> None:
    """The original has not seen it: it was copied before the next step."""
    pair = Pair("looksam", "sgd", backend)
    pair.steps(1)
    pair.both(CHANGES["doubled in place"])
    mine = pair.mine
    mine.model, mine.optimizer = copy.deepcopy((mine.model, mine.optimizer))
    pair.steps(2)
    pair.assert_equal()


@on_backends
@on_pairs
def test_item_01_state_dict_has_what_the_steps_wrote(backend: str, variant: str, base: str) -> None:
    """Also after the state was cleared, or exchanged for clones: a checkpoint is never empty and never old."""
    for change in ("clones", "new empty state"):
        pair = Pair(variant, base, backend)
        pair.steps(2)
        pair.both(CHANGES[change])
        pair.steps(2)
        saved = pair.mine.optimizer.state_dict()
        assert len(saved["state"]) == len(pair.mine.params)
        resumed = Pair(variant, base, backend)
        resumed.mine.model.load_state_dict(pair.mine.model.state_dict())
        resumed.mine.optimizer.load_state_dict(copy.deepcopy(saved))
        for _ in range(3):
            pair.mine.step("closure")
            resumed.mine.step("closure")
        for a, b in zip(pair.mine.params, resumed.mine.params, strict=True):
            assert torch.equal(a, b)


@on_backends
@on_styles
@pytest.mark.parametrize("base", ["sgd", "adamw", "wrapped adamw"])
def test_item_01_relora(backend: str, style: str, base: str) -> None:
    """Moments and lr set to zero: nothing moves, whatever came before."""
    pair = Pair("looksam", base, backend, style, weight_decay=0.0)
    pair.steps(4)
    pair.both(in_every_dict(zero_by_new_tensors))
    before = [p.detach().clone() for p in pair.mine.params]
    pair.both(lambda side: side.groups[0].update(lr=0.0))
    pair.steps(4)
    pair.assert_equal()
    for a, b in zip(before, pair.mine.params, strict=True):
        assert torch.equal(a, b)


def cast(dtype: torch.dtype, back: bool = False) -> Change:
    def edit(entries: dict[str, Any]) -> None:
        for name, x in tensors(entries).items():
            if x.ndim:
                entries[name] = x.to(dtype).double() if back else x.to(dtype)

    return in_every_dict(edit)


@on_backends
@on_styles
@pytest.mark.parametrize("base", ["adamw", "sgd", "lamb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_item_01_state_of_another_dtype(backend: str, style: str, base: str, dtype: torch.dtype) -> None:
    """It acts with the values that it has, and stays as it is."""
    pair = Pair("looksam", base, backend, style)
    pair.steps(3)
    cast(dtype)(pair.mine)
    cast(dtype, back=True)(pair.theirs)
    pair.steps(1)
    pair.assert_equal(state=False)
    for p in pair.mine.params:
        assert all(x.dtype == dtype for x in tensors(pair.mine.entries(p)).values() if x.ndim)


@on_backends
@on_styles
@pytest.mark.parametrize("base", ["wrapped sgd", "wrapped adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_item_01_state_of_another_dtype_in_a_wrapped_class(
    backend: str, style: str, base: str, dtype: torch.dtype
) -> None:
    """As in the class alone, which may refuse it; the weights are then as before."""
    pair = Pair("sam", base, backend, style)
    pair.steps(3)
    pair.both(cast(dtype))
    try:
        pair.theirs.step(style)
    except RuntimeError:
        before = [p.detach().clone() for p in pair.mine.params]
        with pytest.raises(RuntimeError):
            pair.mine.step(style)
        for a, b in zip(before, pair.mine.params, strict=True):
            assert torch.equal(a, b)
        return
    pair.mine.step(style)
    pair.assert_equal()


def test_the_tolerance() -> None:
    """Gradients that are moved by four units in the last place move no weight by more than a tenth of it."""
    for variant, base in PAIRS:
        exact, moved = Pair(variant, base, "reference"), Pair(variant, base, "reference")
        moved.theirs.jitter = 4 * torch.finfo(torch.float64).eps
        for side in (exact.theirs, moved.theirs):
            for _ in range(12):
                side.step("closure")
        columns = [*zip(exact.theirs.params, moved.theirs.params, strict=True)]
        assert any(not torch.equal(a, b) for a, b in columns)
        for a, b in columns:
            torch.testing.assert_close(a, b, rtol=TOLERANCE / 10, atol=TOLERANCE / 10)


# Groups --------------------------------------------------------------------------------------------------------------


def halves(model: torch.nn.Module) -> list[dict[str, Any]]:
    params = [*model.parameters()]
    return [{"params": params[:1]}, {"params": params[1:3], "lr": 0.05}, {"params": params[3:]}]


def groups_as_copies(side: Side) -> None:
    side.inner.param_groups = [dict(g) for g in side.groups]
    side.groups[0]["lr"] *= 0.5


def one_group_as_a_copy(side: Side) -> None:
    side.groups[1] = {**side.groups[1], "lr": 0.2}


def groups_reversed(side: Side) -> None:
    side.groups.reverse()
    if not side.ours:
        side.optimizer.hyper.reverse()


def one_group_less(side: Side) -> None:
    del side.groups[1]
    if not side.ours:
        del side.optimizer.hyper[1]


def one_group_less_by_assignment(side: Side) -> None:
    side.inner.param_groups = side.groups[:2]
    if not side.ours:
        side.optimizer.hyper = side.optimizer.hyper[:2]


def parameter_removed_in_place(side: Side) -> None:
    del side.groups[1]["params"][0]


def parameters_assigned(side: Side) -> None:
    side.groups[1]["params"] = side.groups[1]["params"][1:]


def parameters_reversed(side: Side) -> None:
    side.groups[1]["params"].reverse()


def parameter_moved_to_another_group(side: Side) -> None:
    side.groups[0]["params"].append(side.groups[1]["params"].pop())


def parameter_replaced(side: Side) -> None:
    """As a pruned or grown layer leaves it; its state begins anew."""
    old = side.groups[1]["params"][0]
    new = torch.nn.Parameter(old.detach() * 0.5)
    side.groups[1]["params"][0] = new
    side.inner.state.pop(old, None)
    if not side.ours:
        side.optimizer.kept.pop(old, None)
    for module in side.model.modules():
        for name, p in [*module._parameters.items()]:
            if p is old:
                setattr(module, name, new)


def group_split_by_a_copy(side: Side) -> None:
    """The copy has everything that the group has, but for half of its parameters."""
    group = side.groups[1]
    side.groups.append({**group, "params": group["params"][1:]})
    group["params"] = group["params"][:1]
    if not side.ours:
        side.optimizer.hyper.append(dict(side.optimizer.hyper[1]))


def all_in_one_group(side: Side) -> None:
    side.groups[0]["params"] = [p for g in side.groups for p in g["params"]]
    del side.groups[1:]
    if not side.ours:
        del side.optimizer.hyper[1:]


def last_group_put_back(side: Side) -> None:
    """Taken out for a step, and back with its state."""
    group = side.groups.pop()
    hyper = None if side.ours else side.optimizer.hyper.pop()
    side.step("closure")
    side.groups.append(group)
    if hyper is not None:
        side.optimizer.hyper.append(hyper)


REGROUPED: dict[str, Change] = {
    "copies": groups_as_copies,
    "copy of one": one_group_as_a_copy,
    "reversed": groups_reversed,
    "one less": one_group_less,
    "one less by assignment": one_group_less_by_assignment,
    "parameter removed": parameter_removed_in_place,
    "parameters assigned": parameters_assigned,
    "parameters reversed": parameters_reversed,
    "parameter moved": parameter_moved_to_another_group,
    "parameter replaced": parameter_replaced,
    "split": group_split_by_a_copy,
    "all in one": all_in_one_group,
    "put back": last_group_put_back,
}


@on_backends
@on_styles
@matrix(REGROUPED, ("copies", "parameter moved", "parameter replaced"))
def test_item_01_groups_changed_between_steps(backend: str, style: str, variant: str, base: str, change: str) -> None:
    pair = Pair(variant, base, backend, style, groups=halves)
    pair.steps(3)
    pair.both(REGROUPED[change])
    pair.steps(3)
    pair.assert_equal()


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
@pytest.mark.parametrize(
    ("variant", "change"),
    [
        *(("looksam", change) for change in ("parameter moved", "parameters reversed", "reversed", "all in one")),
        *(("sam", change) for change in ("one less", "parameter removed", "parameter replaced")),
    ],
)
def test_item_01_parameters_change_groups_between_the_passes(
    backend: str, style: str, base: str, variant: str, change: str
) -> None:
    """One that goes is where it was before the step; the others come back and are updated."""
    pair = Pair(variant, base, backend, style, groups=halves)
    pair.steps(2)
    leaving = [side.groups[1]["params"][0] for side in pair]
    before = leaving[0].detach().clone()
    pair.steps(1, {1: REGROUPED[change]})
    if variant == "sam":
        assert torch.equal(leaving[0], before)
    pair.steps(2)
    pair.assert_equal()


@on_backends
@pytest.mark.parametrize("base", MAIN)
def test_item_01_a_group_that_comes_late_is_in_step(backend: str, base: str) -> None:
    """Whichever group is the first one, the cycle goes on."""
    pair = Pair("looksam", base, backend, hyper={"k": 3})
    pair.steps(1)

    def add(side: Side) -> None:
        p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        (side.optimizer if side.ours else side.inner).add_param_group({"params": [p]})
        if not side.ours:
            side.optimizer.hyper.append(dict(side.optimizer.hyper[0]))

    pair.both(add)
    pair.both(groups_reversed)
    pair.steps(4)
    pair.assert_equal()


FILTERED = {"layersam": "layer_filter", "looklayersam": "layer_filter", "asam": "adaptive_filter"}


@on_backends
@pytest.mark.parametrize("variant", FILTERED)
@pytest.mark.parametrize(
    "change", ["split", "parameter moved", "parameters reversed", "parameter removed", "parameter replaced", "reversed"]
)
def test_item_01_a_filter_goes_with_its_parameters(backend: str, variant: str, change: str) -> None:
    """What the filter said of a parameter holds for it wherever it goes, and the filter is asked about new ones."""

    def accepts(p: Tensor) -> bool:
        return p.ndim == (1 if variant == "asam" else 2)  # not what is said without a filter

    pair = Pair(variant, "sgd", backend, groups=halves, hyper={FILTERED[variant]: accepts})
    pair.steps(3)
    pair.both(REGROUPED[change])
    pair.steps(3)
    pair.assert_equal()


@on_backends
@pytest.mark.parametrize("variant", FILTERED)
@pytest.mark.parametrize("change", ["parameter moved", "split", "all in one", "reversed"])
def test_item_01_flags_that_were_set_by_hand_go_with_their_parameters(backend: str, variant: str, change: str) -> None:
    """As those of a checkpoint do, whose function may be another."""
    pair = Pair(variant, "sgd", backend, groups=halves)
    pair.steps(1)
    name, (first, second) = FILTERED[variant], pair.theirs.groups[1]["params"]
    pair.mine.groups[1][name] = [False, True]
    for hyper in pair.theirs.optimizer.hyper:
        hyper[name] = lambda p: p is second or (p is not first and FILTERS[name](p))
    pair.steps(1)
    pair.both(REGROUPED[change])
    pair.steps(3)
    pair.assert_equal()


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
def test_item_01_scheduler_and_groups_meet_after_a_replacement(backend: str, style: str, base: str) -> None:
    """What a scheduler writes into the new groups acts in the next step."""
    pair = Pair("looksam", base, backend, style, groups=halves)
    pair.steps(1)
    pair.both(groups_as_copies)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(side.inner, 0.7) for side in pair]
    for _ in range(4):
        pair.steps(1)
        for scheduler in schedulers:
            scheduler.step()
    pair.assert_equal()


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
def test_item_01_groups_changed_within_a_step(backend: str, style: str, base: str) -> None:
    """Learning rates written between the passes act in this step; whole lists of groups may be exchanged there, too."""
    pair = Pair("looksam", base, backend, style, groups=halves)
    pair.steps(2)
    pair.steps(1, {1: groups_as_copies})
    pair.steps(2)
    pair.assert_equal()


# The same parameter twice ---------------------------------------------------------------------------------------------


@on_backends
@on_styles
@pytest.mark.parametrize("base", MAIN)
@pytest.mark.parametrize("variant", ["sam", "looksam", "layersam"])
def test_item_07_the_same_parameter_twice(backend: str, style: str, base: str, variant: str) -> None:
    """torch warns; it is perturbed once and its bits restored: with lr = 0 no weight moves."""
    model = network()
    params = [*model.parameters()]
    optimizer, options = BASES[base]
    options = {**options, "lr": 0.0}
    with pytest.warns(UserWarning, match="duplicate"):
        mine = looksam.VARIANTS[variant]([*params, params[0]], optimizer, backend=backend, **HYPER[variant], **options)
    side = Side(model, mine)
    before = [p.detach().clone() for p in params]
    perturbed: list[Tensor] = []

    def see(side: Side) -> None:
        perturbed.extend(p.detach().clone() for p in side.params)

    side.step(style, {1: see})
    side.step(style)
    for a, b in zip(before, params, strict=True):
        assert torch.equal(a, b)
    e = [a - b for a, b in zip(perturbed, before, strict=True)]
    assert sum(float((x * x).sum()) for x in e) ** 0.5 == pytest.approx(HYPER[variant]["rho"], rel=1e-6)
