"""``looksam compare --tune``: the same budget for all, seeds and images of their own, controls."""

import json
import math
import re

import pytest
import torch
from click.testing import CliRunner

from looksam.lab.cli import main
from looksam.lab.config import DataConfig, TrainConfig
from looksam.lab.controls import RandomReuse, controls_of, step_length
from looksam.lab.data import load_dataset
from looksam.lab.methods import build_optimizer, parse_method, select_options
from looksam.lab.records import read_experiment
from looksam.lab.tuning import FIRST_SEED, candidates, choose, controls, grid_of

OPTIONS = [
    *("compare", "sgd", "looksam-2:rho=0.1", "--tune", 3, "--tune-seeds", 2, "--seeds", 2, "--seed", 5, "--epochs", 1),
    *("--train-size", 100, "--batch-size", 20, "--width", 0.25, "--device", "cpu", "--threads", 1, "--jobs", 1),
]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "out"
    return folder, run(*OPTIONS, "--out", folder)


def test_every_method_gets_the_same_budget(tuned):
    experiment = read_experiment(tuned[0] / "tune")
    assert experiment.header["seeds"] == [FIRST_SEED + 5, FIRST_SEED + 6]
    assert experiment.header["config"]["data"]["holdout"] == 0.2
    names = [parse_method(method).name for method in experiment.methods]
    assert names == ["sgd"] * 3 + ["looksam"] * 3
    for method in experiment.methods:
        assert len(experiment.finished(method)) == 2
        if method.startswith("looksam"):
            assert dict(parse_method(method).settings)["rho"] == 0.1  # what the user gives is not tuned


def test_the_best_of_each_on_validation_is_compared_on_fresh_seeds(tuned):
    folder, result = tuned
    assert result.exit_code == 0, result.output
    tuning, final = read_experiment(folder / "tune"), read_experiment(folder)
    assert final.header["seeds"] == [5, 6]
    assert not final.header["config"]["data"]["holdout"]
    for name, start in (("sgd", 0), ("looksam-2:rho=0.1", 3)):
        tried = tuning.methods[start : start + 3]
        means = [sum(run.epochs[-1].test_accuracy for run in tuning.finished(method)) for method in tried]
        best = tried[means.index(max(means))]
        assert final.header["tuning"]["chosen"][name]["method"] == best
        assert best in final.contenders
        assert f"{name}: chose {best}, validation " in result.output
    assert len(final.contenders) == 2


def test_the_report_shows_grid_choice_differences_and_controls(tuned):
    folder, _ = tuned
    report = (folder / "report.md").read_text(encoding="utf-8")
    final = read_experiment(folder)
    for heading in ("## Differences in accuracy", "## Tuning", "## Controls"):
        assert heading in report
    assert (
        "lr: 0.05, 0.0125, 0.025, 0.1, 0.2; weight_decay: 0.0005, 0.005, 0.02, 0.05, 0.08; alpha: 0.7, 0.1, 0.2, 0.4 |"
        in report
    )
    assert re.search(
        rf"^\| {re.escape(final.contenders[0])} \| {re.escape(final.contenders[1])} \| [+-]", report, re.MULTILINE
    )
    for text in (
        "LookSAM with a random q of the same length",
        "sgd with steps as long as LookSAM's",
        "SAM at rho = 0.2",
    ):
        assert re.search(rf"^\| {text}.* \| \d+\.\d ± \d+\.\d % at .* \| [+-]", report, re.MULTILINE), text
    assert set(final.controls) == set(final.methods) - set(final.contenders)


def test_it_goes_on_where_it_was_stopped(tuned, tmp_path):
    folder, _ = tuned
    kept = {name: (folder / name / "results.jsonl").read_text() for name in (".", "tune")}
    assert "already holds results" in run(*OPTIONS, "--out", folder).output
    result = run(*OPTIONS, "--out", folder, "--resume")
    assert result.exit_code == 0, result.output
    for name, text in kept.items():
        again = (folder / name / "results.jsonl").read_text()
        assert sorted(again.splitlines()[1:]) == sorted(text.splitlines()[1:])  # the very records, times and all


def test_grids_keep_what_is_given_and_scale_with_the_defaults():
    assert grid_of(parse_method("sam"), {})["rho"] == (0.05, 0.1, 0.2, 0.35, 0.5)
    assert grid_of(parse_method("asam"), {})["rho"] == (0.5, 1.0, 2.0, 3.5, 5.0)
    assert grid_of(parse_method("sam+adamw"), {})["lr"][0] == 1e-3
    assert grid_of(parse_method("adam"), {})["weight_decay"][0] == 0.0
    assert grid_of(parse_method("gsam"), {})["alpha"][0] == 0.4
    assert set(grid_of(parse_method("looksam"), {"rho": 0.1, "lr": 1})) == {"weight_decay", "alpha"}


def test_candidates_begin_with_the_defaults_and_are_different():
    names = candidates("looksam-5", {}, 20, seed=0)
    assert names[0] == "looksam-5:alpha=0.7,lr=0.05,rho=0.05,weight_decay=0.0005"
    assert len(set(names)) == 20
    assert names == candidates("looksam-5", {}, 20, seed=0) != candidates("looksam-5", {}, 20, seed=1)


def test_a_setting_that_fails_once_is_not_chosen(tuned):
    experiment = read_experiment(tuned[0] / "tune")
    best = choose(experiment, {"sgd": experiment.methods[:3]})["sgd"]["method"]
    experiment.runs = [run for run in experiment.runs if (run.method, run.seed) != (best, FIRST_SEED + 5)]
    assert choose(experiment, {"sgd": experiment.methods[:3]})["sgd"]["method"] != best


def test_the_held_out_part_is_never_trained_on():
    whole, part = load_dataset(DataConfig(), 0), load_dataset(DataConfig(holdout=0.2, label_noise=0.4), 3)
    assert (len(part.train_y), len(part.test_y)) == (800, 200)
    images = torch.cat([part.train_x, part.test_x]).flatten(1)
    assert torch.equal(images.double().sum(0), whole.train_x.flatten(1).double().sum(0))
    other = load_dataset(DataConfig(holdout=0.2), 4)
    assert torch.equal(part.test_x, other.test_x)
    assert torch.equal(part.test_y, other.test_y)  # clean
    assert int((part.train_y != other.train_y).sum()) == 320


def test_controls_have_the_values_of_their_looksam():
    values = {"alpha": 0.5, "lr": 0.1, "weight_decay": 0.01, "rho": 0.2, "k": 4}
    longer = (1 + 3 * math.sqrt(1.25)) / 4
    assert step_length(0.5, 4) == pytest.approx(longer)
    random, base, *sams = controls_of(values, "sgd", 4, (0.1, 0.2))
    assert dict(parse_method(random).settings) == {"alpha": 0.5, "lr": 0.1, "rho": 0.2, "weight_decay": 0.01}
    assert parse_method(random).period == 4
    settings = dict(parse_method(base).settings)
    assert settings["lr"] == pytest.approx(0.1 * longer, rel=1e-5)
    assert settings["lr"] * settings["weight_decay"] == pytest.approx(0.1 * 0.01, rel=1e-5)
    assert [dict(parse_method(sam).settings)["rho"] for sam in sams] == [0.1, 0.2]
    assert controls(["sgd", "sam"], {}) == {}
    own = controls(["looksam-4:batch_size=20"], {"looksam-4:batch_size=20": values})
    assert all(parse_method(name).of_the_run == {"batch_size": 20} for name in own)  # trained alike, or no control


def test_the_random_q_has_the_length_of_q_and_nothing_else():
    def steps(name):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
        x, y = torch.randn(30, 50), torch.randint(3, (30,))
        config = TrainConfig(name, options=select_options(name, {"alpha": 0.7}))
        optimizer = build_optimizer(config, model, 10)
        qs = []
        for _ in range(5):

            def closure():
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            qs.append([optimizer.state[p]["q"].clone() for p in model.parameters()])
        return qs, optimizer

    ours, optimizer = steps("looksam_random-5")
    real, _ = steps("looksam-5")
    assert isinstance(optimizer, RandomReuse)
    for a, b in zip(ours[0], real[0], strict=True):
        assert a.norm() == pytest.approx(float(b.norm()), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(ours[0][0].flatten(), real[0][0].flatten(), dim=0)
    assert abs(float(cosine)) < 0.15  # of 2,000 dimensions
    assert all(torch.equal(a, b) for a, b in zip(ours[0], ours[4], strict=True))  # drawn on sharp steps only
    assert json.dumps(optimizer.param_groups[0]["k"]) == "5"
