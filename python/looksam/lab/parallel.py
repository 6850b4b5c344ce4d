"""Runs in several processes at once. A run that fails, or whose process dies, takes no other run with it."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait

from .config import TrainConfig
from .train import EpochRecord, train_run


@dataclass(frozen=True)
class Event:
    """News of a run: exactly one of an epoch's record, an error (its traceback), or neither: the run is complete."""

    config: TrainConfig
    record: EpochRecord | None = None
    error: str | None = None


class Worker:
    """A process that trains what it is sent, one run at a time, and sends back events."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # fork would break torch's threads and CUDA
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that the death of the process is the end of file here
        self.config: TrainConfig | None = None

    def start(self, config: TrainConfig) -> None:
        self.config = config
        self.connection.send(config)

    def receive(self) -> Event:
        assert self.config is not None
        try:
            event: Event = self.connection.recv()
        except EOFError:
            self.process.join()
            return Event(self.config, error=f"its process died with exit status {self.process.exitcode}")
        return event

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    while True:
        try:
            config: TrainConfig = connection.recv()
        except EOFError:
            return
        connection.send(run_job(config, partial(_send_epoch, connection, config)))


def _send_epoch(connection: Connection, config: TrainConfig, record: EpochRecord) -> None:
    connection.send(Event(config, record))


def run_job(config: TrainConfig, on_epoch: Callable[[EpochRecord], None]) -> Event:
    """Train in this process; the event that ends the run, an error included."""
    try:
        train_run(config, on_epoch)
    except Exception:  # whatever it is, it is this run's and gets reported under its name
        return Event(config, error=traceback.format_exc())
    return Event(config)


def run_jobs(configs: Sequence[TrainConfig], jobs: int) -> Iterator[Event]:
    """Train all ``configs``, ``jobs`` at a time, and yield the events as they come; close the iterator to stop."""
    waiting = deque(configs)
    workers: list[Worker] = []
    try:
        for _ in range(min(jobs, len(configs))):
            workers.append(Worker())
            workers[-1].start(waiting.popleft())
        while busy := {w.connection: w for w in workers if w.config is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                event = worker.receive()
                if event.record is None:
                    worker.config = None
                    if not worker.process.is_alive():
                        workers[workers.index(worker)] = worker = Worker()
                    if waiting:
                        worker.start(waiting.popleft())
                yield event
    finally:
        for worker in workers:
            worker.stop()
