"""The device's clock, on a device and a host that are simulated: what it measures holds nothing of the host's time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import Run

LAUNCH, KERNEL = 10e-3, 3e-3
"""Milliseconds: the host is slower than the device."""
CYCLES_PER_MS = 1_980_000


class Machine:
    """An asynchronous device: the host queues work and goes on, the device does it in order, as soon as it can."""

    def __init__(self) -> None:
        self.host = 0.0
        """The time on the host, in milliseconds."""
        self.free = 0.0
        """When the device will have done all that it was given."""

    def work(self, ms: float, launch: float = LAUNCH) -> None:
        self.host += launch
        self.free = max(self.free, self.host) + ms

    def sleep(self, cycles: int) -> None:
        self.work(cycles / CYCLES_PER_MS)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def event(self, **_: Any) -> Event:
        return Event(self)


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def record(self) -> None:
        self.at = max(self.machine.free, self.machine.host)

    def query(self) -> bool:
        return self.at <= self.machine.host

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1e-3 * made.host)
    return made


def measured(clock: timing.Clock, **steps: Callable[[], Any]) -> dict[str, float]:
    runs = {name: Run(lambda: None, step) for name, step in steps.items()}
    return {name: timed.median_ms for name, timed in timing.measure(runs, clock, 1e-3, 5).items()}


def test_the_host_is_not_in_the_measured_time(machine: Machine) -> None:
    """Also of contenders whose hosts take differently long, in turns."""

    def one() -> None:
        machine.work(KERNEL)

    def many() -> None:
        for _ in range(300):
            machine.work(KERNEL)

    clock = timing.DeviceClock()
    assert measured(clock, one=one, many=many) == pytest.approx({"one": KERNEL, "many": 300 * KERNEL})
    assert (clock.exposed[one], clock.exposed[many]) == (0, 0)


def test_a_host_whose_time_varies_is_covered(machine: Machine) -> None:
    slowness = iter([1.0, *(1 + i % 2 for i in range(1000))])

    def step() -> None:
        factor = next(slowness)
        for _ in range(20):
            machine.work(KERNEL, launch=LAUNCH * factor)

    assert measured(timing.DeviceClock(), step=step) == pytest.approx({"step": 20 * KERNEL})


def test_runs_that_were_not_covered_are_counted(machine: Machine) -> None:
    """A step that waits for the device: its pauses are its own, and are measured."""

    def step() -> None:
        for _ in range(2):
            machine.work(KERNEL)
            machine.synchronize()

    clock = timing.DeviceClock()
    found = measured(clock, step=step)["step"]
    assert found == pytest.approx(2 * KERNEL + LAUNCH)
    assert clock.exposed[step] > 0


def test_the_host_clock_measures_the_host_alone(machine: Machine) -> None:
    def step() -> None:
        for _ in range(10):
            machine.work(50 * KERNEL)

    times = [timing.host_clock(step) for _ in range(3)]
    assert statistics.median(times) == pytest.approx(10 * LAUNCH)
