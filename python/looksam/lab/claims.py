"""What an experiment shows, in sentences made from its own numbers and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from scipy.special import stdtrit

from .methods import parse_method
from .records import Experiment, Summary, mean_and_error, summarize

CONFIDENCE = 0.95
SAME_PERTURBATION = {"looksam": "sam", "aesam": "sam", "aelooksam": "sam", "looklayersam": "layersam"}
"""A variant that saves passes -> the one whose steps it saves."""


@dataclass(frozen=True)
class Difference:
    """Of two methods over the same seeds: the mean and its confidence interval (Student's t), in points."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} points ({100 * CONFIDENCE:.0f} % interval {self.low:+.1f} to {self.high:+.1f})"


def difference_of(values: list[float]) -> Difference:
    """The mean of ``values``, one of each seed, with its interval; without bounds for fewer than two."""
    mean, error = mean_and_error(values)
    if math.isnan(error):
        return Difference(mean, -math.inf, math.inf)
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error
    return Difference(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Contender:
    """A method of the experiment: its line in the table and the final accuracy (%) of each seed."""

    summary: Summary
    accuracy: Mapping[int, float]

    @property
    def name(self) -> str:
        return self.summary.method

    @property
    def level(self) -> str:
        """Accuracy ± standard error, and what it costs."""
        text = f"{self.summary.accuracy:.1f} ± {self.summary.accuracy_error:.1f} %"
        return f"{text} at {self.summary.passes_per_step:.2f} passes a step"

    def minus(self, *others: Contender) -> Difference:
        """From the mean of the others, seed by seed."""
        return difference_of(
            [
                self.accuracy[seed] - sum(other.accuracy[seed] for other in others) / len(others)
                for seed in self.accuracy
                if all(seed in other.accuracy for other in others)
            ]
        )


def claims(experiment: Experiment) -> list[str]:
    """Of each sharpness-aware method beside each row of its base: does it gain, and do the methods that save its passes
    keep that gain? One sentence each, which begins with "Not shown" where the numbers do not show it.

    Shown means that the 95 % interval of the paired differences over the seeds says so.
    """
    if experiment.header["config"]["data"].get("holdout"):
        return []  # a tuning chooses and shows nothing
    if len({parse_method(method).variant is None for method in experiment.contenders}) < 2:
        return []  # nothing to compare with
    if len(experiment.header["seeds"]) < 2:
        return ["Not shown: anything, by a single seed; give --seeds 4 or more."]
    found = (contender(experiment, method) for method in experiment.contenders)
    return list(_sentences([c for c in found if c is not None]))


def contender(experiment: Experiment, method: str) -> Contender | None:
    """None if fewer than two of its runs finished."""
    summary = summarize(experiment, method)
    if summary is None or summary.finished < 2:
        return None
    return Contender(summary, {run.seed: 100 * run.epochs[-1].test_accuracy for run in experiment.finished(method)})


def _sentences(contenders: list[Contender]) -> Iterator[str]:
    families: dict[tuple[str, str, str], list[Contender]] = {}
    bases: dict[tuple[str, str], list[Contender]] = {}
    for contender in contenders:
        method = parse_method(contender.name)
        run = str(method.of_the_run)  # those that were trained alike are compared
        if method.variant is None:
            bases.setdefault((method.base, run), []).append(contender)
        else:
            family = SAME_PERTURBATION.get(method.variant, method.variant)
            families.setdefault((family, method.base, run), []).append(contender)
    for (family, base_name, run), members in families.items():
        full = [c for c in members if parse_method(c.name).period == 1 and parse_method(c.name).variant == family]
        for base in bases.get((base_name, run), []):
            yield from _family(base, full, [c for c in members if c not in full])


def _family(base: Contender, full: list[Contender], cheap: list[Contender]) -> Iterator[str]:
    """``full``: rows of the method that makes a sharp step every time; ``cheap``: of those that save its passes."""
    gains = False
    if full:
        best = max(full, key=lambda contender: contender.summary.accuracy)
        sentence, gains = _gain(best, base)
        yield sentence
    for contender in cheap:
        yield _keeps(contender, best, base) if gains else _gain(contender, base)[0]


def _gain(method: Contender, base: Contender) -> tuple[str, bool]:
    gain = method.minus(base)
    levels = f"{method.level}, {base.level}"
    if gain.low > 0:
        return f"{method.name} gains over {base.name}, {gain}: {levels}.", True
    if gain.high < 0:
        return f"{method.name} loses against {base.name}, {gain}: {levels}.", False
    return f"Not shown: that {method.name} gains over {base.name}, {gain}: {levels}.", False


def _keeps(cheap: Contender, full: Contender, base: Contender) -> str:
    over_half = cheap.minus(full, base)  # above the middle between base and full: more than half of the gain is kept
    level = f"{cheap.level}, {cheap.minus(full)} from {full.name}"
    if over_half.low > 0:
        return f"{cheap.name} keeps more than half of that gain: {level}."
    if over_half.high < 0:
        return f"{cheap.name} loses more than half of that gain: {level}."
    return f"Not shown: that {cheap.name} keeps more than half of that gain: {level}."
