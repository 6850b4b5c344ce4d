import pytest
import torch

from looksam.lab.models import MODELS, build_model
from looksam.lab.schedule import lr_factor


def count(model):
    return sum(p.numel() for p in model.parameters())


SIZES = [(1, 8), (1, 28), (3, 32)]
LARGE = {"vit-small": [], "vit-base": [], "resnet18": SIZES[::2], "resnet50": SIZES[2:], "wrn28-10": SIZES[2:]}
"""Those that differ from the others in numbers only are left to the counts."""


@pytest.mark.parametrize(("name", "channels", "size"), [(m, *s) for m in MODELS for s in LARGE.get(m, SIZES)])
def test_logits_and_gradients(name, channels, size):
    model = build_model(name, channels, size, 7, width=0.1 if name == "wrn28-10" else 0.25)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        assert count(build_model("resnet50", 3, 224, 1000)) == 25_557_032  # torchvision's
        assert count(build_model("wrn28-10", 3, 32, 10)) == 36_479_194  # the usual count
        assert count(build_model("vit-base", 3, 224, 1000)) == 86_567_656  # ViT-B/16
    assert count(build_model("resnet18", 3, 32, 10)) == 11_173_962  # the usual CIFAR ResNet-18
    assert count(build_model("vit-small", 3, 224, 1000)) == 22_050_664  # ViT-S/16
    assert count(build_model("vit-tiny", 3, 224, 1000)) == 5_717_416  # ViT-Ti/16
    assert count(build_model("cnn", 1, 8, 10)) == 15_418


def test_width_scales_channels():
    full, half = (count(build_model("resnet18", 3, 32, 10, width=w)) for w in (1.0, 0.5))
    assert half / full == pytest.approx(0.25, abs=0.01)


def test_patch():
    small, large = (build_model("vit-tiny", 3, 32, 10, patch=p) for p in (4, 8))
    assert small.position.shape[1] == 65
    assert large.position.shape[1] == 17
    with pytest.raises(ValueError, match="--patch 5 does not divide the image size 32"):
        build_model("vit-tiny", 3, 32, 10, patch=5)


def test_transformer_blocks_start_different():
    first, second = (block.linear1.weight for block in build_model("vit-tiny", 1, 8, 10).blocks[:2])
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("schedule", "step", "total", "warmup", "factor"),
    [
        ("cosine", 0, 100, 0, 1.0),
        ("cosine", 50, 100, 0, 0.5),
        ("cosine", 25, 100, 0, 0.5 * (1 + 0.5**0.5)),
        ("cosine", 100, 100, 0, 0.0),
        ("linear", 25, 100, 0, 0.75),
        ("linear", 100, 100, 0, 0.0),
        ("constant", 99, 100, 0, 1.0),
        ("cosine", 0, 110, 10, 1 / 11),
        ("cosine", 9, 110, 10, 10 / 11),
        ("cosine", 10, 110, 10, 1.0),
        ("cosine", 60, 110, 10, 0.5),
        ("linear", 60, 110, 10, 0.5),
        ("constant", 4, 110, 10, 5 / 11),
        ("cosine", 10, 10, 10, 1.0),
    ],
)
def test_schedule(schedule, step, total, warmup, factor):
    assert lr_factor(schedule, step, total, warmup) == pytest.approx(factor, abs=1e-12)
