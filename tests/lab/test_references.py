"""Corruptions, attacks and curvature beside other packages, where these are installed.

imagecorruptions-imaug has ImageNet-C's corruptions, pyautoattack's wheel a ResNet-18 trained on CIFAR-10; the others are
torchattacks and curvlinops-for-pytorch. ``LOOKSAM_TEST_CIFAR10`` names a folder or tar of CIFAR-10 as the lab takes it.
"""

import importlib.resources
import importlib.util
import os
import types
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from looksam.lab import sharpness
from looksam.lab.attacks import fgsm, pgd
from looksam.lab.config import DataConfig
from looksam.lab.corruptions import CORRUPTIONS, _smear
from looksam.lab.data import load_dataset
from looksam.lab.models import build_model
from looksam.lab.weights import load_weights


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip(
        "imagecorruptions.corruptions",
        reason="imagecorruptions-imaug is not installed; the formulas have tests in test_robustness.py",
    )


@pytest.fixture(scope="module")
def images():
    """Smooth ones with some noise, in steps of 1/255, [80, 3, 32, 32]."""
    coarse = torch.randn(80, 3, 8, 8, generator=generator())
    fine = torch.randn(80, 3, 32, 32, generator=generator(1))
    pixels = 0.45 + 0.18 * F.interpolate(coarse, 32, mode="bicubic") + 0.04 * fine
    return (pixels.clamp(0, 1) * 255).round() / 255


def parameters(function):
    """The one constant of a corruption that has an entry for each severity."""
    (found,) = (
        c for c in function.__code__.co_consts if isinstance(c, tuple) and len(c) == 5 and not isinstance(c[0], str)
    )
    return found


def with_ours(function, convert=lambda p: p):
    """Their corruption, which has ImageNet-C's parameters, with those of ours: CIFAR-10-C's."""
    code, old = function.__code__, parameters(function)
    new = tuple(map(convert, parameters(CORRUPTIONS[function.__name__])))
    constants = tuple(new if constant is old else constant for constant in code.co_consts)
    return types.FunctionType(
        code.replace(co_consts=constants), function.__globals__, function.__name__, function.__defaults__
    )


def each(alter, images):
    arrays = [(image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for image in images]
    altered = np.stack([np.asarray(alter(Image.fromarray(array)), dtype=np.float64) for array in arrays])
    return torch.from_numpy(altered).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("name", ["defocus_blur", "brightness", "contrast", "pixelate", "jpeg_compression"])
def test_fixed_corruptions_are_the_same_pixels(theirs, images, name):
    function = with_ours(getattr(theirs, name))
    for severity in range(1, 6):
        ours = CORRUPTIONS[name](images[:10], severity, generator()).clamp(0, 1)
        torch.testing.assert_close(ours, each(partial(function, severity=severity), images[:10]), atol=1e-5, rtol=0)


def test_parameters_that_both_have_give_the_same_pixels(theirs, images):
    """Without our parameters in their code: some of CIFAR-10-C's are some of ImageNet-C's."""
    for name, pairs in (("contrast", ((3, 1), (4, 2))), ("brightness", ((2, 1), (4, 2), (5, 3)))):
        for ours, of_theirs in pairs:
            expected = each(partial(getattr(theirs, name), severity=of_theirs), images[:10])
            torch.testing.assert_close(
                CORRUPTIONS[name](images[:10], ours, generator()).clamp(0, 1), expected, atol=1e-5, rtol=0
            )


def test_zoom_blur_averages_the_same_zooms(theirs, images):
    for severity, end in enumerate((1.06, 1.11, 1.16, 1.21, 1.26), start=1):
        expected = []
        for image in images[:5].permute(0, 2, 3, 1).numpy():
            layers = [image]
            for factor in np.arange(1, end, 0.01):
                layer = theirs.clipped_zoom(image, factor)
                start = (len(layer) - 32) // 2  # CIFAR-10-C takes the middle, they take the corner
                layers.append(layer[start : start + 32, start : start + 32])
            expected.append(np.mean(layers, axis=0))
        ours = CORRUPTIONS["zoom_blur"](images[:5], severity, generator())
        torch.testing.assert_close(ours, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("degrees", [-41.0, -7.0, 13.0, 37.0, -100.0])
def test_motion_blur_along_the_same_direction(theirs, images, degrees):
    expected = [
        theirs._motion_blur(image, radius=8, sigma=2, angle=degrees) for image in images[:5].permute(0, 2, 3, 1).numpy()
    ]
    ours = _smear(images[:5], 8, 2, torch.full((5,), degrees))
    torch.testing.assert_close(
        ours, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2).float(), atol=1e-5, rtol=0
    )


RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "fog")
"""Not frost, which has photographs of ice there, nor the elastic transform, which has other parameters and no affine part there."""


@pytest.mark.parametrize("name", RANDOM)
def test_random_corruptions_change_images_as_much(theirs, images, name):
    """The change of an image, in absolute value and squared: its mean over the images within five standard errors."""
    function = with_ours(getattr(theirs, name), (lambda p: (p[0], 1, p[1])) if name == "glass_blur" else lambda p: p)
    np.random.seed(0)  # theirs draws from it
    for severity in (1, 3, 5):
        ours = CORRUPTIONS[name](images, severity, generator()).clamp(0, 1) - images
        other = each(partial(function, severity=severity), images) - images
        for size in (torch.abs, torch.square):
            a, b = (size(change).flatten(1).mean(1) for change in (ours, other))
            error = torch.sqrt((a.var() + b.var()) / len(images))
            assert abs(a.mean() - b.mean()) < 5 * error, (severity, a.mean(), b.mean(), error)


@pytest.fixture(scope="module")
def victim():
    """The wheel's ResNet-18, which takes pixels of 0..1, as one of the lab's models; and how it is built there."""
    if importlib.util.find_spec("pyautoattack") is None:
        pytest.skip("pyautoattack is not installed, whose wheel holds a trained ResNet-18")
    from pyautoattack.examples.resnet import ResNet18

    model = build_model("resnet18", 3, 32, 10)
    with importlib.resources.as_file(importlib.resources.files("pyautoattack") / "examples" / "model_test.pt") as path:
        load_weights(model, str(path))
        original = ResNet18()
        original.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval(), original.eval()


@pytest.fixture(scope="module")
def cifar():
    source = os.environ.get("LOOKSAM_TEST_CIFAR10")
    if not source:
        pytest.skip("LOOKSAM_TEST_CIFAR10 does not name a folder or tar of CIFAR-10")
    data = load_dataset(DataConfig(source, test_size=150), 0)
    return data.test_x.float() / 255, data.test_y


def test_foreign_weights_give_the_foreign_logits(victim, images):
    ours, original = victim
    with torch.no_grad():
        torch.testing.assert_close(ours(images[:8]), original(images[:8]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def accuracy(model, x, y):
    return float((model(x).argmax(1) == y).float().mean())


def test_the_trained_network_is_right_on_clean_images_and_wrong_under_attack(victim, cifar):
    """About 84 % of 10,000 test images; of 150 within three standard errors of that."""
    model, (x, y) = victim[0], cifar
    assert abs(accuracy(model, x, y) - 0.84) < 3 * (0.84 * 0.16 / len(y)) ** 0.5
    x, y = x[:40], y[:40]
    assert accuracy(model, pgd(model, x, y, 8 / 255, steps=10), y) == 0
    assert 0 < accuracy(model, fgsm(model, x, y, 8 / 255), y) < 0.5


@pytest.mark.parametrize("name", ["FGSM", "PGD", "PGDL2"])
def test_attacks_on_the_trained_network_agree_with_torchattacks(victim, images, name):
    """Where a gradient's element is next to zero its sign is the order of the sums: so on all but some pixels."""
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    model, x = victim[0], images[:6]
    y = torch.arange(6)
    ours, options = {
        "FGSM": (fgsm(model, x, y, 8 / 255), {"eps": 8 / 255}),
        "PGD": (pgd(model, x, y, 8 / 255, 4, step_size=2 / 255), {"eps": 8 / 255, "alpha": 2 / 255, "steps": 4}),
        "PGDL2": (pgd(model, x, y, 0.5, 4, "2", 0.2), {"eps": 0.5, "alpha": 0.2, "steps": 4}),
    }[name]
    if name != "FGSM":
        options["random_start"] = False
    other = getattr(torchattacks, name)(model, **options)(x, y)
    assert (ours - x).abs().max() > 0.02
    assert ((ours - other).abs() > 1e-4).float().mean() < 1e-3


def test_curvature_of_the_trained_network_agrees_with_curvlinops(victim, images):
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    model, x, y = victim[0], images[:3], torch.tensor([3, 5, 8])
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = curvlinops.HessianLinearOperator(model, torch.nn.CrossEntropyLoss(), parameters, [(x, y)])
    with sharpness.loss_of(model, x, y) as (loss, weights):
        v = sharpness.filter_normalised(weights, generator())
        ours = sharpness.hessian_product(loss, weights)(v)
    other = operator @ v
    error = sharpness.norm(sharpness.moved(ours, (-1.0, list(other)))) / sharpness.norm(ours)
    assert float(error) < 1e-3
