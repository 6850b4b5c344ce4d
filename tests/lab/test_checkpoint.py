"""Runs that stop and go on: ``--checkpoint-every`` and ``--resume``."""

import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from looksam.lab.checkpoint import Checkpoints
from looksam.lab.cli import main
from looksam.lab.config import DataConfig, TrainConfig
from looksam.lab.data import load_dataset
from looksam.lab.files import replacing
from looksam.lab.train import Trainer, train_run

from .runs import comparable

# 5 steps an epoch and k = 3: the epochs begin in different phases of the cycle.
CONFIG = TrainConfig(
    "looksam-3", epochs=3, data=DataConfig(train_size=50), batch_size=10, width=0.25, augment="basic", mixup=0.2,
    options=(("alpha", 0.3),), device="cpu", threads=1,
)  # fmt: skip
OPTIONS = [
    *("looksam-3", "--epochs", 3, "--train-size", 50, "--batch-size", 10, "--width", 0.25, "--augment", "basic"),
    *("--mixup", 0.2, "--alpha", 0.3, "--device", "cpu", "--threads", 1),
]


def assert_same_model(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def stored(state):
    """As it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "sam+lamb", "options": ()}, {"method": "sgd", "options": ()}, {"amp": "fp16"}],
    ids=["looksam", "sam+lamb", "sgd", "fp16"],
)
def test_a_run_goes_on_from_any_step_bit_for_bit(changes, perceptron):
    config = replace(CONFIG, epochs=2, **changes)
    data = load_dataset(config.data, config.seed)
    whole, states = Trainer(config, data), []
    for _ in range(config.epochs):
        states.append(stored(whole.state_dict()))
        whole.train_epoch(lambda step: states.append(stored(whole.state_dict())))
    assert len(states) == 10
    for state in states:
        torch.manual_seed(random.randrange(2**32))
        continued = Trainer(config, data)
        continued.load_state_dict(state)
        while not continued.finished:
            continued.train_epoch()
        assert_same_model(continued.model.state_dict(), whole.model.state_dict())
        assert list(map(comparable, continued.records)) == list(map(comparable, whole.records))
        assert continued.precision.scaler.state_dict() == whole.precision.scaler.state_dict()


def looksam(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def records(folder):
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines if line["kind"] == "epoch"]


def kill_after_checkpoints(command, path, count):
    """Start it, and SIGKILL it some moment after the ``count``-th checkpoint that is seen."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen, deadline = set(), time.monotonic() + 300
    while len(seen) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
        if path.exists():
            seen.add(path.stat().st_mtime_ns)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    out, checkpoints = tmp_path / "out", Checkpoints(tmp_path / "out", resume=True)
    config = replace(CONFIG, data=DataConfig(train_size=350))  # 35 steps an epoch, long enough to be hit
    uninterrupted = train_run(config)
    command = ["train", *OPTIONS, "--train-size", 350, "--checkpoint-every", 1, "--out", out]
    program = [sys.executable, "-m", "looksam.lab.cli", *map(str, command)]
    kill_after_checkpoints(program, checkpoints.path(config), random.randrange(1, 30))
    state = checkpoints.load(config)
    assert len(state["records"]) < 3, "it was over before it could be killed"
    result = looksam(*command, "--resume")
    assert result.exit_code == 0, result.output
    assert_same_model(checkpoints.load(config)["model"], uninterrupted.model.state_dict())
    expected = [vars(comparable(record)) for record in uninterrupted.records]
    assert records(out) == [
        {"kind": "epoch"} | {k: v for k, v in record.items() if "seconds" not in k} for record in expected
    ]
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["looksam-3-seed-0.pt"]


def test_resuming_a_finished_experiment_only_reports_it(tmp_path, monkeypatch):
    """And errors of --resume name what to do."""
    checkpoints = Checkpoints(tmp_path)
    assert looksam("train", *OPTIONS, "--out", tmp_path, "--overwrite").exit_code == 0
    before = records(tmp_path)
    weights = checkpoints.path(CONFIG).read_bytes()
    again = looksam("train", *OPTIONS, "--out", tmp_path, "--resume")
    assert again.exit_code == 0
    assert records(tmp_path) == before
    assert checkpoints.path(CONFIG).read_bytes() == weights
    for changed, message in (
        (["--rho", 0.2], "--resume: methods differ(s) from what"),
        (["--lr", 0.2, "--epochs", 9], "--resume: epochs, lr differ(s) from what"),
        (["--seed", 1], "--resume: seeds differ(s)"),
    ):
        refused = looksam("train", *OPTIONS, *changed, "--out", tmp_path, "--resume")
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.split())
        (suggested,) = re.findall(r"again: looksam (train .*--resume)", " ".join(refused.output.split()))
        assert "--overwrite" not in suggested
    assert looksam(*shlex.split(suggested)).exit_code == 0  # though the experiment began with --overwrite
    assert records(tmp_path) == before
    for damage in (weights[:100], b"nonsense", b""):
        checkpoints.path(CONFIG).write_bytes(damage)
        refused = looksam("train", *OPTIONS, "--out", tmp_path, "--resume")
        assert refused.exit_code == 1
        assert f"{checkpoints.path(CONFIG)} is damaged" in " ".join(refused.output.split())
        assert records(tmp_path) == before
    checkpoints.path(CONFIG).unlink()
    refused = looksam("train", *OPTIONS, "--out", tmp_path, "--resume")
    assert "holds no checkpoint; leave --resume out and add --overwrite" in " ".join(refused.output.split())
    assert records(tmp_path) == before


def test_checkpoints_come_as_often_as_asked(tmp_path, monkeypatch, perceptron):
    steps = []

    def save(self, config, state):
        steps.append(5 * len(state["records"]) + (state["epoch"]["step"] if "epoch" in state else 0))

    monkeypatch.setattr(Checkpoints, "save", save)
    train_run(CONFIG, checkpoints=Checkpoints(tmp_path, every=3))
    assert steps == [3, 5, 8, 10, 13, 15]
    steps.clear()
    train_run(CONFIG, checkpoints=Checkpoints(tmp_path))
    assert steps == [5, 10, 15]


def test_a_new_experiment_does_not_go_on_from_an_old_ones_checkpoint(tmp_path, perceptron):
    checkpoints = Checkpoints(tmp_path)
    train_run(CONFIG, checkpoints=checkpoints)
    assert checkpoints.load(CONFIG) is None
    checkpoints.clear()
    assert not checkpoints.exist()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with replacing(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_every_method_has_a_file_of_its_own(tmp_path):
    names = ["sam", "sam-5", "sam:rho=0.1", "sam:rho=0.2", "sam+adam:betas=[0.9,0.99]", "sam+adam:betas=[0.9,0.999]"]
    paths = [Checkpoints(tmp_path).path(replace(CONFIG, method=name)) for name in names]
    assert len(set(paths)) == len(names)
    assert not any(set(path.name) & set(':/\\*?"<>|') for path in paths)
