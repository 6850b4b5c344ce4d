"""What makes an experiment: a design says what runs, what is measured and which figures show it; all else is shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import click

from .document import Block

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .records import Experiment
    from .train import Trainer

Values = Mapping[str, Any]
Figures = dict[str, tuple[str, "Figure"]]
"""Title -> name of the files without suffix, figure."""
SCALES = ("smoke", "laptop", "gpu")


class Watcher(Protocol):
    """Measures while a model trains."""

    def after_pass(self, trainer: Trainer) -> None:
        """The gradients of a pass are in ``.grad``."""

    def after_step(self, trainer: Trainer) -> None:
        """A step is complete, the learning rate still its own."""

    def after_epoch(self, trainer: Trainer) -> Iterable[dict[str, Any]]:
        """What was measured since the last epoch, as values that JSON has."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _no_sections(experiment: Experiment) -> list[Block]:
    return []


def _as_given(methods: Sequence[str], values: Values) -> list[str]:
    return list(methods)


@dataclass(frozen=True)
class Design:
    """An experiment.

    ``scales``: for each of SCALES the values of the options that the user leaves out, ``methods`` among them.
    ``options``: click's decorators of the options that this experiment alone has; those named in ``settings`` are what
    ``measure`` and ``watch`` get. ``expand``: from the methods and all values, the methods that are trained.
    ``measure`` is called when a run is over, ``watch`` when it begins; what they yield becomes lines of the results.
    ``figures`` and ``sections`` are made from the results alone.
    """

    name: str
    summary: str
    scales: Mapping[str, Values]
    figures: Callable[[Experiment], Figures]
    sections: Callable[[Experiment], list[Block]] = _no_sections
    options: Sequence[Callable[[Any], Any]] = ()
    settings: Sequence[str] = ()
    expand: Callable[[Sequence[str], Values], list[str]] = _as_given
    measure: Callable[[Trainer, Values], Iterable[dict[str, Any]]] | None = None
    watch: Callable[[Values], Watcher] | None = None


def design_of(name: str) -> Design:
    """The design of the command ``name``. Raises KeyError if there is none."""
    module = f"{__package__}.experiments.{name.replace('-', '_')}"
    try:
        design: Design = import_module(module).DESIGN
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise KeyError(name) from None
    return design


def numbers(text: str, kind: Callable[[str], Any] = float) -> tuple[Any, ...]:
    """``"0.1,0.2"`` as numbers. Raises click.BadParameter."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,2,5") from None


class Numbers(click.ParamType):  # type: ignore[type-arg]  # it is generic in some releases only
    """Numbers with commas between them, each at least ``low``."""

    name = "numbers"

    def __init__(self, kind: Callable[[str], Any] = float, low: float = 0) -> None:
        self.kind, self.low = kind, low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        found = value if isinstance(value, tuple) else numbers(value, self.kind)
        if not all(self.low <= number < float("inf") for number in found):
            self.fail(f"{value} holds a number below {self.low:g} or no finite one.", param, ctx)
        return found
