"""Checkpoints: DIR/checkpoints/METHOD-seed-N.pt holds all that the rest of a run depends on, its records included."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import torch

from .config import TrainConfig
from .files import UNFINISHED, replacing

FOLDER = "checkpoints"
LONGEST = 150
"""Characters of a method in a file's name; file systems allow 255 for the whole of it."""


class DamagedCheckpoint(click.ClickException):
    """A file that cannot be read back; the message names it."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of an experiment's runs, one file a run, under the experiment's ``folder``.

    ``every``: steps between two of them; None: only at the end of each epoch, where there is always one.
    ``resume``: runs go on from theirs.
    """

    folder: Path
    every: int | None = None
    resume: bool = False

    def path(self, config: TrainConfig) -> Path:
        method = quote(config.method.replace(":", ",", 1), safe="+,=")
        if len(method) > LONGEST:
            method = f"{method[:LONGEST]}-{zlib.crc32(config.method.encode()):08x}"
        return self.folder / FOLDER / f"{method}-seed-{config.seed}.pt"

    def exist(self) -> bool:
        return any((self.folder / FOLDER).glob("*.pt"))

    def due(self, step: int) -> bool:
        """After this many steps of an epoch?"""
        return self.every is not None and step % self.every == 0

    def clear(self) -> None:
        """For a new experiment: removes those of the one before. Else: removes what a killed process left half done."""
        for file in (self.folder / FOLDER).glob(f"*.pt*{UNFINISHED}" if self.resume else "*.pt*"):
            file.unlink(missing_ok=True)

    def save(self, config: TrainConfig, state: dict[str, Any]) -> None:
        with replacing(self.path(config)) as file:
            torch.save(state, file)

    def load(self, config: TrainConfig) -> dict[str, Any] | None:
        """What the run goes on from; None: from the beginning. Raises DamagedCheckpoint."""
        path = self.path(config)
        if not self.resume or not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            state["model"], state["records"]
        except Exception as error:  # of a damaged file torch raises what its parts raise
            raise DamagedCheckpoint(
                f"{path} is damaged ({type(error).__name__}); remove it, and --resume trains this run anew"
            ) from error
        return state
