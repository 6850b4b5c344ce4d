"""Host time of a step: everything but the passes, where the arithmetic is next to nothing.

``python -m benchmarks.host`` runs reuse, sharp and plain steps over many small tensors in loops of their own, in turns
with torch's fused AdamW, and prints the fastest time of each, its ratio to AdamW's in the same run, and the Python
functions that one step calls. ``--tensors 4000`` shows what a tensor costs. ``--backend triton`` leaves the kernels out (they
would run in Triton's interpreter): what is timed is the host's work up to each launch. ``--no-extension`` is that of a machine
without the compiled extension.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.shapes import tiny
from looksam import SAM, LookSAM

YARDSTICK = "torch fused AdamW"
BASE: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}


class Closure:
    """Hands over ready-made gradients, two lists in turn, and adds up the time that this takes."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._gradients = [[torch.randn_like(p, requires_grad=False) for p in params] for _ in range(2)]
        self._turn = 0
        self.seconds = 0.0

    def __call__(self) -> None:
        begin = time.perf_counter()
        for p, x in zip(self._params, self._gradients[self._turn], strict=True):
            p.grad = x
        self._turn = 1 - self._turn
        self.seconds += time.perf_counter() - begin


class Loop(NamedTuple):
    """A contender: ``step`` makes one step; what its closure takes is not its own time."""

    step: Callable[[], Any]
    closure: Closure


def loops(tensors: int, backend: str | None) -> dict[str, Loop]:
    """Every contender has weights of its own, and has made the steps that create its state."""
    return {
        YARDSTICK: _adamw(_params(tensors)),
        "LookSAM reuse": _ours(LookSAM, _params(tensors), backend, k=10**9, warm_up=1),
        "LookSAM sharp": _ours(LookSAM, _params(tensors), backend, k=1),
        "SAM sharp": _ours(SAM, _params(tensors), backend),
        "SAM plain": _ours(SAM, _params(tensors), backend, k=10**9, warm_up=1),
    }


def _params(tensors: int) -> list[Parameter]:
    return [Parameter(0.02 * torch.randn(shape)) for shape in tiny(tensors)]


def _adamw(params: list[Parameter]) -> Loop:
    closure = Closure(params)
    closure()
    return Loop(torch.optim.AdamW(params, fused=True, **BASE).step, closure)


def _ours(cls: Any, params: list[Parameter], backend: str | None, warm_up: int = 0, **options: Any) -> Loop:
    optimizer, closure = cls(params, "adamw", backend=backend, **options, **BASE), Closure(params)
    for _ in range(warm_up):
        optimizer.step(closure)
    return Loop(lambda: optimizer.step(closure), closure)


def leave_out_launches() -> None:
    """Triton's kernels do not run, but for what the host reads of them: no gradient is infinite."""
    os.environ["TRITON_INTERPRET"] = "1"  # before torch's own AdamW imports triton
    from looksam_kernels.backends.triton.launch import Launch

    def launch(prepared: Launch, grid: Any, device: Any, *arguments: Any) -> None:
        if prepared.kernel.__name__ == "evaluate":
            arguments[6].zero_()

    Launch.__call__ = launch  # type: ignore[method-assign]


def leave_out_extension() -> None:
    from looksam_kernels.backends import native

    native._C = None


def microseconds(loop: Loop, steps: int) -> float:
    """Of one step, on average over a loop of them."""
    loop.closure.seconds = 0.0
    begin = time.perf_counter()
    for _ in range(steps):
        loop.step()
    return 1e6 * (time.perf_counter() - begin - loop.closure.seconds) / steps


def calls(loop: Loop) -> tuple[int, int]:
    """How many Python functions of this project one step calls, and how often control passes between its modules."""
    entered: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("looksam"):
            entered.append(frame.f_globals["__name__"])

    sys.setprofile(note)
    try:
        loop.step()
    finally:
        sys.setprofile(None)
    return len(entered), sum(a != b for a, b in pairwise(entered))


def measured(contenders: dict[str, Loop], seconds: float, steps: int) -> dict[str, float]:
    """Microseconds a step: of short loops in turns the fastest, the one that was disturbed least."""
    best = dict.fromkeys(contenders, float("inf"))
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for name, loop in contenders.items():
                best[name] = min(best[name], microseconds(loop, steps))
    finally:
        gc.enable()
    return best


def lines(tensors: int, backend: str | None, seconds: float, steps: int, only: str = "") -> Iterator[str]:
    contenders = {name: loop for name, loop in loops(tensors, backend).items() if only in name}
    best = measured(contenders, seconds, steps)
    yield f"{'':20}{'µs':>9}{'ratio':>8}{'µs/tensor':>11}{'calls':>7}{'modules':>9}"
    for name, us in best.items():
        own = "" if name == YARDSTICK else "{:7}{:9}".format(*calls(contenders[name]))
        ratio = f"{us / best[YARDSTICK]:8.3f}" if YARDSTICK in best else f"{'-':>8}"
        yield f"{name:20}{us:9.1f}{ratio}{us / tensors:11.3f}{own}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    add = parser.add_argument
    add("--tensors", type=int, default=152, help="of 1 to 16 elements each (%(default)s)")
    add("--backend", help="native, triton or reference; default: the fastest that is there")
    add("--threads", type=int, default=1, help="CPU threads, the same for all contenders (%(default)s)")
    add("--seconds", type=float, default=10.0, help="measuring time (%(default)s)")
    add("--steps", type=int, default=50, help="steps of one loop (%(default)s)")
    add(
        "--only",
        default="",
        help="contenders whose name contains this, such as 'LookSAM reuse'; without AdamW no ratios",
    )
    add("--no-extension", action="store_true", help="as without the compiled extension")
    args = parser.parse_args(argv)
    if args.backend == "triton":
        leave_out_launches()
    if args.no_extension:
        leave_out_extension()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for line in lines(args.tensors, args.backend, args.seconds, args.steps, args.only):
        print(line)


if __name__ == "__main__":
    main()
