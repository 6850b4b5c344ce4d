import numpy as np
import pytest
import torch

from looksam.lab.augment import OPERATIONS, Augmentation, mixup, randaugment, random_crop, random_flip
from looksam.lab.config import make_generator


def images(batch=16, channels=3, size=12):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["basic", "randaugment"])
def test_shape_range_and_reproducibility(kind, channels):
    x = images(64, channels)
    augment = Augmentation(kind, flip=True)
    first, second = (augment(x, make_generator(1, "a")) for _ in range(2))
    assert first.shape == x.shape
    assert first.dtype == x.dtype
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    assert torch.equal(first, second)
    changed = (first != x).flatten(1).any(1)
    assert changed.float().mean() > 0.8
    assert not torch.equal(first, augment(x, make_generator(2, "a")))


def test_none_changes_nothing():
    x = images()
    assert Augmentation("none", flip=True)(x, make_generator(0, "a")) is x


def test_crop_shifts_each_image_and_fills_with_zeros():
    x = images(200, 2, 5) + 0.1
    out = random_crop(x, 1, make_generator(0, "a"))
    padded = torch.nn.functional.pad(x, [1] * 4)
    seen = set()
    for image, source in zip(out, padded, strict=True):
        found = [(i, j) for i in range(3) for j in range(3) if torch.equal(image, source[:, i : i + 5, j : j + 5])]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 9


def test_flip_mirrors_about_half():
    x = images(400, 1, 4)
    out = random_flip(x, make_generator(0, "a"))
    same, mirrored = ((out == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert (same ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_change_images_within_range(name, channels):
    x = 0.2 + 0.5 * images(4, channels)
    for strength in (-1.0, 0.5, 1.0):
        out = OPERATIONS[name](x, torch.full((4,), strength))
        assert out.shape == x.shape
        assert float(out.min()) >= 0
        assert float(out.max()) <= 1 + 1e-6
        unchanged = name == "identity" or (name == "color" and channels == 1)
        assert torch.allclose(out, x, atol=1e-6) == unchanged


@pytest.mark.parametrize(
    "name",
    ["rotate", "shear_x", "shear_y", "translate_x", "translate_y", "color", "contrast", "brightness", "sharpness"],
)
def test_strength_zero_is_the_identity(name):
    x = images()
    assert torch.allclose(OPERATIONS[name](x, torch.zeros(16)), x, atol=1e-5)


def test_translation_moves_along_its_axis():
    x = torch.zeros(1, 1, 10, 10)
    x[0, 0, 5, 5] = 1
    moved = OPERATIONS["translate_x"](x, torch.ones(1))
    assert moved[0, 0, 5, 2] == pytest.approx(1, abs=1e-4)  # 30 % of 10 pixels
    assert OPERATIONS["translate_y"](x, torch.ones(1))[0, 0, 2, 5] == pytest.approx(1, abs=1e-4)


def test_rotation_turns_by_thirty_degrees_at_full_strength():
    x = torch.zeros(1, 1, 41, 41)
    x[0, 0, 20, 35] = 1
    for strength in (1.0, -1.0):
        out = OPERATIONS["rotate"](x, torch.tensor([strength]))[0, 0]
        row, column = divmod(int(out.argmax()), 41)
        assert abs(row - 20) == pytest.approx(7.5, abs=1)
        assert column - 20 == pytest.approx(13, abs=1)


def test_levels_agree_with_pillow():
    from PIL import Image, ImageOps

    pixels = (images(1, 3, 16)[0].permute(1, 2, 0).numpy() * 200).astype(np.uint8)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    image, half = Image.fromarray(pixels), torch.tensor([0.5])
    for name, expected in {
        "posterize": ImageOps.posterize(image, 6),
        "solarize": ImageOps.solarize(image, 128),
        "autocontrast": ImageOps.autocontrast(image),
    }.items():
        ours = OPERATIONS[name](x, half)[0].permute(1, 2, 0).mul(255).numpy()
        assert np.abs(ours - np.asarray(expected, np.float32)).max() <= 1.01, name


def test_equalize_spreads_the_levels():
    x = images(2, 1, 32) ** 4
    out = OPERATIONS["equalize"](x, torch.ones(2))
    assert out.mean((1, 2, 3)).tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    order = x[0].flatten().argsort()
    assert (out[0].flatten()[order].diff() >= 0).all()


def test_randaugment_magnitude_matters():
    x = images(200)
    weak, strong = (randaugment(x, 1, m, make_generator(0, "a")) for m in (1.0, 30.0))
    assert (strong - x).abs().mean() > 1.2 * (weak - x).abs().mean()


def test_mixup_blends_images_and_targets_alike():
    x, targets = torch.eye(8)[:, None, None], torch.eye(8)
    generator = make_generator(0, "a")
    weights = set()
    for _ in range(20):
        mixed, soft = mixup(x, targets, 0.5, generator)
        assert torch.allclose(mixed[:, 0, 0], soft)
        assert torch.allclose(soft.sum(1), torch.ones(8))
        weights.add(round(float(soft.diagonal().min()), 6))
    assert len(weights) > 15


def test_mixup_is_reproducible_from_the_generator_state():
    x, targets = images(8), torch.eye(8)
    generator = make_generator(0, "a")
    state = generator.get_state()
    first = mixup(x, targets, 0.2, generator)
    generator.set_state(state)
    second = mixup(x, targets, 0.2, generator)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
