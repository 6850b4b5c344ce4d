"""``looksam robustness``: accuracy on corrupted and on adversarial images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from matplotlib.figure import Figure

from .. import pretrained
from ..config import make_generator
from ..design import Design, Figures, Numbers, Values
from ..document import Block, Heading, Rows, Text
from ..experiment import command_of
from ..figures import dress, new_figure, row_of_axes, style
from ..options import COUNT
from ..records import Experiment, mean_and_error
from ..streaming import in_memory

if TYPE_CHECKING:
    from torch import Tensor

    from ..train import Trainer

METHODS = (
    *("sgd", "adam", "sam:rho=0.05", "sam:rho=0.1", "sam:rho=0.2", "asam:rho=0.5", "esam:rho=0.1"),
    *("looksam-5:rho=0.1", "sgd:adversarial=0.03"),
)


def measure(trainer: Trainer, settings: Values) -> Iterable[dict[str, Any]]:
    """Accuracies on the first test images. The corruptions are the same for all methods and seeds."""
    import torch

    from ..attacks import evaluating, fgsm, pgd
    from ..corruptions import CORRUPTIONS, SEVERITIES, corrupt

    count = settings["images"]
    x, y = in_memory(trainer.test_x[:count]).to(trainer.device).float() / 255, trainer.test_y[:count]

    def accuracy(altered: Callable[[Tensor, Tensor], Tensor]) -> float:
        right = 0
        for xs, ys in zip(x.split(500), y.split(500), strict=True):
            images = altered(xs, ys).to(xs.device)
            with torch.no_grad():
                right += int((trainer.logits(images).argmax(1) == ys).sum())
        return right / len(y)

    def corrupted(name: str, severity: int) -> float:
        generator = make_generator(severity, name)
        return accuracy(lambda xs, ys: corrupt(name, xs, severity, generator))

    def attacked(norm: str, epsilon: float) -> float:
        return accuracy(lambda xs, ys: pgd(trainer.logits, xs, ys, epsilon, settings["attack_steps"], norm))

    def attacked_once(epsilon: float) -> float:
        return accuracy(lambda xs, ys: fgsm(trainer.logits, xs, ys, epsilon))

    def attack(name: str, epsilons: Sequence[float], accuracies: list[float]) -> dict[str, Any]:
        return {"kind": "attack", "name": name, "epsilons": list(epsilons), "accuracy": accuracies}

    small, large = settings["epsilons"], settings["epsilons_l2"]
    with evaluating(trainer.model):
        yield {"kind": "clean", "accuracy": accuracy(lambda xs, ys: xs)}
        for name in CORRUPTIONS:
            found = [corrupted(name, severity) for severity in SEVERITIES]
            yield {"kind": "corruption", "name": name, "accuracy": found}
        yield attack("FGSM", small, [attacked_once(epsilon) for epsilon in small])
        yield attack(f"PGD-{settings['attack_steps']} ℓ∞", small, [attacked("inf", epsilon) for epsilon in small])
        yield attack(f"PGD-{settings['attack_steps']} ℓ2", large, [attacked("2", epsilon) for epsilon in large])


def corruption_table(experiment: Experiment) -> dict[str, dict[str, np.ndarray]]:
    """Method -> corruption -> accuracies (%) [run, severity]."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for method in experiment.contenders:
        for values in experiment.measured(method):
            if values["kind"] == "corruption":
                rows = found.setdefault(method, {}).setdefault(values["name"], [])
                rows.append([100 * accuracy for accuracy in values["accuracy"]])
    return {method: {name: np.array(rows) for name, rows in names.items()} for method, names in found.items()}


def attack_table(experiment: Experiment) -> dict[str, dict[str, tuple[list[float], np.ndarray]]]:
    """Attack -> method -> (radii from 0, accuracies (%) [run, radius])."""
    found: dict[str, dict[str, tuple[list[float], list[list[float]]]]] = {}
    for method in experiment.contenders:
        clean = math.nan
        for values in experiment.measured(method):
            if values["kind"] == "clean":
                clean = values["accuracy"]
            if values["kind"] == "attack":
                epsilons = [0.0, *values["epsilons"]]
                rows = found.setdefault(values["name"], {}).setdefault(method, (epsilons, []))[1]
                rows.append([100 * accuracy for accuracy in (clean, *values["accuracy"])])
    return {
        attack: {method: (epsilons, np.array(rows)) for method, (epsilons, rows) in methods.items()}
        for attack, methods in found.items()
    }


def figures(experiment: Experiment) -> Figures:
    if not corruption_table(experiment):
        return {}
    return {
        "Accuracy on corrupted images": ("robustness_corruptions", _corruptions(experiment)),
        "Accuracy by severity": ("robustness_severity", _severity(experiment)),
        "Accuracy under attack": ("robustness_attacks", _attacks(experiment)),
    }


def _corruptions(experiment: Experiment) -> Figure:
    """A map: methods by corruptions, mean over severities and seeds."""
    table = corruption_table(experiment)
    names = list(next(iter(table.values())))
    means = np.array([[table[method][name].mean() for name in names] for method in table])
    figure, (axes,) = row_of_axes(1, 1.9 + 0.36 * len(table))
    axes.imshow(means, cmap="cividis", aspect="auto")
    axes.set_title("Accuracy (%) on corrupted images, mean over the severities", loc="left", fontsize=13)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=40, ha="right", fontsize=9)
    axes.set_yticks(range(len(table)), [pretrained.label(experiment, method) for method in table], fontsize=9)
    middle = (means.min() + means.max()) / 2
    for (row, column), mean in np.ndenumerate(means):
        axes.text(
            column, row, f"{mean:.0f}", ha="center", va="center", fontsize=8,
            color="white" if mean < middle else "black",
        )  # fmt: skip
    return figure


def _severity(experiment: Experiment) -> Figure:
    figure, axes = new_figure("Mean over the 15 corruptions", "severity", "test accuracy (%)")
    for index, (method, names) in enumerate(corruption_table(experiment).items()):
        rows = np.mean(list(names.values()), axis=0)
        axes.plot(
            range(1, rows.shape[1] + 1),
            rows.mean(0),
            marker="o",
            ms=4,
            label=pretrained.label(experiment, method),
            **style(index),
        )
    axes.set_xticks(range(1, 6))
    figure.legend(loc="outside right upper", frameon=False, handlelength=3)
    return figure


def _attacks(experiment: Experiment) -> Figure:
    table = attack_table(experiment)
    figure, panels = row_of_axes(len(table), sharey=True)
    for axes, (attack, methods) in zip(panels, table.items(), strict=True):
        dress(axes, attack, "radius ε, pixels 0 to 1", "test accuracy (%)" if axes is panels[0] else "")
        for index, (method, (epsilons, rows)) in enumerate(methods.items()):
            axes.plot(
                epsilons, rows.mean(0), marker="o", ms=3, label=pretrained.label(experiment, method), **style(index)
            )
        axes.set_xticks(epsilons, [f"{epsilon:.3g}" for epsilon in epsilons])
        axes.set_ylim(bottom=0)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=3, fontsize=9
    )
    return figure


def sections(experiment: Experiment) -> list[Block]:
    corrupted, attacks = corruption_table(experiment), attack_table(experiment)
    rows = []
    for method, names in corrupted.items():
        of_runs = np.mean(list(names.values()), axis=(0, 2))
        clean = [100 * v["accuracy"] for v in experiment.measured(method) if v["kind"] == "clean"]
        under_attack = [
            f"{statistics.fmean(methods[method][1][:, -1]):.1f}" for methods in attacks.values() if method in methods
        ]
        rows.append((pretrained.label(experiment, method), _spread(clean), _spread(of_runs.tolist()), *under_attack))
    largest = (f"{attack}, ε = {next(iter(methods.values()))[0][-1]:.3g}" for attack, methods in attacks.items())
    note = (
        "Accuracy (%) on the same test images for all, mean ± standard error over seeds. Corrupted: mean over 15 "
        "corruptions and five severities. Attacks: white-box, from the image itself, without restarts: an upper bound."
    )
    return [Heading("Robustness"), Text(note), Rows(("method", "clean", "corrupted", *largest), rows)]


def _spread(values: list[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


DESIGN = Design(
    name="robustness",
    summary="Clean, corrupted and adversarial accuracy of what each METHOD finds.",
    scales={
        "smoke": {
            "methods": ("sgd", "sam:rho=0.1", "sgd:adversarial=0.03"), "seeds": 1, "epochs": 2, "train_size": 200,
            "images": 50, "attack_steps": 2, "epsilons": (0.03,), "epsilons_l2": (0.5,),
        },
        "laptop": {"methods": METHODS, "seeds": 3, "epochs": 30},
        "gpu": {
            "methods": ("sgd", "adam", "sam:rho=0.1", "looksam-5:rho=0.1", "sgd:adversarial=0.0314"), "data": None,
            "seeds": 1, "epochs": 15, "amp": "bf16", "images": 2000, "attack_steps": 10,
        },
    },
    figures=figures,
    sections=sections,
    options=(
        *pretrained.OPTIONS,
        click.option("--images", type=COUNT, default=500, help="Test images that are altered."),
        click.option("--attack-steps", type=COUNT, default=10, help="Of PGD."),
        click.option("--epsilons", type=Numbers(), default="0.0078,0.0157,0.0314", help="Radii of the l-inf attacks."),
        click.option("--epsilons-l2", type=Numbers(), default="0.125,0.25,0.5", help="Radii of the l2 attack."),
    ),
    settings=("images", "attack_steps", "epsilons", "epsilons_l2"),
    measure=measure,
)  # fmt: skip
command = command_of(DESIGN)
