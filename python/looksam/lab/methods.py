"""The METHOD grammar of the command line, ``NAME[-K][+BASE][:OPTION=VALUE,...]``, and the optimizers it stands for."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import looksam
from looksam.bases import check_arguments
from looksam.plans import PLAIN, Variant
from looksam_kernels import updates

from .augment import AUGMENTATIONS
from .config import TrainConfig
from .controls import RandomReuse


@dataclass(frozen=True)
class Base:
    """A base optimizer with the learning rate and weight decay used when the user gives none."""

    optimizer: type[torch.optim.Optimizer]
    lr: float
    weight_decay: float


def _by_itself(name: Any) -> type[torch.optim.Optimizer]:
    """A base that torch.optim does not have, as an optimizer that takes its options."""

    class ByItself(looksam.SharpnessAware):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, name, Variant(sharp=PLAIN, between=PLAIN), {}, base_kwargs=options)

    params = inspect.signature(ByItself).parameters["params"]
    clipping = inspect.Parameter("max_grad_norm", inspect.Parameter.KEYWORD_ONLY, default=FUSED[name].max_grad_norm)
    options = [
        x.replace(kind=x.KEYWORD_ONLY) for x in inspect.signature(FUSED[name].options or dict).parameters.values()
    ]
    ByItself.__signature__ = inspect.Signature([params, *options, clipping])  # type: ignore[attr-defined]
    return ByItself


FUSED = {name: row for name, row in updates.BASES.items() if row.options is not None}
BASES: dict[str, Base] = {
    name: Base(row.options if isinstance(row.options, type) else _by_itself(name), *row.usual)
    for name, row in FUSED.items()
}
VARIANTS: dict[str, type[torch.optim.Optimizer]] = {**looksam.VARIANTS, "looksam_random": RandomReuse}

RUN_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "batch_size": lambda value: _is_number(value) and isinstance(value, int) and value >= 1,
    "warmup": lambda value: _is_number(value) and value >= 0,
    "rho_warmup": lambda value: _is_number(value) and value >= 0,
    "augment": lambda value: value in AUGMENTATIONS,
    "mixup": lambda value: _is_number(value) and value >= 0,
    "adversarial": lambda value: _is_number(value) and 0 <= value < 1,
    "weights": lambda value: isinstance(value, str),
}
"""Options of the training, not of an optimizer, that a method may have for itself -> whether a value is one."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


FORM = "NAME[-K][+BASE][:OPTION=VALUE,...]"
_GRAMMAR = re.compile(r"(?P<name>[a-z]\w*)(-(?P<k>\d+))?(\+(?P<base>\w+))?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_NOT_OPTIONS = {
    "self",
    "params",
    "base_optimizer",
    "backend",
    "base_kwargs",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
}


_KEEPING_Q = (looksam.LookSAM, looksam.LookLayerSAM, looksam.AELookSAM)


def arguments_of(cls: type) -> frozenset[str]:
    """The keyword arguments of a class that can be options here; of those that keep a q its dtype, too."""
    of_q = {"q_dtype"} if issubclass(cls, _KEEPING_Q) else set()
    return (frozenset(inspect.signature(cls).parameters) | of_q) - _NOT_OPTIONS


VARIANT_OPTIONS = frozenset[str]().union(*map(arguments_of, VARIANTS.values()))


@dataclass(frozen=True)
class Method:
    """A parsed METHOD. ``variant`` is None for a plain base optimizer, ``k`` None for the variant's own period;
    ``settings`` are options of this method alone."""

    variant: str | None
    base: str
    k: int | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.variant or self.base

    @property
    def period(self) -> int:
        """In every how many steps there is a sharp one: 1 for those without a period."""
        if self.k is not None or self.variant is None:
            return self.k or 1
        given: int = dict(self.settings).get("k") or self.default("k") or 1
        return given

    def default(self, option: str) -> Any:
        """Of the variant's constructor; None if it has no such argument."""
        parameter = None if self.variant is None else inspect.signature(VARIANTS[self.variant]).parameters.get(option)
        return None if parameter is None else parameter.default

    @property
    def of_the_run(self) -> dict[str, Any]:
        """The settings that are options of the training."""
        return {name: value for name, value in self.settings if name in RUN_OPTIONS}

    @property
    def clips(self) -> bool:
        """Whether the optimizer clips by itself: the variants clip the direction they hand to their base."""
        return self.variant is not None or issubclass(BASES[self.base].optimizer, looksam.SharpnessAware)

    def parameters(self) -> frozenset[str]:
        """Names of the keyword arguments that belong to the variant itself, not to its base."""
        return frozenset() if self.variant is None else arguments_of(VARIANTS[self.variant])

    def base_parameters(self) -> frozenset[str]:
        """Those of the base: the variant's own hide what has their name."""
        return arguments_of(BASES[self.base].optimizer) - self.parameters()

    def takes(self, option: str, by_name: bool) -> bool:
        """``by_name``: the user gives the option to this method by name. Else a variant's option never means the base's
        of that name: Adadelta has a ``rho``, RMSprop an ``alpha``. A period in the method's name leaves no option ``k``."""
        if option == "k" and self.k is not None:
            return False
        return option in self.parameters() or (
            option in self.base_parameters() and (by_name or option not in VARIANT_OPTIONS)
        )


def parse_value(text: str) -> Any:
    """A JSON or Python literal where it is one, else the text; lists become tuples. ValueError for NaN and infinity."""
    value: Any = text
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            value = parse(text)
            break
    parts = value if isinstance(value, (list, tuple)) else [value]
    if any(not math.isfinite(part) for part in parts if isinstance(part, float)) or _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    return tuple(value) if isinstance(value, list) else value


def parse_settings(text: str) -> tuple[tuple[str, Any], ...]:
    """``a=1,b=[2,3]`` as sorted pairs. ValueError if it is not of that form."""
    pairs: dict[str, Any] = {}
    for setting in re.split(r",(?![^\[(]*[\])])", text):
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier() or not value:
            raise ValueError(f"{setting!r} is not of the form OPTION=VALUE")
        if name in pairs:
            raise ValueError(f"{name} is given twice")
        pairs[name] = parse_value(value)
    return tuple(sorted(pairs.items()))


def parse_method(text: str, default_base: str = "sgd") -> Method:
    """Parse ``NAME[-K][+BASE][:OPTION=VALUE,...]``; raise ValueError, with what is valid, when it is not one.

    >>> parse_method("looksam-5+lamb:rho=0.1")
    Method(variant='looksam', base='lamb', k=5, settings=(('rho', 0.1),))
    """
    head, colon, tail = text.partition(":")
    match = _GRAMMAR.fullmatch(head.lower())
    if match is None:
        raise ValueError(f"method {text!r} is not of the form {FORM}, such as looksam-5+lamb:rho=0.1")
    name, base = match["name"], match["base"] or default_base
    k = int(match["k"]) if match["k"] else None
    if name not in BASES and name not in VARIANTS:
        raise ValueError(
            f"method {text!r}: unknown name {name!r}; variants are {', '.join(sorted(VARIANTS))}, "
            f"base optimizers are {', '.join(sorted(BASES))}"
        )
    if base not in BASES:
        raise ValueError(f"method {text!r}: unknown base {base!r}; bases are {', '.join(sorted(BASES))}")
    if name in BASES and (k is not None or match["base"]):
        raise ValueError(f"method {text!r}: {name} is a base optimizer and takes neither -K nor +BASE")
    try:
        settings = parse_settings(tail) if colon else ()
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from None
    method = Method(None, name, None, settings) if name in BASES else Method(name, base, k, settings)
    works_over = getattr(VARIANTS.get(name), "bases", None)
    if works_over is not None and base not in works_over:
        raise ValueError(f"method {text!r}: {name} works over {', '.join(works_over)}, not over {base}")
    if k is not None and (k < 1 or "k" not in method.parameters()):
        reason = "K must be at least 1" if k < 1 else f"{name} has no period K"
        raise ValueError(f"method {text!r}: {reason}")
    for option, value in settings:
        if option in RUN_OPTIONS:
            if not RUN_OPTIONS[option](value):
                raise ValueError(f"method {text!r}: {option}={value} is not possible")
        elif not method.takes(option, by_name=True):
            raise ValueError(
                f"method {text!r}: {name} takes no option {option!r}; it takes {', '.join(_options(method))}"
            )
    return method


def _options(method: Method) -> list[str]:
    own = method.parameters() | method.base_parameters() | RUN_OPTIONS.keys()
    return sorted(own - ({"k"} if method.k is not None else set()))


def canonical_name(text: str, default_base: str = "sgd") -> str:
    """The name under which a method's results are recorded; it states the base unless that is SGD."""
    method = parse_method(text, default_base)
    period = "" if method.k is None else f"-{method.k}"
    base = "" if method.variant is None or method.base == "sgd" else f"+{method.base}"
    values = [
        f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for name, value in method.settings
    ]
    return method.name + period + base + (":" if values else "") + ",".join(values)


def select_options(text: str, options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The part of ``options`` that the method takes, and its own settings. A key ``NAME.option`` is for the variant or
    base of that name alone and wins over ``option``; the method's own settings win over both."""
    method = parse_method(text)
    chosen: dict[str, Any] = {}
    for key, value in sorted(options.items(), key=lambda item: "." in item[0]):
        owner, dot, option = key.rpartition(".")
        if owner in ("", method.name) and method.takes(option, by_name=bool(dot)):
            chosen[option] = value
    own = {name: value for name, value in method.settings if name not in RUN_OPTIONS}
    return tuple(sorted((chosen | own).items()))


def with_settings(text: str, settings: dict[str, Any]) -> str:
    """The canonical name of a method with more settings."""
    added = ",".join(f"{option}={value}" for option, value in settings.items())
    return canonical_name(f"{text}{',' if ':' in text else ':'}{added}" if added else text)


def with_period(text: str, k: int) -> str:
    """The method, which names no period, with period ``k``; 1 is left out."""
    head, colon, tail = text.partition(":")
    name, plus, base = head.partition("+")
    return canonical_name(f"{name}{f'-{k}' if k > 1 else ''}{plus}{base}{colon}{tail}")


def check_options(methods: Iterable[str], options: dict[str, Any]) -> None:
    """Raise ValueError for an option that none of the methods takes: it would be ignored in silence."""
    parsed = [parse_method(method) for method in methods]
    for key in options:
        owner, dot, option = key.rpartition(".")
        if not any(owner in ("", m.name) and m.takes(option, by_name=bool(dot)) for m in parsed):
            taken = sorted(set().union(*map(_options, parsed)))
            raise ValueError(f"no method given takes the option {key!r}; they take: {', '.join(taken)}")


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
        arguments |= dict(config.options)
        check_arguments(method.base, arguments, method.base)  # torch's own classes take a nesterov="no"
        return base.optimizer(model.parameters(), **arguments)
    of_the_run = {"total_steps": steps, "seed": config.seed}
    arguments |= {name: value for name, value in of_the_run.items() if name in method.parameters()}
    arguments |= {"backend": config.backend, "model": model, "m_sharpness": config.m_sharpness} | dict(config.options)
    if method.k is not None:
        arguments["k"] = method.k
    return VARIANTS[method.variant](model.parameters(), method.base, **arguments)  # type: ignore[arg-type]


def values_used(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The hyper-parameters that an optimizer steps with, of those that its users may choose."""
    group = optimizer.param_groups[0]
    plain = (bool, int, float, str, list, tuple, type(None))
    left_out = {*_NOT_OPTIONS, "phase", "train_mode"}
    return {name: x for name, x in sorted(group.items()) if name not in left_out and isinstance(x, plain)}
