"""Nobody has run the recipes and the scale ``gpu`` in full: here their models, optimizers, data and options make a step or two."""

import math

import pytest
from click.testing import CliRunner

from looksam.lab.cli import COMMANDS, TOOLS, main
from looksam.lab.recipes import RECIPES
from looksam.lab.records import read_experiment
from tests.nightly import NIGHTLY

from .runs import write_pets

pytestmark = pytest.mark.usefixtures("in_this_process")
HEAVY = {"imagenet-vit-b16-looksam", "imagenet-vit-b16-looklayersam-lamb", "cifar100-wrn28-10-looksam"}
nightly = pytest.mark.skipif(not NIGHTLY, reason="a model of 36 to 86 million parameters: nightly")


def check(arguments, out):
    result = CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu", "--threads", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    runs = read_experiment(out).runs
    assert runs
    for run in runs:
        assert all(math.isfinite(epoch.train_loss) for epoch in run.epochs)


@pytest.mark.parametrize("recipe", [pytest.param(x, marks=nightly) if x in HEAVY else x for x in RECIPES])
def test_a_recipe_makes_steps_on_images_of_its_size(recipe, tmp_path):
    pets = write_pets(tmp_path, RECIPES[recipe].get("image_size", 32), train=4, test=2)
    options = ("--epochs", 1, "--batch-size", 4, "--seeds", 1, "--warmup", 0)
    check(("compare", "--recipe", recipe, "--data", pets, *options), tmp_path / "out")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in (*TOOLS, "train")])
def test_the_scale_gpu_makes_steps(name, tmp_path, perceptron):
    batches = ("--batches", "4,8") if name == "large-batch" else ("--batch-size", 4)
    check(
        (
            name,
            "--scale",
            "gpu",
            "--data",
            write_pets(tmp_path, 16, train=4, test=2),
            "--epochs",
            1,
            "--seeds",
            1,
            "--model",
            "cnn",
            *batches,
        ),
        tmp_path / "out",
    )
