"""The scripts in examples/ run as their first lines say, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def said_by(script: str, *options: str, launcher: tuple[str, ...] = ()) -> str:
    command = (sys.executable, *launcher, str(EXAMPLES / script), *options)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    (found,) = re.findall(pattern, text)
    return float(found)


def test_image_classification() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    said = said_by("image_classification.py", "--epochs", "4", "--k", "2")
    assert number(r"([\d.]+) passes a step", said) == 1.5
    assert number(r"test accuracy ([\d.]+)", said) > 0.9


def test_finetune_transformer() -> None:
    said = said_by("finetune_transformer.py", "--pretraining-steps", "200", "--steps", "150")
    assert number(r"test accuracy ([\d.]+)", said) > 0.9


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_transformer() -> None:
    said = said_by("muon_transformer.py", "--steps", "80")
    assert number(r"test accuracy ([\d.]+)", said) > 0.9


def test_ddp() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    said = said_by("ddp.py", "--epochs", "2", "--m-sharpness", launcher=TORCHRUN)
    assert "2 processes, equal weights: True" in said
    assert number(r"epoch 2: last loss ([\d.]+)", said) < 1.5
    assert said.count("epoch 1") == 1, "one process speaks"
