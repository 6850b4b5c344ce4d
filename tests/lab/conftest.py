import pytest
import torch

from looksam.lab import models
from looksam.lab.parallel import run_here

from .runs import build_perceptron


@pytest.fixture(autouse=True)
def threads():
    """The runs set torch's thread count; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_this_process(monkeypatch):
    """Without workers, whose start takes most of a small run's time."""

    def run_jobs(configs, jobs, checkpoints):
        for config in configs:
            events = []
            run_here(config, events.append, checkpoints)
            yield from events

    monkeypatch.setattr("looksam.lab.experiment.run_jobs", run_jobs)


@pytest.fixture
def perceptron(monkeypatch):
    """In this process, the model "cnn" is a small perceptron."""
    monkeypatch.setitem(models.CONVOLUTIONAL, "cnn", build_perceptron)
