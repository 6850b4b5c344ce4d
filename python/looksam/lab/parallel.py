"""Runs in several processes at once. A run that fails, or whose process dies, takes no other run with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import click

from .checkpoint import Checkpoints
from .config import TrainConfig
from .measure import EpochRecord
from .processes import ALONE, World
from .train import train_run

SECONDS_BETWEEN_NEWS = 0.5


@dataclass(frozen=True)
class Event:
    """News of a run: one of an epoch's record, a measurement of its study, the part of an epoch that is over, an error (see
    :func:`describe`), or none of them: the run is complete."""

    config: TrainConfig
    record: EpochRecord | None = None
    measurement: dict[str, Any] | None = None
    part: float | None = None
    error: str | None = None

    @property
    def ends_run(self) -> bool:
        return self.record is None and self.measurement is None and self.part is None


Listener = Callable[[Event], object]


class Worker:
    """A process that trains what it is sent, one run at a time, and sends back events."""

    def __init__(self, checkpoints: Checkpoints | None) -> None:
        context = multiprocessing.get_context("spawn")  # fork would break torch's threads and CUDA
        self.connection, theirs = context.Pipe()
        # Not daemonic, for those may have no children, and a run that streams its images has some.
        self.process = context.Process(target=_serve, args=(theirs, checkpoints))
        self.process.start()
        theirs.close()  # so that the death of the process is the end of file here
        self.config: TrainConfig | None = None

    def start(self, config: TrainConfig) -> None:
        self.config = config
        with contextlib.suppress(ConnectionError):  # a process that has died already: receive() says so
            self.connection.send(config)

    def receive(self) -> Event:
        assert self.config is not None
        try:
            event: Event = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return Event(self.config, error=f"its process died with exit status {self.process.exitcode}")
        return event

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, checkpoints: Checkpoints | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            config: TrainConfig = connection.recv()
        except EOFError:
            return
        try:
            run_here(config, connection.send, checkpoints)
        except Exception as error:  # whatever it is, it is this run's and gets reported under its name
            connection.send(Event(config, error=describe(error)))


def describe(error: Exception) -> str:
    """One sentence where the reason lies outside the program, else the traceback."""
    if isinstance(error, click.ClickException):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'while writing'}"
    return "".join(traceback.format_exception(error))


def _die_with_parent() -> None:
    """A parent that is killed cannot stop its processes: they would train, and write checkpoints, to the epoch's end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_here(
    config: TrainConfig, listener: Listener, checkpoints: Checkpoints | None = None, world: World = ALONE
) -> None:
    """Train in this process; the listener gets the events. What the run raises is passed on."""
    last_news = time.monotonic()

    def on_step(part: float) -> None:
        nonlocal last_news
        if time.monotonic() - last_news > SECONDS_BETWEEN_NEWS:
            last_news = time.monotonic()
            listener(Event(config, part=part))

    def on_epoch(record: EpochRecord) -> None:
        listener(Event(config, record))

    def on_measurement(values: dict[str, Any]) -> None:
        listener(Event(config, measurement=values))

    train_run(config, on_epoch, on_step, checkpoints, world, on_measurement)
    listener(Event(config))


def run_jobs(
    configs: Sequence[TrainConfig], jobs: int, checkpoints: Checkpoints | None = None
) -> Generator[Event, None, None]:
    """Train all ``configs``, ``jobs`` at a time, and yield the events as they come; close the iterator to stop."""
    waiting = deque(configs)
    workers: list[Worker] = []
    try:
        for _ in range(min(jobs, len(configs))):
            workers.append(Worker(checkpoints))
            workers[-1].start(waiting.popleft())
        while busy := {w.connection: w for w in workers if w.config is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                event = worker.receive()
                if event.ends_run:
                    worker.config = None
                    if not worker.process.is_alive():
                        workers[workers.index(worker)] = worker = Worker(checkpoints)
                    if waiting:
                        worker.start(waiting.popleft())
                yield event
    finally:
        for worker in workers:
            worker.stop()
