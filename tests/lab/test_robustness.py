"""Attacks and corruptions, against calculations of their own."""

import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from looksam.lab.attacks import evaluating, fgsm, gradient, pgd
from looksam.lab.config import DataConfig, TrainConfig
from looksam.lab.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from looksam.lab.data import load_dataset
from looksam.lab.train import Trainer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def victim():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 5)).eval()
    return model, torch.rand(12, 3, 8, 8, generator=generator()), torch.randint(5, (12,), generator=generator())


def losses(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def test_fgsm_is_one_step_along_the_sign(victim):
    model, x, y = victim
    x0 = x.clone().requires_grad_()
    F.cross_entropy(model(x0), y).backward()
    expected = torch.clamp(x + 0.03 * torch.sign(x0.grad), 0, 1)
    torch.testing.assert_close(fgsm(model, x, y, 0.03), expected)
    torch.testing.assert_close(pgd(model, x, y, 0.03, steps=1, step_size=0.03), expected)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_pgd_stays_in_the_ball_and_beats_one_step(victim, norm):
    model, x, y = victim
    epsilon = 0.05 if norm == "inf" else 0.5
    moved = pgd(model, x, y, epsilon, steps=10, norm=norm)
    distance = (moved - x).flatten(1)
    length = distance.abs().amax(1) if norm == "inf" else distance.norm(dim=1)
    assert (length <= epsilon * (1 + 1e-5)).all()
    assert (length > 0.5 * epsilon).all()
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not moved.requires_grad
    one = pgd(model, x, y, epsilon, steps=1, norm=norm, step_size=epsilon)
    assert losses(model, moved, y).sum() > losses(model, one, y).sum() > losses(model, x, y).sum()


def test_each_image_is_attacked_for_itself(victim):
    model, x, y = victim
    together = pgd(model, x, y, 0.05, steps=3)
    alone = torch.cat([pgd(model, x[i : i + 1], y[i : i + 1], 0.05, steps=3) for i in range(len(y))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    probabilities = F.one_hot(y, 5).float()
    torch.testing.assert_close(gradient(model, x, probabilities), gradient(model, x, y))


def test_an_attack_leaves_no_trace_in_the_model():
    trainer = Trainer(
        TrainConfig("sgd", data=DataConfig(train_size=60), batch_size=20, adversarial=0.1, threads=1),
        load_dataset(DataConfig(train_size=60), 0),
    )
    trainer.model.train()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    pieces = trainer.batch(torch.arange(20))
    assert trainer.model.training
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())
    plain = (trainer.train_x[:20].float() / 255 - trainer.mean) / trainer.std
    moved = ((pieces[0][0] - plain) * trainer.std).abs()
    assert float(moved.max()) == pytest.approx(0.1, abs=1e-5)
    y = trainer.train_y[:20]
    with evaluating(trainer.model):
        assert losses(trainer.model, pieces[0][0], y).sum() > losses(trainer.model, plain, y).sum()


@pytest.mark.parametrize(("name", "ours"), [("FGSM", lambda m, x, y: fgsm(m, x, y, 0.03)),
                                            ("PGD", lambda m, x, y: pgd(m, x, y, 0.03, 5, step_size=0.01)),
                                            ("PGDL2", lambda m, x, y: pgd(m, x, y, 0.5, 5, "2", step_size=0.2))])  # fmt: skip
def test_attacks_agree_with_torchattacks(victim, name, ours):
    torchattacks = pytest.importorskip(
        "torchattacks", reason="torchattacks is not installed; formulas are compared above"
    )
    model, x, y = victim
    options = {
        "FGSM": {"eps": 0.03},
        "PGD": {"eps": 0.03, "alpha": 0.01, "steps": 5, "random_start": False},
        "PGDL2": {"eps": 0.5, "alpha": 0.2, "steps": 5, "random_start": False},
    }[name]
    theirs = getattr(torchattacks, name)(model, **options)(x, y)
    torch.testing.assert_close(ours(model, x, y), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28), (1, 8)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_gives_images_and_grows(name, channels, size):
    coarse = F.interpolate(torch.rand(6, channels, 4, 4, generator=generator()), size, mode="bilinear")
    clean = 0.7 * coarse + 0.3 * torch.rand(coarse.shape, generator=generator())
    changes = []
    for severity in SEVERITIES:
        images = corrupt(name, clean, severity, generator(1))
        assert images.shape == clean.shape
        assert images.min() >= 0
        assert images.max() <= 1
        levels = images * 255
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        assert torch.equal(images, corrupt(name, clean, severity, generator(1))), "not reproducible"
        changes.append(float((images - clean).abs().mean()))
    if size >= 28:
        assert changes[4] > 1.5 / 255
    if size >= 28 and name not in ("elastic_transform", "glass_blur"):  # whose severities are not ordered by strength
        assert changes[4] > changes[0]


def test_noise_has_its_parameters():
    grey = torch.full((20, 3, 32, 32), 0.5)
    for severity, sigma in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        assert float(corrupt("gaussian_noise", grey, severity, generator()).std()) == pytest.approx(sigma, rel=0.03)
    for severity, photons in zip(SEVERITIES, (500, 250, 100, 75, 50), strict=True):
        sigma = float(corrupt("shot_noise", grey, severity, generator()).std())
        assert sigma == pytest.approx((0.5 / photons) ** 0.5, rel=0.03)
    for severity, amount in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        images = corrupt("impulse_noise", grey, severity, generator())
        assert float(((images == 0) | (images == 1)).float().mean()) == pytest.approx(amount, rel=0.1)


def test_brightness_and_contrast_against_their_formulas():
    x = torch.rand(3, 3, 5, 5, generator=generator())
    for severity, added in zip(SEVERITIES, (0.05, 0.1, 0.15, 0.2, 0.3), strict=True):
        expected = np.zeros(x.shape)
        for index in np.ndindex(3, 5, 5):
            h, s, v = colorsys.rgb_to_hsv(*x[index[0], :, index[1], index[2]].tolist())
            expected[index[0], :, index[1], index[2]] = colorsys.hsv_to_rgb(h, s, min(1, v + added))
        torch.testing.assert_close(corrupt("brightness", x, severity, generator()).double(), torch.tensor(expected),
                                   atol=1.01 / 255, rtol=0)  # fmt: skip
    for severity, factor in zip(SEVERITIES, (0.75, 0.5, 0.4, 0.3, 0.15), strict=True):
        means = x.mean((2, 3), keepdim=True)
        expected = (means + factor * (x - means)).clamp(0, 1)
        torch.testing.assert_close(corrupt("contrast", x, severity, generator()), expected, atol=1.01 / 255, rtol=0)


def test_blurs_keep_a_constant_image_and_the_mean():
    constant = torch.full((2, 3, 32, 32), 0.4)
    point = torch.zeros(2, 1, 32, 32)
    point[:, :, 16, 16] = 1
    for name in ("defocus_blur", "motion_blur", "zoom_blur", "glass_blur", "pixelate", "elastic_transform"):
        images = CORRUPTIONS[name](constant, 5, generator())
        torch.testing.assert_close(images, constant, atol=1e-5, rtol=0)
    for name in ("defocus_blur", "motion_blur"):
        blurred = CORRUPTIONS[name](point, 5, generator())
        assert float(blurred.sum()) == pytest.approx(2.0, rel=1e-4)
        assert float(blurred.max()) < 0.8
