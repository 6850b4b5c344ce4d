"""What a step communicates, and a model of its time over the number of GPUs.

``python -m benchmarks.communication`` prints the collectives of each variant's steps and draws ``docs/figures/scaling.png``
and ``.svg``; ``--help`` has the machine's numbers. :func:`collectives` is compared with what processes really send by
tests/distributed/test_communication.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

import looksam
from benchmarks.cases import STEPS
from benchmarks.shapes import LISTS
from looksam.plans import PLAIN, Plan, Variant
from looksam_kernels.formulas import DESCENTS, KEEP_NORM, STORED, Pair
from looksam_kernels.ops import pairs_of
from looksam_kernels.updates import BASES

BYTES = 4
"""Of an element of a gradient or a weight; those of the sums have 8."""


class Collective(NamedTuple):
    """``of``: gradients, weights or sums. ``elements`` before a reduce-scatter, after an all-gather."""

    kind: str
    of: str
    elements: int

    @property
    def bytes(self) -> int:
        return self.elements * (8 if self.of == "sums" else BYTES)


# What is sent ---------------------------------------------------------------------------------------------------------


def collectives(
    plan: Plan,
    base: str,
    shapes: Sequence[tuple[int, ...]],
    wrapper: str,
    *,
    units: Sequence[int] = (),
    m_sharpness: bool = False,
    check: bool = True,
    clips: bool | None = None,
) -> list[Collective]:
    """Those of one step, in no order, for float32 parameters.

    Args:
        shapes: of the parameters.
        wrapper: ``"ddp"``, all gradients in one bucket; or ``"fsdp2"``.
        units: of FSDP2, how many elements each sharded module has, the ranks' padding included; modules that keep their
            parameters between forward and backward (the outermost) are negative.
        m_sharpness, check, clips: the optimizer's ``m_sharpness``, ``nonfinite == "skip"`` and whether it has a
            ``max_grad_norm``; ``None``: as the base has by default.
    """
    numel = sum(map(math.prod, shapes))
    found: list[Collective] = []
    if wrapper == "ddp":
        alone = m_sharpness and len(plan.passes) > 1
        found += [Collective("all-reduce", "gradients", numel)] * (1 if alone else len(plan.passes))
        if alone:
            rule = DESCENTS[plan.descent]
            used = {*rule.inputs, *(x for pair in rule.pairs for x in pair)} - {plan.passes[-1].column, *STORED}
            found += [Collective("all-reduce", "gradients", numel)] * len(used)
            found.append(Collective("all-reduce", "sums", 1))  # was any gradient not finite?
        return found
    for _ in plan.passes:
        for unit in units:
            gathers = 1 if unit < 0 else 2
            found += [Collective("all-gather", "weights", abs(unit))] * gathers
            found.append(Collective("reduce-scatter", "gradients", abs(unit)))
    return found + [Collective("all-reduce", "sums", n * len(shapes)) for n in sums(plan, base, check, clips)]


def sums(plan: Plan, base: str, check: bool = True, clips: bool | None = None) -> list[int]:
    """How many numbers for each parameter tensor the ops of a step add up over the shards: one entry for each all-reduce."""
    known: set[Pair] = set()
    counts = []
    lars = BASES[base].takes_trust_ratio
    clips = BASES[base].max_grad_norm is not None if clips is None else clips
    for rule in (*(x.ascent for x in plan.passes if x.ascent is not None), plan.descent):
        new = {*pairs_of(rule, clip=clips, trust_ratio=lars, check=check)} - known
        known |= new
        if new:
            counts.append(len(new))
    norms = [1] if DESCENTS[plan.descent].writes in KEEP_NORM else []
    return counts + ([2] if base == "lamb" else []) + norms  # ||w||, ||u|| of each tensor; ||q|| of the new q


# How long it takes ----------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """``latency_us`` of a message between two GPUs, ``link_gb_s`` that a GPU sends and receives at once, ``memory_gb_s``
    of its memory; ``forward_ms`` and ``backward_ms`` of a pass on each GPU's own batch, the same for every number of GPUs."""

    latency_us: float = 5.0
    link_gb_s: float = 25.0
    memory_gb_s: float = 2000.0
    forward_ms: float = 15.0
    backward_ms: float = 30.0


def milliseconds(c: Collective, ranks: int, machine: Machine) -> float:
    """On ``ranks`` GPUs: n bytes, latency a, bandwidth b. Ring: an all-reduce sends 2 (p - 1) messages of n / p one after the
    other, an all-gather and a reduce-scatter half as many. Tree: 2 ceil(log2 p) messages of n. The faster one counts.
    Thakur, Rabenseifner & Gropp 2005.
    """
    if ranks == 1:
        return 0.0
    latency, per_byte = 1e-3 * machine.latency_us, 1e-6 / machine.link_gb_s
    ring = (ranks - 1) * (latency + c.bytes / ranks * per_byte)
    if c.kind != "all-reduce":
        return ring
    return min(2 * ring, 2 * math.ceil(math.log2(ranks)) * (latency + c.bytes * per_byte))


def step_ms(
    plan: Plan, sent: Sequence[Collective], update_bytes: int, ranks: int, machine: Machine, sharded: bool
) -> float:
    """Passes, update, and what of the communication is not hidden.

    Gradients and weights travel during the passes: of theirs, only what is longer than the backwards (gradients; with
    FSDP2 the whole passes) adds to the time. Sums are waited for. ``update_bytes``: the update's memory traffic on a whole
    model; a shard has 1 / ranks of it.
    """
    passes = len(plan.passes)
    hiding = passes * (machine.backward_ms + (machine.forward_ms if sharded else 0))
    travelling = sum(milliseconds(c, ranks, machine) for c in sent if c.of != "sums")
    waited = sum(milliseconds(c, ranks, machine) for c in sent if c.of == "sums")
    update = 1e-6 * update_bytes / machine.memory_gb_s / (ranks if sharded else 1)
    return passes * (machine.forward_ms + machine.backward_ms) + max(0.0, travelling - hiding) + waited + update


class Method(NamedTuple):
    """A line of the figure: its plans, how many of ``k`` steps are sharp (one), and the cases of its updates."""

    name: str
    base: str
    sharp: Plan
    between: Plan
    k: int
    sharp_case: str
    between_case: str

    def milliseconds(
        self, shapes: Sequence[tuple[int, ...]], ranks: int, machine: Machine, wrapper: str, units: Sequence[int]
    ) -> float:
        """Mean of a cycle."""
        bytes_of = {case.name: case.bytes_per_param for case in STEPS}
        numel = sum(map(math.prod, shapes))
        total = 0.0
        for plan, case, times in ((self.sharp, self.sharp_case, 1), (self.between, self.between_case, self.k - 1)):
            sent = collectives(plan, self.base, shapes, wrapper, units=units)
            update = numel * bytes_of[case]
            total += times * step_ms(plan, sent, update, ranks, machine, sharded=wrapper == "fsdp2")
        return total / self.k


def methods() -> list[Method]:
    def of(cls: Any) -> Variant:
        return cls([Parameter(torch.zeros(1))], "sgd", lr=0.1, backend="reference").variant

    sam, look, layer = of(looksam.SAM), of(looksam.LookSAM), of(looksam.LookLayerSAM)
    lamb = "Look-LayerSAM {} + LAMB"
    return [
        Method("AdamW", "adamw", PLAIN, PLAIN, 1, "AdamW", "AdamW"),
        Method("SAM", "adamw", sam.sharp, sam.sharp, 1, "SAM", "SAM"),
        Method("LookSAM, k = 5", "adamw", look.sharp, look.between, 5, "LookSAM refresh", "LookSAM reuse"),
        Method(
            "Look-LayerSAM + LAMB, k = 5", "lamb", layer.sharp, layer.between, 5,
            lamb.format("refresh"), lamb.format("reuse"),
        ),
    ]  # fmt: skip


RANKS = tuple(2**i for i in range(3, 11))


def vit_units(shapes: Sequence[tuple[int, ...]], blocks: int = 12) -> list[int]:
    """A ViT with one FSDP2 unit for each block, and one, kept between forward and backward, for the rest."""
    outside = [*shapes[:4], *shapes[-4:]]
    inside = sum(map(math.prod, shapes)) - sum(map(math.prod, outside))
    return [inside // blocks] * blocks + [-sum(map(math.prod, outside))]


def panels(machine: Machine, name: str = "vit-b") -> dict[str, dict[str, list[float]]]:
    """Milliseconds of a step for each number of GPUs in :data:`RANKS`: wrapper -> method -> numbers."""
    shapes = LISTS[name]()
    units = vit_units(shapes)
    return {
        title: {m.name: [m.milliseconds(shapes, p, machine, wrapper, units) for p in RANKS] for m in methods()}
        for wrapper, title in (("ddp", "DDP"), ("fsdp2", "FSDP2"))
    }


FIGURE = "scaling"


def table() -> str:
    """The collectives of a step as markdown: N elements of gradients or weights, T tensors."""
    lines = ["| step | DDP | DDP, m-sharpness | FSDP2: weights and gradients | FSDP2: sums, numbers for each tensor |"]
    lines.append("|---|---|---|---|---|")
    rows = [
        ("AdamW", "adamw", PLAIN),
        *((f"{m.name}, sharp", m.base, m.sharp) for m in methods()[1:]),
        *((f"{m.name}, reuse", m.base, m.between) for m in methods()[2:]),
    ]
    for name, base, plan in rows:
        ddp, alone = (collectives(plan, base, [(1,)], "ddp", m_sharpness=m) for m in (False, True))
        gradients = [sum(c.of == "gradients" for c in sent) for sent in (ddp, alone)]
        flag = " + 1 number" if any(c.of == "sums" for c in alone) else ""
        passes = len(plan.passes)
        added = " + ".join(map(str, sums(plan, base)))
        lines.append(
            f"| {name} | {gradients[0]} all-reduce{'s' * (gradients[0] > 1)} of N | {gradients[1]} of N{flag} | "
            f"{2 * passes} all-gathers, {passes} reduce-scatter{'s' * (passes > 1)} of N | {added} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.communication", description=__doc__)
    for field, default in Machine._field_defaults.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=float, default=default)
    parser.add_argument("--shapes", default="vit-b", choices=["vit-s", "vit-b"], help="parameter list (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the figure (%(default)s)")
    from benchmarks.figures import (
        scaling,
    )  # matplotlib takes a second to import, which the tests' processes do not need

    args = vars(parser.parse_args(argv))
    folder, name = args.pop("out"), args.pop("shapes")
    print(table())
    drawn = panels(Machine(**args), name)
    for path in scaling(folder, FIGURE, [[*RANKS], drawn]):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
