"""What a step sends: counted on two processes, nightly also on four, and compared with benchmarks/communication.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import looksam
from benchmarks import communication
from benchmarks.communication import Collective
from tests.contract.support import OPTIONS, VARIANTS
from tests.distributed.ranks import Ranks
from tests.nightly import NIGHTLY

KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
WIDTHS = (8, 12, 8)


class Sent(TorchDispatchMode):
    """Every collective that a process takes part in: kind, elements (those of the longer side) and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname not in ("barrier", "wait_tensor"):
            tensors = [x for x in torch.utils._pytree.tree_leaves(args[:2]) if isinstance(x, torch.Tensor)]
            total = max(x.numel() for x in tensors)
            self.seen.append((KINDS.get(func._opname, func._opname), total, tensors[0].element_size()))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Iterator[Ranks]:
    several = Ranks(tmp_path_factory.mktemp("four"), 4)
    yield several
    several.close()


def model_of(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [width * x for x in WIDTHS]
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], sizes[2]))


def wrapped(wrapper: str, width: int) -> nn.Module:
    """FSDP2's outermost module holds what is left: the second layer."""
    model: Any = model_of(width)
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    fully_shard(model[0])
    fully_shard(model)
    return model


def units(width: int) -> list[int]:
    first, second = (sum(p.numel() for p in model_of(width)[i].parameters()) for i in (0, 2))
    return [first, -second]


def steps(rank: int, cases: list[tuple[Any, ...]]) -> list[list[list[tuple[str, int, int]]]]:
    """What the second sharp step and the step after it send."""
    return [_steps(*case) for case in cases]


def _steps(wrapper: str, variant: str, base: str, width: int, options: dict[str, Any]) -> list[Any]:
    model = wrapped(wrapper, width)
    options = {"k": 2, **OPTIONS.get(variant, {}), **options}
    if "k" not in looksam.messages.arguments(VARIANTS[variant]):
        del options["k"]
    if options.get("m_sharpness"):
        options["model"] = model
    if options.pop("paired", False):
        options["process_group"] = distributed.group.WORLD
    optimizer: Any = VARIANTS[variant](model.parameters(), base, lr=1e-3, **options)
    x = torch.randn(4, width * WIDTHS[0])

    def closure(kept: Any = None) -> torch.Tensor:
        optimizer.zero_grad()
        losses = model(x).square().mean(1)
        if optimizer.per_sample:
            return losses if kept is None else losses[kept]
        losses.mean().backward()
        return losses.mean()

    found = []
    for step in range(4):
        with Sent() as sent:
            optimizer.step(closure)
        if step >= 2:
            found.append(sent.seen)
    return found


def expected(wrapper: str, variant: str, base: str, width: int, options: dict[str, Any]) -> list[list[Collective]]:
    params = list(model_of(width).parameters())
    made = VARIANTS[variant](
        [nn.Parameter(torch.zeros(1))], "sgd", lr=0.1, backend="reference", **OPTIONS.get(variant, {})
    )
    sharp, between = made.variant[:2]
    given = {"m_sharpness": options.get("m_sharpness", False), "check": options.get("nonfinite") != "ignore"}
    plans = (sharp, between if "k" in looksam.messages.arguments(VARIANTS[variant]) else sharp)
    return [
        communication.collectives(
            plan, base, [p.shape for p in params], wrapper,
            units=units(width) if wrapper == "fsdp2" else (), **given,
        )
        for plan in plans
    ]  # fmt: skip


def compare(ranks: Ranks, cases: list[tuple[Any, ...]]) -> None:
    for of_rank in ranks.run(steps, cases):
        for case, found in zip(cases, of_rank, strict=True):
            for now, told in zip(found, expected(*case), strict=True):
                counted = Counter((kind, elements, elements * size) for kind, elements, size in now)
                flag = Counter({("all-reduce", 1, 4): sum(c.elements == 1 for c in told)})
                sent = Counter((c.kind, c.elements, c.bytes) for c in told if c.elements > 1)
                assert counted == sent + flag, case


BASES = ("adamw", "lamb", "lars")
DDP = [("ddp", variant, "adamw", 1, {}) for variant in ("sam", "looksam", "crsam", "vasso")]
ALONE = [
    ("ddp", variant, "adamw", 1, {"m_sharpness": True})
    for variant in ("sam", "looksam", "ssam", "wsam", "vasso", "crsam", "sampa")
]
SHARDED = [
    *(("fsdp2", variant, base, 1, {}) for variant in ("sam", "looksam", "looklayersam") for base in BASES),
    *(("fsdp2", variant, "adamw", 1, {}) for variant in ("gsam", "crsam", "friendlysam")),
    *(("fsdp2", variant, base, 1, {"nonfinite": "ignore"}) for variant in ("sam", "wsam") for base in BASES),
]


@pytest.mark.parametrize("cases", [DDP, ALONE, SHARDED], ids=["DDP", "m-sharpness", "FSDP2"])
def test_two_ranks_send_what_the_model_says(ranks: Ranks, cases: list[tuple[Any, ...]]) -> None:
    compare(ranks, cases)


@pytest.mark.skipif(not NIGHTLY, reason="nightly: four processes take long to start on two cores")
def test_four_ranks_send_the_same(four: Ranks) -> None:
    compare(four, [DDP[1], ALONE[1], SHARDED[2], SHARDED[5], SHARDED[-1]])


def test_sampa_on_two_ranks_exchanges_the_gradients_once(ranks: Ranks) -> None:
    for of_rank in ranks.run(paired_steps):
        for sent in of_rank:
            assert sent == [("all-gather", _numel(model_of(1)), 4)]


def paired_steps(rank: int) -> list[list[tuple[str, int, int]]]:
    model = model_of(1)
    options = {"process_group": distributed.group.WORLD, "previous_batch": False}
    optimizer = looksam.SAMPa(model.parameters(), "sgd", lr=0.1, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, WIDTHS[0])).square().mean()
        loss.backward()
        return loss

    found = []
    for step in range(4):
        with Sent() as sent:
            optimizer.step(closure)
        if step > 0:  # in the first they agree on which parameters have gradients
            found.append(sent.seen)
    return found


def test_no_collective_of_ours_grows_with_the_parameters(ranks: Ranks) -> None:
    """Of gradients and weights a step sends what its passes send; all else depends on the number of tensors alone."""
    cases = [
        (wrapper, variant, base, width, {})
        for width in (1, 8)
        for wrapper in ("ddp", "fsdp2")
        for variant in ("looksam", "looklayersam", "vasso")
        for base in ("adamw", "lamb")
    ]
    numel, tensors = ({width: f(model_of(width)) for width in (1, 8)} for f in (_numel, _tensors))
    for of_rank in ranks.run(steps, cases):
        found = dict(zip((case[:4] for case in cases), of_rank, strict=True))
        for wrapper, variant, base in dict.fromkeys(case[:3] for case in cases):
            pairs = zip(found[wrapper, variant, base, 1], found[wrapper, variant, base, 8], strict=True)
            for of_step, (small, large) in enumerate(pairs):
                grown = []
                for (kind, few, size), (same, many, _) in zip(small, large, strict=True):
                    assert kind == same
                    if few != many:
                        grown.append((kind, few, many))
                    else:
                        assert (kind, size) == ("all-reduce", 8)
                        assert few <= 4 * tensors[1] == 4 * tensors[8]
                passes = 1 if variant != "vasso" and of_step == 1 else 2
                if wrapper == "ddp":
                    assert grown == [("all-reduce", numel[1], numel[8])] * passes
                else:
                    assert Counter(kind for kind, *_ in grown) == {
                        "all-gather": 3 * passes,
                        "reduce-scatter": 2 * passes,
                    }


def _numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _tensors(model: nn.Module) -> int:
    return len(list(model.parameters()))


def test_the_documentation_has_the_table_and_the_figure_of_now() -> None:
    from benchmarks import figures

    docs = Path(__file__).parents[2] / "docs"
    assert communication.table() in (docs / "costs.md").read_text()
    drawn = communication.panels(communication.Machine())
    assert figures.shows(docs / "figures", communication.FIGURE, [[*communication.RANKS], drawn])
    drawn["DDP"]["SAM"][0] *= 1.001
    assert not figures.shows(docs / "figures", communication.FIGURE, [[*communication.RANKS], drawn])


# The model of the time ------------------------------------------------------------------------------------------------


def test_a_ring_and_a_tree_by_hand() -> None:
    machine = communication.Machine(latency_us=10.0, link_gb_s=10.0)
    large = Collective("all-reduce", "gradients", 10_000_000)  # 40 MB: 4 ms at 10 GB/s
    assert communication.milliseconds(large, 1, machine) == 0
    assert communication.milliseconds(large, 4, machine) == pytest.approx(2 * 3 * (0.01 + 1.0))
    half = large._replace(kind="reduce-scatter")
    assert communication.milliseconds(half, 4, machine) == pytest.approx(3 * (0.01 + 1.0))
    small = Collective("all-reduce", "sums", 125)  # 1,000 bytes: 0.0001 ms
    assert communication.milliseconds(small, 1024, machine) == pytest.approx(2 * 10 * (0.01 + 0.0001))


def test_what_the_passes_hide_costs_nothing_and_sums_are_waited_for() -> None:
    machine = communication.Machine(1.0, 1.0, 1000.0, 10.0, 20.0)
    plan = looksam.plans.PLAIN
    hidden, shown = (Collective("all-reduce", "gradients", n) for n in (10**6, 10**7))  # 4 and 40 ms by the ring of two
    sums = Collective("all-reduce", "sums", 1000)
    alone = communication.step_ms(plan, [], 10**9, 2, machine, sharded=False)
    assert alone == pytest.approx(10 + 20 + 1)
    assert communication.step_ms(plan, [hidden], 10**9, 2, machine, sharded=False) == alone
    more = communication.step_ms(plan, [shown], 10**9, 2, machine, sharded=False)
    assert more == pytest.approx(alone + communication.milliseconds(shown, 2, machine) - 20)
    waited = communication.step_ms(plan, [sums], 10**9, 2, machine, sharded=False)
    assert waited == pytest.approx(alone + communication.milliseconds(sums, 2, machine))
    assert communication.step_ms(plan, [], 10**9, 2, machine, sharded=True) == pytest.approx(10 + 20 + 0.5)
