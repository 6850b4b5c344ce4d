import pytest
import torch

from looksam.lab import models

from .runs import build_perceptron


@pytest.fixture(autouse=True)
def threads():
    """The runs set torch's thread count; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def perceptron(monkeypatch):
    """In this process, the model "cnn" is a small perceptron."""
    monkeypatch.setitem(models.CONVOLUTIONAL, "cnn", build_perceptron)
