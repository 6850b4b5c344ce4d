"""How much memory an optimizer needs: bytes for each parameter, counted at the allocator.

``python -m benchmarks.memory`` measures every variant over AdamW beside its peers, on the tensors of ResNet-18, writes
``benchmarks/results/memory-<date>.json`` and prints the table. Counted is every tensor that the process allocates from the
optimizer's construction on, with the gradients and without what a model's passes would need beside them; what the C++ code
allocates for itself is not (LAMB's buffer on a CPU, as large as the largest tensor). Float32, on the CPU; the numbers depend on
the code alone, not on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.nn import Parameter
from torch.optim import AdamW

import looksam
from benchmarks import machine, peers
from benchmarks.peers import Missing
from benchmarks.shapes import LISTS, Shape
from looksam.messages import arguments

RESULTS = Path(__file__).parent / "results"
K = 5
BASE: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
OPTIONS: dict[str, dict[str, Any]] = {
    "esam": {"gamma": 0.5},
    "sampa": {"previous_batch": False},
    "aesam": {"total_steps": 100, "lambda1": -1e3, "lambda2": -1e3},
    "aelooksam": {"total_steps": 100, "lambda1": -1e3, "lambda2": -1e3},
}
"""With which AE-SAM's steps are all sharp, and SAMPa's closure is that of the others."""


class Usage(NamedTuple):
    """Bytes for each parameter: ``kept`` between steps, when the gradients are gone, ``peak`` within a step, both with the weights'
    own; ``grown``: how much more is kept after a cycle than before it."""

    kept: float
    peak: float
    grown: float


# Counting -------------------------------------------------------------------------------------------------------------


class Allocated(NamedTuple):
    """Bytes more than before: at the most, and at the end."""

    peak: int
    left: int


def allocated(function: Callable[[], Any]) -> Allocated:
    """What a call allocates on the CPU, by whatever code: as torch's allocator reports it to the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    results: Any = profile.profiler
    events = sorted(_allocations(results.kineto_results.experimental_event_tree()))
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    return Allocated(peak, now)


def _allocations(events: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Time and bytes of each; negative where memory is given back."""
    todo = list(events)
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event.start_time_ns, event.extra_fields.alloc_size


class _Gradients(torch.autograd.Function):
    """A model whose backward allocates the gradients, and nothing else."""

    @staticmethod
    def forward(ctx: Any, samples: int, *params: Tensor) -> Tensor:  # type: ignore[override]
        ctx.params = params
        return torch.zeros(samples)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        params, ctx.params = ctx.params, ()
        return None, *(torch.full_like(p, 1e-3) for p in params)


def losses(params: Sequence[Parameter], samples: int = 2) -> Tensor:
    made: Tensor = _Gradients.apply(samples, *params)  # type: ignore[no-untyped-call]
    return made


# Contenders -----------------------------------------------------------------------------------------------------------

Step = Callable[[], Any]
"""One step, of which the gradients are made and deleted again."""


def ours(make: Callable[[Sequence[Parameter]], looksam.SharpnessAware]) -> Callable[[Sequence[Parameter]], Step]:
    def build(params: Sequence[Parameter]) -> Step:
        optimizer = make(params)

        def closure(kept: Tensor | None = None) -> Tensor:
            optimizer.zero_grad()
            made = losses(params)
            if optimizer.per_sample:
                return made if kept is None else made[kept]
            made.sum().backward()
            return made.sum().detach()

        def step() -> None:
            optimizer.step(closure)
            optimizer.zero_grad()

        return step

    return build


def variant(name: str, base: str = "adamw", **options: Any) -> Callable[[Sequence[Parameter]], Step]:
    cls = looksam.VARIANTS[name]
    given = BASE | OPTIONS.get(name, {}) | ({"k": K} if "k" in arguments(cls) else {}) | options
    return ours(lambda params: cls(params, base, **given))


def plain(make: Callable[[Sequence[Parameter]], Any]) -> Callable[[Sequence[Parameter]], Step]:
    """An optimizer that takes one gradient."""

    def build(params: Sequence[Parameter]) -> Step:
        optimizer = make(params)

        def step() -> None:
            losses(params).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


def closed(make: Callable[[Sequence[Parameter]], Any]) -> Callable[[Sequence[Parameter]], Step]:
    """One that wants the first gradient in place and a closure for the second."""

    def build(params: Sequence[Parameter]) -> Step:
        optimizer = make(params)

        def backward() -> None:
            losses(params).sum().backward()

        def closure() -> None:
            for p in params:
                p.grad = None
            with torch.enable_grad():
                backward()

        def step() -> None:
            backward()
            optimizer.step(closure)
            for p in params:
                p.grad = None

        return step

    return build


def _po(name: str) -> Any:
    return getattr(peers._installed("pytorch_optimizer"), name)


def _po_sam(fused: bool) -> Callable[[Sequence[Parameter]], Any]:
    return lambda params: _po("SAM")([{"params": list(params), "foreach": True}], AdamW, **BASE, fused=fused)


def _po_looksam(fused: bool) -> Callable[[Sequence[Parameter]], Any]:
    return lambda params: _po("LookSAM")(list(params), AdamW, k=K, foreach=True, **BASE, fused=fused)


OURS = {
    **{cls.__name__: variant(name) for name, cls in looksam.VARIANTS.items()},
    "LookLayerSAM over LAMB": variant("looklayersam", "lamb"),
    **{name: ours(lambda params, name=name: getattr(looksam, name)(params)) for name in ("LAMB", "LARS", "Lion")},
}
PEERS = {
    "torch AdamW, fused": plain(lambda params: AdamW(params, **BASE, fused=True)),
    "torch AdamW, foreach": plain(lambda params: AdamW(params, **BASE, foreach=True)),
    "SAM as a loop over tensors, over torch's AdamW": closed(
        lambda params: peers.LoopSAM(list(params), AdamW(params, **BASE))
    ),
    "pytorch_optimizer SAM, foreach": closed(_po_sam(fused=False)),
    "pytorch_optimizer SAM, over fused AdamW": closed(_po_sam(fused=True)),
    "pytorch_optimizer LookSAM, foreach": closed(_po_looksam(fused=False)),
    "pytorch_optimizer LookSAM, over fused AdamW": closed(_po_looksam(fused=True)),
    "pytorch_optimizer Lamb, foreach": plain(
        lambda params: _po("Lamb")(list(params), **BASE, weight_decouple=False, foreach=True)
    ),
}


def usage(
    build: Callable[[Sequence[Parameter]], Step], shapes: Sequence[Shape], dtype: torch.dtype = torch.float32
) -> Usage:
    """Of the second cycle of steps, when all state is there."""
    params = [Parameter(0.02 * torch.randn(shape, dtype=dtype)) for shape in shapes]
    numel = sum(p.numel() for p in params)
    made: list[Step] = []

    def cycle() -> None:
        if not made:
            made.append(build(params))
        for _ in range(K):
            made[0]()

    held, again = allocated(cycle).left, allocated(cycle)
    own = dtype.itemsize
    return Usage(own + (held + again.left) / numel, own + (held + again.peak) / numel, again.left / numel)


# The command ----------------------------------------------------------------------------------------------------------


def measure(shapes: Sequence[Shape]) -> dict[str, Any]:
    """The content of a result file."""
    found: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    for side, contenders in (("ours", OURS), ("peer", PEERS)):
        for name, build in contenders.items():
            try:
                found.append({"name": name, "side": side, **usage(build, shapes)._asdict()})
            except Missing as reason:
                missing.append({"name": name, "reason": str(reason)})
    return {
        "date": date.today().isoformat(),
        "versions": machine.versions(),
        "revision": machine.revision(),
        "params": sum(torch.Size(shape).numel() for shape in shapes),
        "memory": found,
        "missing": missing,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = ["| optimizer | between steps | at the peak of a step |", "|---|---:|---:|"]
    names = [f"looksam {r['name']}" if r["side"] == "ours" else r["name"] for r in result["memory"]]
    lines += [
        f"| {name} | {r['kept']:.1f} | {r['peak']:.1f} |" for name, r in zip(names, result["memory"], strict=True)
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--shapes", default="resnet-18", choices=list(LISTS), help="parameter list (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file (%(default)s)")
    args = parser.parse_args(argv)
    result = measure(LISTS[args.shapes]())
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"memory-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result), end="")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
