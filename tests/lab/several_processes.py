"""Started by torchrun: runs the command in each file given and stores this rank's final weights beside the file.

A command with ``--resume`` first runs without it and stops after a checkpoint in the second epoch.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from looksam.lab import parallel
from looksam.lab.checkpoint import Checkpoints
from looksam.lab.cli import main
from looksam.lab.train import train_run


class Stopped(Exception):
    pass


def run_up_to_a_checkpoint(command):
    """Every process stops after the fourth checkpoint; the first one has written it."""
    due, seen = Checkpoints.due, []

    def due_or_stop(self, step):
        if len(seen) == 4:
            raise Stopped
        seen.append(step)
        return due(self, step)

    Checkpoints.due = due_or_stop
    with suppress(Stopped):
        main([x for x in command if x != "--resume"], standalone_mode=False)
    Checkpoints.due = due


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_and_store(*arguments):
    trainer = train_run(*arguments)
    state = {
        "model": {name: whole(x) for name, x in trainer.model.state_dict().items()},
        "sharded": [name for name, x in trainer.model.named_parameters() if isinstance(x, DTensor)],
        "q": [whole(state["q"]) for state in trainer.optimizer.state.values()],
    }
    torch.save(state, case.with_suffix(f".rank{os.environ['RANK']}"))
    return trainer


distributed.init_process_group("gloo")  # once: a second group would meet the traces of the first one
parallel.train_run = train_and_store
for case in map(Path, sys.argv[1:]):
    command = json.loads(case.read_text())
    if "--resume" in command:
        run_up_to_a_checkpoint(command)
    main(command, standalone_mode=False)
distributed.destroy_process_group()
