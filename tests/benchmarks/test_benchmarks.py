"""The benchmarks measure what they say: shapes, bytes, peers that end where they should, tables made from the file alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import peers, report, run, timing
from benchmarks.cases import OPS, STEPS, Arena, Run
from benchmarks.shapes import LISTS
from benchmarks.targets import CPU, GPU

TOTALS = {
    "vit-s": (152, 22_050_664),
    "vit-b": (152, 86_567_656),
    "resnet-18": (62, 11_689_512),
    "resnet-50": (161, 25_557_032),
}
SMALL = [(3, 5), (7,), (1,), (64, 33)]


@pytest.mark.parametrize("name", TOTALS)
def test_lists_have_the_models_tensors_and_parameters(name: str) -> None:
    shapes = LISTS[name]()
    assert (len(shapes), sum(map(math.prod, shapes))) == TOTALS[name]


def test_many_is_the_same_every_time() -> None:
    shapes = LISTS["many"]()
    assert len(shapes) == 4000
    assert shapes == LISTS["many"]()
    assert all(1 <= n <= 2000 for (n,) in shapes)


def test_bytes_are_those_of_the_passes() -> None:
    declared = {case.name: case.bytes_per_param for case in STEPS}
    assert declared == {
        "AdamW": 28,
        "SAM": 48,
        "SAM, preconditioned": 56,
        "LookSAM refresh": 64,
        "LookSAM reuse": 36,
        "LAMB": 40,
        "Look-LayerSAM refresh + LAMB": 80,
        "Look-LayerSAM reuse + LAMB": 48,
        "MSAM": 36,
        "S2-SAM": 40,
        "AdamW, unchecked": 28,
        "SAM, unchecked": 48,
        "LAMB, unchecked": 40,
    }


def test_targets_name_cases_lists_and_peers() -> None:
    cases = {case.name: case for case in (*STEPS, *OPS)}
    for target in (*CPU, *GPU):
        assert target.peer in {peers.YARDSTICK, *cases[target.case].peers}
        assert set(target.shapes) <= set(LISTS)


@pytest.mark.parametrize("case", [*STEPS, *OPS], ids=lambda case: case.name)
def test_cases_run_again_and_again(case: Any) -> None:
    arena = Arena(SMALL, backend="reference")
    ready = case.build(arena)
    for _ in range(3):
        run.first_step(ready)
    assert all(p.isfinite().all() for p in arena.params)


def test_a_reuse_step_reuses_and_a_sharp_step_takes_two_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    handed, closure = [], Arena.closure
    monkeypatch.setattr(Arena, "closure", lambda self, *given: handed.append(len(given)) or closure(self, *given))
    arena = Arena(SMALL, backend="reference")
    cases = {case.name: case.build(arena) for case in STEPS}
    for name, calls in (("LookSAM refresh", 2), ("LookSAM reuse", 1), ("SAM", 2), ("AdamW", 1)):
        handed.clear()
        for _ in range(2):
            run.first_step(cases[name])
        assert handed == [calls, calls], name


@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != run.COMPILED])
def test_peers_take_the_step_or_say_why_not(name: str) -> None:
    arena = Arena(SMALL)
    before = [p.detach().clone() for p in arena.params]
    try:
        ready = peers.PEERS[name].build(arena)
    except peers.Missing as reason:
        pytest.skip(str(reason))
    for _ in range(3):
        run.first_step(ready)
    assert all(p.isfinite().all() and not p.equal(old) for p, old in zip(arena.params, before, strict=True))


def test_the_loop_is_sam() -> None:
    """The restated loop, against the definition: the base's step from w with the gradient at w + e."""
    loop, plain = Arena(SMALL), Arena(SMALL)
    opt = peers.LoopSAM(loop.params, torch.optim.AdamW(loop.params, **peers.BASE), rho=0.05)
    norm = math.sqrt(sum(float(g.square().sum()) for g in loop.g))
    expected = [p.detach() + 0.05 / norm * g for p, g in zip(loop.params, loop.g, strict=True)]

    def closure() -> None:
        for p, e in zip(loop.params, expected, strict=True):
            torch.testing.assert_close(p.detach(), e)
        loop.hand_over(loop.s)

    opt.step(closure)
    plain.hand_over(plain.s)
    torch.optim.AdamW(plain.params, **peers.BASE).step()
    assert all(torch.equal(p, q) for p, q in zip(loop.params, plain.params, strict=True))


def test_peers_are_spread_over_rounds_that_fit() -> None:
    names = ["pytorch_optimizer SAM", "pytorch_optimizer SAM, fused base", "davda54-style SAM"]
    assert run.rounds(names, 100) == [names]
    assert run.rounds(names, 1) == [[name] for name in names]
    assert run.rounds([], 1) == [[]]


def test_command_writes_a_file_and_a_table_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "COPIED", 2**16)
    monkeypatch.setattr(peers, "copy", lambda device, numel=2**16: original(device, numel))
    monkeypatch.setitem(LISTS, "tiny", lambda: SMALL)
    threads = torch.get_num_threads()
    run.main(["--quick", "--only", "LookSAM", "--backend", "reference", "--shapes", "tiny", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    data, table = sorted(tmp_path.iterdir())
    result = json.loads(data.read_text())
    assert {r["case"] for r in result["measured"]} == {"LookSAM refresh", "LookSAM reuse"}
    assert all(peers.YARDSTICK in r["peers"] for r in result["measured"])
    assert table.read_text() == report.markdown(result)
    assert "LookSAM reuse" in capsys.readouterr().out


def test_a_long_run_may_come_in_pieces() -> None:
    def result(revision: str, *cases: tuple[str, str, float]) -> dict[str, Any]:
        measured = [{"shapes": shapes, "case": case, "median_ms": ms} for shapes, case, ms in cases]
        same = {"machine": "m", "versions": "v", "options": {"threads": 2}}
        return same | {"revision": revision, "measured": measured, "missing": []}

    first = result("a", ("vit-s", "SAM", 1.0), ("vit-s", "LAMB", 2.0))
    assert run.together(first, result("a", ("vit-s", "SAM", 3.0)))["measured"] == [
        {"shapes": "vit-s", "case": "LAMB", "median_ms": 2.0},
        {"shapes": "vit-s", "case": "SAM", "median_ms": 3.0},
    ]
    assert run.together(first, result("b", ("vit-b", "SAM", 3.0)))["measured"] == [
        {"shapes": "vit-b", "case": "SAM", "median_ms": 3.0}
    ]


original = peers.copy


def test_all_of_it_takes_less_than_ten_minutes_by_design(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the first steps and slow rounds take, as long as it is less than the rounds' shares."""
    monkeypatch.setattr(peers, "copy", lambda device: None)
    bench = run.Bench(run.options([]), Console())
    rounds = [r for name in run.options([]).shapes for cases in bench.chosen() for r in bench.rounds(name, cases)]
    assert len(rounds) > 60
    now = 0.0
    budget = run.Budget(run.options([]).minutes, len(rounds), lambda: now)
    for number in range(len(rounds)):
        first_steps = 90.0 if number == 0 else 1.0 + 8.0 * (number % 5 == 0)  # the first compiles
        now += first_steps + budget.seconds()
    assert 8 * 60 < now < 10 * 60


def test_a_budget_that_is_spent_leaves_the_shortest_rounds() -> None:
    now = 0.0
    budget = run.Budget(1.0, 3, lambda: now)
    assert budget.seconds() == 15.0
    now = 59.0
    assert budget.seconds() == run.SHORTEST
    now = 100.0
    assert budget.seconds() == run.SHORTEST


def test_slow_turns_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def step() -> None:
        nonlocal now
        now += 1.0

    def clock(step: Any) -> float:
        step()
        return 1e3

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    slow = Run(lambda: None, step)
    assert timing.measure({"a": slow}, clock, 0.2, 5)["a"].runs == timing.FEWEST
    assert timing.measure({"a": slow}, clock, 2.0, 5)["a"].runs == 5
    assert timing.measure({"a": slow}, clock, 9.0, 5)["a"].runs == 9
