"""Processes that stay for the whole test run, two where nothing else is said, with a gloo group between them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import distributed

WORLD = 2


def _work(rank: int, world: int, store: str, paths: list[str], inbox: Any, outbox: Any) -> None:
    sys.path[:0] = [path for path in paths if path not in sys.path]
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    while True:
        function, args = inbox.get()
        try:
            outbox.put((rank, function(rank, *args), None))
        except BaseException:
            outbox.put((rank, None, traceback.format_exc()))


class Ranks:
    """Runs a function on every rank; after a failure, which may have left a rank waiting, with new processes."""

    def __init__(self, folder: Path, world: int = WORLD) -> None:
        self._folder, self._world, self._generation = folder, world, 0
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._generation += 1
        store = str(self._folder / f"store{self._generation}")
        self._inboxes, self._outbox = [context.Queue() for _ in range(self._world)], context.Queue()
        self._processes = [
            context.Process(target=_work, args=(rank, self._world, store, sys.path, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(rank, *args)`` returned, by rank. Return lists and numbers, or tensors as numpy arrays."""
        if not self._processes:
            self._start()
        for inbox in self._inboxes:
            inbox.put((function, args))
        results: dict[int, Any] = {}
        try:
            for _ in range(self._world):
                rank, result, error = self._outbox.get(timeout=120)
                assert error is None, f"rank {rank}:\n{error}"
                results[rank] = result
        except BaseException:
            self._kill()
            raise
        return [results[rank] for rank in range(self._world)]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self._processes = []

    def close(self) -> None:
        """Nothing of theirs is worth waiting for."""
        self._kill()
