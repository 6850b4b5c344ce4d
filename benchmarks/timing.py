"""Clocks, and how contenders are measured: after a warm-up, in turns, without the garbage collector; medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from benchmarks.cases import Run

Clock = Callable[[Callable[[], Any]], float]
"""Calls a function and returns milliseconds."""


def wall_clock(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


SPIN_PER_MS = 3_000_000
"""Cycles, of which no GPU makes more in a millisecond."""


class DeviceClock:
    """Milliseconds of the device alone, between two events on the current stream.

    A spinning kernel before the first event holds the device back until the host has launched the whole step: otherwise the
    device would start at once and wait for each launch, and the host's time would be measured. The spin is twice as long as
    the host took in the first run of a step, which has none: :func:`measure` throws that one away.
    """

    def __init__(self) -> None:
        self._host_ms: WeakKeyDictionary[Callable[[], Any], float] = WeakKeyDictionary()
        self.exposed: WeakKeyDictionary[Callable[[], Any], int] = WeakKeyDictionary()
        """In how many runs of a step, the first apart, the device was not held back long enough, so that their times may
        hold the host's. A step that waits for the device counts each time; the device's idling is then its own."""

    def __call__(self, step: Callable[[], Any]) -> float:
        known = step in self._host_ms
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if known:
            torch.cuda._sleep(int(2 * self._host_ms[step] * SPIN_PER_MS))
        begin.record()
        host_ms = wall_clock(step)
        end.record()
        exposed = begin.query()
        torch.cuda.synchronize()
        if known:
            self.exposed[step] += exposed
        else:
            self._host_ms[step], self.exposed[step] = host_ms, 0
        return begin.elapsed_time(end)


def host_clock(step: Callable[[], Any]) -> float:
    """How long the host is busy: nothing is waiting on the device before, and nobody waits for it after."""
    torch.cuda.synchronize()
    return wall_clock(step)


class Timing(NamedTuple):
    """Milliseconds: median, first and third quartile, of so many runs."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    runs: int


FEWEST = 3


def measure(
    contenders: Mapping[str, Run], clock: Clock, seconds: float, at_least: int, flush: Callable[[], Any] | None = None
) -> dict[str, Timing]:
    """All contenders in turns, A B C A B C ..., so that a busy moment of the machine hits each alike.

    Every contender has run before. The number of turns is what fits into ``seconds``, at least ``at_least``; but :data:`FEWEST`
    where these take longer than three times ``seconds``. ``flush`` is called before each run, to leave everyone the same cache.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}

    def turn() -> None:
        for name, run in contenders.items():
            run.prepare()
            if flush is not None:
                flush()
            times[name].append(clock(run.step))

    gc.collect()
    gc.disable()
    try:
        one_turn = 1e-3 * wall_clock(turn)
        for t in times.values():
            t.clear()
        end = time.perf_counter() + 3 * seconds
        for number in range(max(at_least, min(int(seconds / one_turn), 300))):
            if number >= FEWEST and time.perf_counter() > end:
                break
            turn()
    finally:
        gc.enable()
    return {name: _timing(t) for name, t in times.items()}


def _timing(times: list[float]) -> Timing:
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(median, q1, q3, len(times))


def launches(run: Run) -> int:
    """Kernels, copies and fills that one step starts on the device."""
    run.prepare()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.step()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(e, "is_user_annotation", False) for e in on_device)


def synchronises(run: Run) -> bool:
    """Does one step make the host wait for the device, as far as torch notices?"""
    run.prepare()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
