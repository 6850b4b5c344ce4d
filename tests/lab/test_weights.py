"""Weights from files: what they are wrapped in, what does not fit, and that they give what the training gave."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from looksam.lab.cli import main
from looksam.lab.data import DataConfig, load_dataset
from looksam.lab.models import build_model
from looksam.lab.weights import load_weights, read_weights

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("looksam.lab.report.save", lambda figures, folder: plt.close("all"))
    monkeypatch.setattr("looksam.lab.report.write_page", lambda path, parts: None)


def model():
    return build_model("cnn", 1, 8, 10, width=0.25)


def saved(path, content):
    torch.save(content, path)
    return str(path)


def refusal(path, into=None):
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_weights(into or model(), str(path))
    return str(caught.value)


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
def test_wrapped_and_prefixed(tmp_path, wrap, prefix):
    trained, fresh = model(), model()
    weights = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    path = saved(tmp_path / "w.pt", weights if wrap is None else {"epoch": 3, wrap: weights})
    load_weights(fresh, path)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in fresh.state_dict().items())


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    trained, fresh = model(), model()
    path = str(tmp_path / "w.safetensors")
    safetensors.save_file({f"module.{name}": tensor for name, tensor in trained.state_dict().items()}, path)
    load_weights(fresh, path)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    Path(path).write_bytes(b"\xff" * 40)
    assert "not a safetensors file" in refusal(path)


def test_what_does_not_fit_is_named(tmp_path):
    weights = model().state_dict()
    weights["extra.weight"] = weights.pop("0.0.weight")
    weights["0.1.bias"] = torch.zeros(7)
    text = refusal(saved(tmp_path / "w.pt", weights))
    assert "1 missing: 0.0.weight; 1 unexpected: extra.weight; 1 of another shape: 0.1.bias [7] in place of [4]" in text
    old = {name: tensor for name, tensor in model().state_dict().items() if "num_batches" not in name}
    load_weights(model(), saved(tmp_path / "old.pt", old))


class Trap:
    """Pickled, it writes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "loaded")


def test_files_that_hold_something_else(tmp_path):
    trap = tmp_path / "trap"
    assert "Python objects that are not tensors" in refusal(saved(tmp_path / "trap.pt", {"state_dict": Trap(trap)}))
    assert not trap.exists()
    assert "Python objects that are not tensors" in refusal(saved(tmp_path / "whole.pt", model()))
    assert "holds a list" in refusal(saved(tmp_path / "list.pt", [torch.ones(2)]))
    assert "holds an empty dict" in refusal(saved(tmp_path / "empty.pt", {"model": {}}))
    assert "epoch hold(s) no tensor" in refusal(saved(tmp_path / "run.pt", {"epoch": 3, "weight": torch.ones(2)}))
    assert "there is no such file" in refusal(tmp_path / "none.pt")
    whole = Path(saved(tmp_path / "cut.pt", model().state_dict()))
    whole.write_bytes(whole.read_bytes()[:500])
    assert "is damaged, or not a file of torch.save" in refusal(whole)
    whole.write_text("not weights")
    assert "is damaged, or not a file of torch.save" in refusal(whole)


class Block(nn.Module):
    """A residual block under the usual names."""

    def __init__(self, inputs, widths, kernels, strides, shortcut):
        super().__init__()
        outs = [inputs, *widths]
        for n, (kernel, stride) in enumerate(zip(kernels, strides, strict=True), start=1):
            setattr(self, f"conv{n}", nn.Conv2d(outs[n - 1], outs[n], kernel, stride, kernel // 2, bias=False))
            setattr(self, f"bn{n}", nn.BatchNorm2d(outs[n]))
        self.count = len(kernels)
        if inputs != outs[-1] or max(strides) > 1:
            conv = nn.Conv2d(inputs, outs[-1], 1, max(strides), bias=False)
            setattr(self, shortcut, nn.Sequential(conv, nn.BatchNorm2d(outs[-1])))
        self.shortcut_name = shortcut

    def forward(self, x):
        out = x
        for n in range(1, self.count + 1):
            out = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(out))
            out = out if n == self.count else F.relu(out)
        return F.relu(out + getattr(self, self.shortcut_name, nn.Identity())(x))


class UsualResNet(nn.Module):
    def __init__(self, depths, deep, shortcut, last):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        inputs = 6
        for stage, (depth, width) in enumerate(zip(depths, (6, 13, 26, 51), strict=True), start=1):
            blocks = []
            for number in range(depth):
                stride = 2 if stage > 1 and number == 0 else 1
                shape = (
                    ((width, width, 4 * width), (1, 3, 1), (1, stride, 1))
                    if deep
                    else ((width,) * 2, (3, 3), (stride, 1))
                )
                blocks.append(Block(inputs, *shape, shortcut))
                inputs = shape[0][-1]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        setattr(self, last, nn.Linear(inputs, 5))
        self.last = last

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return getattr(self, self.last)(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "depths", "shortcut", "last"),
    [("resnet18", (2, 2, 2, 2), "shortcut", "linear"), ("resnet50", (3, 4, 6, 3), "downsample", "fc")],
)
def test_resnets_under_their_usual_names(tmp_path, name, depths, shortcut, last):
    torch.manual_seed(0)
    usual = UsualResNet(depths, name == "resnet50", shortcut, last)
    for p in usual.parameters():
        p.data += 0.1 * torch.randn_like(p)  # no two normalisations alike
    usual.eval()
    ours = build_model(name, 3, 32, 5, width=0.1).eval()
    load_weights(ours, saved(tmp_path / "w.pt", {"model": usual.state_dict()}))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), usual(x))
    fewer = {key: tensor for key, tensor in usual.state_dict().items() if not key.startswith("layer4.1")}
    assert "missing" in refusal(saved(tmp_path / "w.pt", fewer), ours)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.mark.parametrize("name", ["landscape", "robustness"])
def test_weights_are_measured_as_after_their_training(tmp_path, name):
    """The lab's own checkpoint, read as any file, gives the numbers of the run that left it."""
    common = (name, "--scale", "smoke", "--device", "cpu", "--threads", 1, "--jobs", 1)
    trained = run(*common, "sgd", "--label-noise", 0.4, "--out", tmp_path / "a")
    assert trained.exit_code == 0, trained.output
    (file,) = (tmp_path / "a" / "checkpoints").iterdir()
    read = run(*common, "--weights", file, "--label-noise", 0.4, "--out", tmp_path / "b")
    assert read.exit_code == 0, read.output

    def lines(folder, kind):
        found = map(json.loads, (tmp_path / folder / "results.jsonl").read_text().splitlines())
        return [line for line in found if line["kind"] == kind]

    measured = [[line["values"] for line in lines(folder, "measurement")] for folder in "ab"]
    assert measured[0] == measured[1]
    assert len(measured[0]) >= 4
    assert lines("a", "epoch")[-1]["test_accuracy"] == lines("b", "epoch")[-1]["test_accuracy"]
    assert lines("b", "epoch")[-1]["steps"] == 0
    report = (tmp_path / "b" / "report.md").read_text()
    assert f"| {file.name} | " in report
    assert "epochs" not in report.splitlines()[0]
    again = run(*common, "--weights", file, "--label-noise", 0.4, "--out", tmp_path / "b", "--resume")
    assert again.exit_code == 0, again.output
    assert [line["values"] for line in lines("b", "measurement")] == measured[1]


def test_normalisation_of_the_pixels_as_in_the_training(tmp_path):
    weights = saved(tmp_path / "w.pt", build_model("cnn", 1, 8, 10).state_dict())
    out = tmp_path / "out"
    arguments = ("landscape", "--scale", "smoke", "--threads", 1, "--jobs", 1, "--weights", weights, "--out", out)
    assert run(*arguments, "--pixel-mean", 0, "--pixel-std", 1).exit_code == 0
    first = (out / "results.jsonl").read_text().splitlines()[1]
    net = build_model("cnn", 1, 8, 10).eval()
    load_weights(net, weights)
    data = load_dataset(DataConfig(train_size=200), 0)
    with torch.no_grad():
        right = (net(data.test_x.float() / 255).argmax(1) == data.test_y).float().mean()
    assert json.loads(first)["test_accuracy"] == pytest.approx(float(right))


def test_wrong_combinations(tmp_path):
    weights = saved(tmp_path / "w.pt", {"a": torch.ones(1)})
    base = ("landscape", "--scale", "smoke", "--out", tmp_path / "out")
    for arguments, text in (
        (("sgd", "--lr", 1, "--weights", weights), "METHOD, --lr: no effect with --weights"),
        (("--weights", weights), "--model cnn, "),
        (("--weights", weights), "does not fit the model"),
        (("--weights", weights, "--pixel-mean", 0), "give both or none"),
        (("--weights", weights, "--pixel-mean", 0, "--pixel-std", 0), "--pixel-std 0"),
        (("--pixel-mean", 0, "--pixel-std", 1), "only with --weights"),
    ):
        result = run(*base, *arguments)
        assert result.exit_code == 2, result.output
        assert text in " ".join(result.output.split())
    assert read_weights(weights)["a"] == 1
