"""The METHOD grammar of the command line, ``NAME[-K][+BASE]``, and the optimizers it stands for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

import looksam

from .config import TrainConfig


@dataclass(frozen=True)
class Base:
    """A base optimizer with the learning rate and weight decay used when the user gives none."""

    optimizer: type[torch.optim.Optimizer]
    lr: float
    weight_decay: float


BASES: dict[str, Base] = {
    "sgd": Base(torch.optim.SGD, lr=0.05, weight_decay=5e-4),
    "adam": Base(torch.optim.Adam, lr=1e-3, weight_decay=0.0),
    "adamw": Base(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
    "adagrad": Base(torch.optim.Adagrad, lr=0.02, weight_decay=0.0),
    "rmsprop": Base(torch.optim.RMSprop, lr=1e-3, weight_decay=0.0),
    "adadelta": Base(torch.optim.Adadelta, lr=1.0, weight_decay=0.0),
    "lamb": Base(looksam.LAMB, lr=5e-3, weight_decay=0.01),
    "lars": Base(looksam.LARS, lr=5.0, weight_decay=1e-4),
    "lion": Base(looksam.Lion, lr=2e-4, weight_decay=0.1),
}
VARIANTS: dict[str, type[torch.optim.Optimizer]] = dict(looksam.VARIANTS)

_GRAMMAR = re.compile(r"(?P<name>[a-z]\w*)(-(?P<k>\d+))?(\+(?P<base>\w+))?")


@dataclass(frozen=True)
class Method:
    """A parsed METHOD. ``variant`` is None for a plain base optimizer, ``k`` None for the variant's own period."""

    variant: str | None
    base: str
    k: int | None = None

    @property
    def clips(self) -> bool:
        """Whether the optimizer clips by itself: the variants clip the direction they hand to their base."""
        return self.variant is not None or issubclass(BASES[self.base].optimizer, looksam.SharpnessAware)

    def parameters(self) -> frozenset[str]:
        """Names of the keyword arguments that belong to the variant itself, not to its base."""
        if self.variant is None:
            return frozenset()
        return frozenset(inspect.signature(VARIANTS[self.variant]).parameters)


def parse_method(text: str, default_base: str = "sgd") -> Method:
    """Parse ``NAME[-K][+BASE]``; raise ValueError, with the valid names, when it is not one.

    >>> parse_method("looksam-5+lamb")
    Method(variant='looksam', base='lamb', k=5)
    """
    match = _GRAMMAR.fullmatch(text.lower())
    if match is None:
        raise ValueError(f"method {text!r} is not of the form NAME[-K][+BASE], such as looksam-5+lamb")
    name, base = match["name"], match["base"] or default_base
    k = int(match["k"]) if match["k"] else None
    if name not in BASES and name not in VARIANTS:
        raise ValueError(
            f"method {text!r}: unknown name {name!r}; variants are {', '.join(sorted(VARIANTS))}, "
            f"base optimizers are {', '.join(sorted(BASES))}"
        )
    if base not in BASES:
        raise ValueError(f"method {text!r}: unknown base {base!r}; bases are {', '.join(sorted(BASES))}")
    if name in BASES:
        if k is not None or match["base"]:
            raise ValueError(f"method {text!r}: {name} is a base optimizer and takes neither -K nor +BASE")
        return Method(None, name)
    method = Method(name, base, k)
    if k is not None and (k < 1 or "k" not in method.parameters()):
        reason = "K must be at least 1" if k < 1 else f"{name} has no period K"
        raise ValueError(f"method {text!r}: {reason}")
    return method


def canonical_name(text: str, default_base: str = "sgd") -> str:
    """The name under which a method's results are recorded; it states the base unless that is SGD."""
    method = parse_method(text, default_base)
    if method.variant is None:
        return method.base
    period = "" if method.k is None else f"-{method.k}"
    return method.variant + period + ("" if method.base == "sgd" else f"+{method.base}")


def select_options(text: str, options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The part of ``options`` that the method takes. A key ``NAME.option`` is for that variant alone and wins."""
    method = parse_method(text)
    chosen: dict[str, Any] = {}
    for key, value in sorted(options.items(), key=lambda item: "." in item[0]):
        owner, _, option = key.rpartition(".")
        if owner in ("", method.variant) and option in method.parameters():
            chosen[option] = value
    return tuple(sorted(chosen.items()))


def check_options(methods: Iterable[str], options: dict[str, Any]) -> None:
    """Raise ValueError for an option that none of the methods takes: it would be ignored in silence."""
    methods = list(methods)
    for key in options:
        if not any(dict(select_options(m, {key: None})) for m in methods):
            taken = sorted(set().union(*(parse_method(m).parameters() for m in methods)) - {"params", "base_kwargs"})
            raise ValueError(f"no method given takes the option {key!r}; they take: {', '.join(taken) or 'none'}")


def build_optimizer(config: TrainConfig, model: torch.nn.Module, steps: int) -> torch.optim.Optimizer:
    """The optimizer of ``config`` for the parameters of ``model`` in a run of so many steps. Where ``Method.clips`` is false,
    the caller clips.

    The variants also get the model itself: running statistics move in the first pass only.
    """
    method = parse_method(config.method)
    base = BASES[method.base]
    arguments: dict[str, Any] = {
        "lr": base.lr if config.lr is None else config.lr,
        "weight_decay": base.weight_decay if config.weight_decay is None else config.weight_decay,
    }
    if method.base in ("sgd", "lars"):
        arguments["momentum"] = config.momentum
    if config.clip is not None and method.clips:
        arguments["max_grad_norm"] = config.clip
    if method.variant is None:
        return base.optimizer(model.parameters(), **arguments)
    of_the_run = {"total_steps": steps, "seed": config.seed}
    arguments |= {name: value for name, value in of_the_run.items() if name in method.parameters()}
    arguments |= {"backend": config.backend, "model": model, "m_sharpness": config.m_sharpness} | dict(config.options)
    if method.k is not None:
        arguments["k"] = method.k
    return VARIANTS[method.variant](model.parameters(), method.base, **arguments)  # type: ignore[arg-type]
