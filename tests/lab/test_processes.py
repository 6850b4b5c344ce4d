"""``torchrun -m looksam.lab.cli``: two processes with gloo, beside one process with the same batches."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch

from looksam.lab.config import DataConfig, TrainConfig
from looksam.lab.data import load_dataset
from looksam.lab.options import check_processes
from looksam.lab.processes import World
from looksam.lab.train import train_run

from .test_checkpoint import records
from .test_precision import Double

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# One process has the batch norms see what two processes show them if it takes two micro-batches.
CONFIG = TrainConfig(
    "looksam-3", epochs=2, data=DataConfig(train_size=80), batch_size=16, width=0.25, augment="basic", accumulate=2,
    device="cpu", threads=1,
)  # fmt: skip
OPTIONS = [
    *("train", "looksam-3", "--epochs", 2, "--train-size", 80, "--batch-size", 16, "--width", 0.25),
    *("--augment", "basic", "--device", "cpu", "--threads", 1),
]
CASES = {
    "ddp": OPTIONS,
    "ddp-resumed": [*OPTIONS, "--checkpoint-every", 1, "--resume"],
    "fsdp": [*OPTIONS, "--fsdp"],
    "fsdp-resumed": [*OPTIONS, "--fsdp", "--checkpoint-every", 1, "--resume"],
    "m-sharpness": [*OPTIONS, "--m-sharpness"],
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """One start of two processes for all cases, as most of the time goes to starting them. By case: the ranks' states."""
    folder = tmp_path_factory.mktemp("ranks")
    for case, options in CASES.items():
        (folder / f"{case}.json").write_text(json.dumps([*map(str, options), "--out", str(folder / case)]))
    program = Path(__file__).with_name("several_processes.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
        + [str(folder / f"{case}.json") for case in CASES],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "FutureWarning" not in done.stderr, done.stderr[-4000:]
    states = {case: [torch.load(folder / f"{case}.rank{rank}") for rank in (0, 1)] for case in CASES}
    return SimpleNamespace(folder=folder, output=done.stdout, **{k.replace("-", "_"): v for k, v in states.items()})


@pytest.fixture(scope="module")
def alone():
    """One process with the same batches, and the same in float64."""
    exact = Double(CONFIG, load_dataset(CONFIG.data, CONFIG.seed))
    for _ in range(CONFIG.epochs):
        exact.train_epoch()
    return train_run(CONFIG), exact


def flat(model):
    return torch.cat([x.flatten() for name, x in model.items() if not name.endswith(BUFFERS)]).double()


def assert_ranks_agree(ranks):
    first, second = ranks
    for name, x in first["model"].items():
        assert torch.equal(x, second["model"][name]), name
    assert first["q"]
    assert all(torch.equal(q, r) for q, r in zip(first["q"], second["q"], strict=True))


def assert_equal_to_one_process(ranks, alone):
    """Two processes err, beside float64, by no more than twice what one does."""
    one, exact = (flat(trainer.model.state_dict()) for trainer in alone)
    error, allowed = (flat(ranks[0]["model"]) - exact).norm(), (one - exact).norm()
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.norm()


def test_ddp(outcomes, alone):
    assert_ranks_agree(outcomes.ddp)
    assert_equal_to_one_process(outcomes.ddp, alone)
    assert outcomes.ddp[0]["sharded"] == []


def test_fsdp(outcomes, alone):
    assert_ranks_agree(outcomes.fsdp)
    assert_equal_to_one_process(outcomes.fsdp, alone)
    assert set(outcomes.fsdp[0]["sharded"]) == {name for name, _ in alone[0].model.named_parameters()}


def test_m_sharpness(outcomes, alone):
    """The optimizer's own tests compare it with a hand-written loop; here: the option reaches it."""
    assert_ranks_agree(outcomes.m_sharpness)
    one, other = flat(alone[0].model.state_dict()), flat(outcomes.m_sharpness[0]["model"])
    assert (other - one).norm() > 1e-3 * one.norm()


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_runs_of_several_processes_resume_to_the_same_bits(case, outcomes):
    whole, resumed = (getattr(outcomes, name) for name in (case, f"{case}_resumed"))
    assert_ranks_agree(resumed)
    for name, x in whole[0]["model"].items():
        if not name.endswith(BUFFERS):  # the second process's own running statistics are not kept
            assert torch.equal(x, resumed[0]["model"][name]), name


def test_only_the_first_process_writes_and_prints(outcomes, alone):
    for case in CASES:
        found = records(outcomes.folder / case)
        assert [r["epoch"] for r in found] == [1, 2]
        assert [r["passes"] for r in found] == [7, 7]  # 10 steps, k = 3
        assert outcomes.output.count(str(outcomes.folder / case / "report.md")) == 1
    for record, expected in zip(records(outcomes.folder / "ddp"), alone[0].records, strict=True):
        assert record["train_loss"] == pytest.approx(expected.train_loss, rel=1e-4)  # of both halves of the batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": True, "m_sharpness": True}, "--m-sharpness needs each process's own gradient"),
        ({"jobs": 2}, "--jobs: under torchrun"),
        ({"m_sharpness": True, "methods": ["sgd"]}, "no method given perturbs; use one of .*looksam"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    values = {"fsdp": False, "m_sharpness": False, "jobs": None, "methods": ["sam"]} | options
    with pytest.raises(click.UsageError, match=message):
        check_processes(values, values["methods"], World(0, 2, 2, started_by_torchrun=True))
