"""Loading a checkpoint without rounding it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence, Set
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from looksam.hyper import FILTERS, RANGES
from looksam.names import inner, outer
from looksam_kernels.numbers import scalar_dtype

StateDict = dict[str, Any]


def load_exactly(
    optimizer: Optimizer,
    load: Callable[[StateDict], None],
    state_dict: StateDict,
    moves: bool,
    translate: Callable[[StateDict], StateDict],
) -> StateDict:
    """``load(state_dict)``, after which every tensor has the dtype that it was saved with.

    Torch casts state to the parameter's dtype, which would round the float32 state of low-precision parameters.

    Args:
        load: torch's own ``load_state_dict``.
        translate: of what the user's hooks leave of the given one, what is loaded.
        moves: bring all tensors to the parameter's device; torch leaves ``step`` where it was saved.

    Returns:
        What was loaded.
    """
    final: StateDict = {}

    def capture(_: Optimizer, given: StateDict) -> StateDict:
        final.update(translate(given))
        return final

    handle = optimizer.register_load_state_dict_pre_hook(capture)
    try:
        load(state_dict)
    finally:
        handle.remove()
    ids = chain.from_iterable(g["params"] for g in final["param_groups"])
    params = chain.from_iterable(g["params"] for g in optimizer.param_groups)
    for key, p in zip(ids, params, strict=True):
        for name, value in final["state"].get(key, {}).items():
            mine = optimizer.state[p].get(name)
            if isinstance(value, Tensor) and isinstance(mine, Tensor) and mine.dtype != (kept := _kept(value, p)):
                optimizer.state[p][name] = mine = value.to(kept).to(p.device, copy=True)
            if moves and isinstance(mine, Tensor):
                optimizer.state[p][name] = mine.to(p.device)
    return final


def from_another_variant(
    given: StateDict,
    groups: list[dict[str, Any]],
    owner: str,
    in_groups: frozenset[str],
    in_state: frozenset[str],
    mine: Sequence[frozenset[str]],
    known: Collection[frozenset[str]],
) -> StateDict:
    """A checkpoint of another variant, as one that this optimizer loads: the base's hyper-parameters and state are the
    checkpoint's; the variant's own, and the place in the cycle, stay as they are in ``groups``. One of the same variant
    as it is.

    Args:
        owner: this optimizer's class.
        in_groups, in_state: the names that are the variant's.
        mine: those of :data:`HYPER` that this variant's groups have, or had; see :func:`generations`.
        known: the same of every variant.
    """
    base = groups[0].keys() - in_groups
    others = [names - base for names in known]
    same = all("phase" not in g or _is_of(mine, _of_variant(g, base), others) for g in given["param_groups"])
    if same and not _rests_elsewhere(given, in_state):
        return given
    if len(given["param_groups"]) != len(groups):
        return given  # torch has the error
    warnings.warn(
        f"the checkpoint is of another variant than {owner}, which keeps its own hyper-parameters and begins its cycle anew; "
        "those of the base, and its state, are taken over",
        stacklevel=5,
    )
    return {
        **given,
        "param_groups": [
            {**_of_base(theirs, base, in_groups), **{name: own[name] for name in in_groups if name in own}}
            for theirs, own in zip(given["param_groups"], groups, strict=True)
        ],
        "state": {key: _state_of_base(state, in_state) for key, state in given["state"].items()},
    }


def _rests_elsewhere(given: StateDict, in_state: Collection[str]) -> bool:
    """Are the weights perturbed along a column that this variant does not have?"""
    states = [state for state in given["state"].values() if isinstance(state, dict)]
    at_rest = any("train_mode" in group for group in given["param_groups"])
    return at_rest and any(name in SCALES and name not in in_state for state in states for name in state)


def generations(variant: type, names: Set[str]) -> list[frozenset[str]]:
    """The names by which the groups of a class differ from those of others, as its checkpoints have them: those of now,
    then those of before :data:`ADDED`, the newest first."""
    had = [frozenset(names & HYPER)]
    for added in reversed(ADDED):
        new = chain.from_iterable(added.get(cls.__name__, ()) for cls in variant.__mro__)
        had.append(had[-1] - frozenset(new))
    return list(dict.fromkeys(had))


def _is_of(variant: Sequence[Set[str]], found: Set[str], others: Collection[Set[str]]) -> bool:
    """A wrapped class, or the user, may have put names into the groups that other variants have: the variant is the largest
    that has all its names there."""
    own = next((names for names in variant if names <= found), None)
    return own is not None and not any(own < other <= found for other in others)


def _of_variant(group: dict[str, Any], base: Collection[str]) -> set[str]:
    return {name for name in HYPER if name in group and name not in base}


def _of_base(group: dict[str, Any], base: Collection[str], in_groups: Collection[str]) -> dict[str, Any]:
    """What is not the other variant's, under the names of this one."""
    found = {name: value for name, value in group.items() if name in base or name not in HYPER | {"phase", "q_dtype"}}
    for name in (inner(x) for x in {*base, *(x for x in group if inner(x) != x)}):
        for given in (outer(name, (name,)), name):
            if given in group and outer(name, in_groups) in base:
                found.pop(given, None)
                found[outer(name, in_groups)] = group[given]
                break
    return found


def _state_of_base(state: Any, in_state: Collection[str]) -> Any:
    if not isinstance(state, dict):
        return state
    theirs = {name for name in STATE if name in state and name not in in_state}
    return {outer(inner(name), in_state): x for name, x in state.items() if name not in theirs | set(in_state)}


HYPER = {*RANGES, *FILTERS, "draws", "mu", "var", "t", "train_mode"} - {
    "max_grad_norm",
    "perturb_filter",
    "nonfinite",
    "q_dtype",
    "rounding",
    "rounding_seed",
}
"""The names by which the groups of variants differ. (Those with a q have a q_dtype, which older checkpoints lack.)"""
ADDED: list[dict[str, tuple[str, ...]]] = [
    dict.fromkeys(("LookSAM", "SSAM", "GSAM", "WSAM", "ESAM"), ("adaptive", "eta")),
    dict.fromkeys(("SAM", "LookSAM", "SSAM", "GSAM", "WSAM", "ESAM"), ("adaptive_filter",))
    | {"FriendlySAM": ("adaptive", "eta", "adaptive_filter"), "SAMPa": ("previous_batch", "sgd_step")},
    dict.fromkeys(("SAM", "LookSAM"), ("normalization", "strength")),
    dict.fromkeys(("SAM", "LookSAM", "SSAM", "GSAM", "WSAM", "ESAM", "FriendlySAM"), ("precondition",)),
]
"""The hyper-parameters that classes got after their first release, one after the other: older checkpoints lack them."""
SCALES = ("y_scale", "momentum_buffer_scale", "exp_avg_scale")
"""How far along a column the weights rest."""
STATE = ("q", "q_norm_sq", "m", "y", *SCALES)
"""What variants keep for each parameter."""


def _kept(value: Tensor, p: Tensor) -> torch.dtype:
    """The dtype that was saved, where the parameter's device has it."""
    return scalar_dtype(p.device) if value.dtype == torch.float64 else value.dtype
