"""What ``looksam drift`` measures, beside the same from gradients kept by hand."""

import copy

import pytest
import torch

from looksam.lab.config import DataConfig, TrainConfig
from looksam.lab.data import load_dataset
from looksam.lab.experiments.drift import Drift, split
from looksam.lab.train import Trainer

CONFIG = TrainConfig("sam:rho=0.1", epochs=2, data=DataConfig(train_size=160), batch_size=10, width=0.25, threads=1)
SETTINGS = {"lag": 2, "every": 5}


def trainer(watcher):
    made = Trainer(CONFIG, load_dataset(CONFIG.data, 0))
    made.watcher = watcher
    return made


class Kept(Drift):
    """Keeps every gradient, too."""

    def __init__(self):
        super().__init__(SETTINGS)
        self.all = []

    def after_step(self, trainer):
        self.all.append([p.double() for p in self.passes])
        super().after_step(trainer)


def test_distances_are_those_of_the_gradients(perceptron):
    watcher = Kept()
    run = trainer(watcher)
    run.train_epoch()
    assert [(v["epoch"], v["lag"]) for v in run.measurements] == [(1, 1), (1, 2)]
    vectors = []
    for g, s in watcher.all:
        along = (g @ s / (g @ g)) * g
        vectors.append({"g_s": s, "g_h": along, "g_v": s - along})
    for values in run.measurements:
        lag = values["lag"]
        starts = range(0, len(vectors) - lag, 5)
        assert values["samples"] == len(starts)
        for part in ("g_s", "g_h", "g_v"):
            distances = [(vectors[t + lag][part] - vectors[t][part]).norm() for t in starts]
            relative = [d / vectors[t][part].norm() for d, t in zip(distances, starts, strict=True)]
            assert values["absolute"][part] == pytest.approx(float(torch.stack(distances).quantile(0.5)), rel=1e-3)
            assert values["relative"][part] == pytest.approx(float(torch.stack(relative).quantile(0.5)), rel=1e-3)


def test_a_run_that_goes_on_measures_the_same(perceptron):
    whole, states = trainer(Drift(SETTINGS)), {}
    whole.train_epoch(lambda step: states.setdefault(step, copy.deepcopy(whole.state_dict())))
    for step in (5, 6, 7):  # before, within and after a window
        resumed = trainer(Drift(SETTINGS))
        resumed.load_state_dict(states[step])
        resumed.train_epoch()
        assert resumed.measurements == whole.measurements


def test_a_gradient_of_zero_has_no_part_along():
    parts = split(torch.zeros(3), torch.ones(3))
    assert torch.equal(parts["g_h"], torch.zeros(3))
    assert torch.equal(parts["g_v"], torch.ones(3))


def test_steps_of_one_pass_are_not_measured(perceptron):
    run = Trainer(TrainConfig("sgd", epochs=1, data=DataConfig(train_size=100), batch_size=10, threads=1),
                  load_dataset(DataConfig(train_size=100), 0))  # fmt: skip
    run.watcher = Drift(SETTINGS)
    run.train_epoch()
    assert run.measurements == []
