"""Every experiment at smoke scale: what it runs, its records, figures, report; and that it goes on where it was stopped."""

import json
import re
import xml.etree.ElementTree as ET

import matplotlib.pyplot as plt
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from looksam.lab.cli import COMMANDS, TOOLS, main
from looksam.lab.design import SCALES, design_of
from looksam.lab.document import Rows
from looksam.lab.figures import style
from looksam.lab.measure import EpochRecord
from looksam.lab.methods import parse_method
from looksam.lab.recipes import RECIPES
from looksam.lab.records import Experiment, Run, read_experiment

EXPERIMENTS = [name for name in COMMANDS if name not in TOOLS]
pytestmark = pytest.mark.usefixtures("in_this_process")
NEW = {
    "tradeoff": {"tradeoff_passes", "tradeoff_throughput"},
    "sensitivity": {"sensitivity_0", "sensitivity_1"},
    "drift": {"drift_0"},
    "landscape": {f"landscape_{name}" for name in ("line", "contour", "surface", "ball", "eigenvalues")},
    "robustness": {f"robustness_{name}" for name in ("corruptions", "severity", "attacks")},
    "large-batch": {"large_batch"},
}


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def smoke(name, out, *more):
    return run(name, "--scale", "smoke", "--device", "cpu", "--threads", 1, "--out", out, *more)


def check_figure(folder, stem):
    pixels = np.asarray(Image.open(folder / f"{stem}.png").convert("RGB"))
    assert pixels.shape[1] >= 1000, "too small to read"
    assert (pixels != 255).any(2).mean() > 0.02, "blank"
    assert ET.parse(folder / f"{stem}.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", NEW)
def test_smoke_leaves_records_figures_and_a_report_and_resumes(name, tmp_path):
    out = tmp_path / "out"
    result = smoke(name, out)
    assert result.exit_code == 0, result.output
    report = (out / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"!\[.*?\]\((.*?)\.png\)", report)) >= NEW[name]
    for stem in NEW[name]:
        check_figure(out, stem)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == report.count("![")
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page)
    experiment = read_experiment(out)
    design = design_of(name)
    for method in experiment.methods:
        assert len(experiment.finished(method)) == design.scales["smoke"]["seeds"]
        assert bool(experiment.measured(method)) == bool(design.measure or design.watch)
    before = (out / "results.jsonl").read_text()
    again = smoke(name, out, "--resume")
    assert again.exit_code == 0, again.output
    # The very records, times and all: nothing was done twice.
    assert sorted((out / "results.jsonl").read_text().splitlines()[1:]) == sorted(before.splitlines()[1:])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_three_scales_of_possible_values(name):
    design = design_of(name)
    assert set(design.scales) == set(SCALES)
    known = {p.name for p in main.get_command(None, name).params}
    for values in (*design.scales.values(), *RECIPES.values()):
        assert set(values) <= known | {f"{s}" for s in design.settings}
        for method in values.get("methods", ()):
            parse_method(method)


def test_what_the_user_gives_wins_over_scale_and_recipe(tmp_path):
    out = tmp_path / "out"
    arguments = ("sgd", "--recipe", "cifar100-resnet18-looksam", "--data", "digits", "--model", "cnn", "--epochs", 1)
    result = smoke("train", out, *arguments, "--train-size", 150)
    assert result.exit_code == 0, result.output
    config = read_experiment(out).header["config"]
    assert (config["model"], config["epochs"], config["lr"]) == ("cnn", 1, 0.1)  # the user's, the user's, the recipe's
    assert config["batch_size"] == 128
    assert list(read_experiment(out).header["methods"]) == ["sgd"]


def test_one_page_of_several_experiments(tmp_path):
    for name in ("a", "b"):
        assert smoke("train", tmp_path / name, "sgd", "--epochs", 1, "--train-size", 100).exit_code == 0
    result = run("report", tmp_path / "a", tmp_path / "b", "--page", tmp_path / "all.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert page.count("<h1>looksam train: digits") == 2
    assert page.count("<img") == 10
    assert 'src="a' not in page, "the page needs no other file"


def test_methods_with_options_of_the_run_of_their_own(tmp_path):
    out = tmp_path / "out"
    methods = ("sgd:batch_size=20", "sgd:batch_size=50,mixup=0.2", "sgd:adversarial=0.1,batch_size=50")
    result = smoke("compare", out, *methods, "--epochs", 1, "--seeds", 1, "--train-size", 100)
    assert result.exit_code == 0, result.output
    experiment = read_experiment(out)
    steps = {run.method: (run.epochs[0].steps, run.epochs[0].passes) for run in experiment.runs}
    # An attack of three steps makes three passes before that of the training.
    assert steps == dict(zip(sorted(methods), [(2, 8), (5, 5), (2, 2)], strict=True))
    report = (out / "report.md").read_text()
    assert "| batch_size | 20 |" in report, "of the first method"
    assert report.count("batch_size = 50") == 2


def test_the_periods_of_tradeoff():
    expand = design_of("tradeoff").expand
    values = {"periods": (1, 2, 5), "base": "sgd"}
    assert expand(["sgd", "sam:rho=0.4", "looksam+adamw", "sam-3", "vasso", "ssam", "sam:k=4"], values) == [
        *("sgd", "sam:rho=0.4", "sam-2:rho=0.4", "sam-5:rho=0.4", "looksam-2+adamw", "looksam-5+adamw", "sam-3"),
        *("vasso", "ssam", "ssam-2", "ssam-5", "sam:k=4"),  # VaSSO has no period
    ]


def test_the_batches_of_large_batch():
    values = {
        "batches": (50, 200), "augmentation": "both", "base": "lamb", "lr": None, "lr_scaling": "sqrt", "warmup": 1.0,
        "epochs": 6,
    }  # fmt: skip
    names = design_of("large-batch").expand(["looksam-5+lamb:lr=0.02,rho=0.1"], values)
    assert [dict(parse_method(name).settings) for name in names] == [
        {"rho": 0.1, "batch_size": 50, "lr": 0.02, "warmup": 1},
        {"rho": 0.1, "batch_size": 200, "lr": 0.04, "warmup": 3},  # four times the epochs, at most half of all
        {"rho": 0.1, "batch_size": 50, "lr": 0.02, "warmup": 1, "augment": "randaugment", "mixup": 0.2},
        {"rho": 0.1, "batch_size": 200, "lr": 0.04, "warmup": 3, "augment": "randaugment", "mixup": 0.2},
    ]


def accuracies_of(experiment, values):
    """The experiment's results are made up: METHOD -> accuracies (%) of the seeds."""
    header = {"seeds": list(range(len(next(iter(values.values()))))), "methods": {name: {} for name in values}}
    header |= {"config": {"epochs": 1, "data": {"source": "digits", "label_noise": 0.0}}, "command": experiment}
    runs = [
        Run(name, seed, [EpochRecord(name, seed, 1, 1.0, 1.0, value / 100, 0.1, 10, 12, 1.0, 0.1, "native", False)])
        for name, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    return Experiment(header | {"used": {"run": {"train_images": 100}}}, runs, [])


def test_large_batch_says_which_layer_scale_is_best_only_if_it_is_shown():
    def text(*of_trust):
        look = "looklayersam-5+lamb"
        found = {
            f"{look}:batch_size=50,lr=0.01,warmup=1": (90.0, 92.0, 91.0),
            f"{look}:batch_size=99,lr=0.02,warmup=2": (80.0, 82.0, 81.0),
            f"{look}:batch_size=50,layer_scale=trust,lr=0.01,warmup=1": of_trust,
            f"{look}:batch_size=99,layer_scale=trust,lr=0.02,warmup=2": of_trust,
        }
        blocks = design_of("large-batch").sections(accuracies_of("large-batch", found))
        (table,) = (block for block in blocks if isinstance(block, Rows))
        assert table.rows[0] == (look, "91.00 ± 0.58", "81.00 ± 0.58")
        return blocks[-1].text

    assert text(90, 91.8, 90.6).startswith(
        "`layer_scale`: `trust` is best, 90.80 ± 0.53 % over all batches; from `trust_n"
    )
    assert "`trust` has the highest mean, 86.33 ± 1.86 % over all batches, not shown to be best" in text(90, 84, 85)


def test_large_batch_tells_methods_apart_that_differ_in_their_learning_rate():
    names = (
        "lamb:batch_size=50,lr=0.01",
        "lamb:batch_size=99,lr=0.02",
        "lamb:batch_size=50,lr=0.1",
        "lamb:batch_size=99,lr=0.2",
    )
    found = accuracies_of("large-batch", {name: (80.0 + n, 82.0 + n) for n, name in enumerate(names)})
    rows = design_of("large-batch").sections(found)[-1].rows
    assert rows == [("lamb", "81.00 ± 1.00", "82.00 ± 1.00"), ("lamb:lr=0.1", "83.00 ± 1.00", "84.00 ± 1.00")]


def test_the_first_28_methods_of_a_figure_look_different():
    assert len({str(style(index)) for index in range(28)}) == 28


def test_the_labels_of_tradeoff_cover_neither_each_other_nor_a_point():
    values = {"sam": (90, 92), "sam-5": (80, 82), "sam-10": (79, 81), "looksam-2": (91, 92), "looksam-5": (80, 82.2)}
    _, figure = design_of("tradeoff").figures(accuracies_of("tradeoff", values))["Accuracy against passes a step"]
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["k = 1", "k = 5", "k = 10", "k = 2", "k = 5"]
    points = [point for line in axes.lines for point in axes.transData.transform(line.get_xydata())]
    for number, box in enumerate(boxes):
        assert axes.bbox.contains(*box.min)
        assert axes.bbox.contains(*box.max)
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert not any(box.contains(*point) for point in points)
    plt.close("all")


def test_a_report_of_an_unknown_experiment_is_one_sentence(tmp_path):
    header = {"kind": "header", "command": "divination", "seeds": [0], "methods": {"sgd": {}}, "config": {}}
    (tmp_path / "results.jsonl").write_text(json.dumps(header) + "\n")
    result = run("report", tmp_path)
    assert result.exit_code == 1
    assert "'divination', which is no experiment of this version" in result.output
