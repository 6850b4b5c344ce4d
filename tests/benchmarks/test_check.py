"""``make bench-check``, on results that were made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import check, machine, run
from benchmarks.check import Change
from benchmarks.peers import YARDSTICK

MACHINE = {"cpu": "A", "cores": 2, "simd": "AVX2", "slug": "cpu-a"}


def result(ratios: dict[str, float], day: int = 1, others: float = 0.0, params: int = 10**8, **given: Any) -> Any:
    measured = [
        {"shapes": "vit-s", "case": case, "params": params, "others_percent": others,
         "peers": {YARDSTICK: {"ratio": 1 / ratio}}}
        for case, ratio in ratios.items()
    ]  # fmt: skip
    options = {"device": "cpu", "threads": given.pop("threads", 2)}
    return {"date": f"2026-01-0{day}", "machine": MACHINE | given, "options": options, "measured": measured}


def written(folder: Path, name: str, content: Any) -> Path:
    (path := folder / f"{name}.json").write_text(json.dumps(content))
    return path


BEFORE = {"SAM": 2.0, "LookSAM reuse": 1.2, "step AdamW": 0.8}


@pytest.mark.parametrize(
    ("now", "verdicts"),
    [
        ({"SAM": 2.29, "LookSAM reuse": 1.2, "step AdamW": 0.99}, ["as before", "as before", "as before"]),
        ({"SAM": 2.31, "LookSAM reuse": 1.2, "step AdamW": 0.8}, ["SLOWER", "as before", "as before"]),
        ({"SAM": 2.0, "LookSAM reuse": 1.0, "step AdamW": 1.01}, ["as before", "faster", "SLOWER"]),
    ],
)
def test_the_margins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], now: dict[str, float], verdicts: list[str]
) -> None:
    old, new = written(tmp_path, "old", result(BEFORE)), written(tmp_path, "new", result(now))
    found = check.changes(result(BEFORE), result(now))
    assert [x.verdict for x in found] == verdicts
    assert check.main([str(new), "--against", str(old)]) == ("SLOWER" in verdicts)
    lines = capsys.readouterr().out.splitlines()
    assert "old.json" in lines[0]
    assert [line.rsplit("%")[-1].strip() for line in lines[1:]] == verdicts


def test_margins_are_those_of_steps_and_of_ops() -> None:
    assert Change("vit-s", "LAMB", 1, 1).margin == 15
    assert Change("vit-s", "perturb", 1, 1).margin == 25


def test_the_newest_of_the_same_kind_of_machine(tmp_path: Path) -> None:
    now = result(BEFORE, day=9)
    for name, other in {
        "early": result(BEFORE, day=1),
        "late": result(BEFORE, day=3),
        "processor": result(BEFORE, day=5, cpu="B"),
        "threads": result(BEFORE, day=6, threads=4),
        "cores": result(BEFORE, day=7, cores=8),
        "simd": result(BEFORE, day=8, simd="AVX512"),
    }.items():
        written(tmp_path, name, other)
    written(tmp_path, "memory", {"date": "2026-01-09", "peaks": []})  # another command's
    assert check.committed(now, tmp_path).stem == "late"
    with pytest.raises(LookupError, match=r"no committed result of this kind of machine.*'C'.*make bench"):
        check.committed(result(BEFORE, cpu="C"), tmp_path)


def test_what_was_disturbed_or_small_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for now in (result(BEFORE, others=11.0), result(BEFORE, params=run.LARGE), result({"LAMB": 1.0})):
        with pytest.raises(LookupError, match="nothing to compare"):
            check.changes(result(BEFORE), now)
    busy = written(tmp_path, "busy", result(BEFORE, others=50.0))
    assert check.main([str(busy), "--against", str(written(tmp_path, "old", result(BEFORE)))]) == 2
    assert "wait until the machine is quiet" in " ".join(capsys.readouterr().out.split())


def test_it_measures_when_no_result_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(argv: list[str]) -> None:
        assert "--alone" in argv
        written(Path(argv[argv.index("--out") + 1]), "cpu-a-2026-01-02", result(BEFORE))

    monkeypatch.setattr(run, "main", measure)
    slower = written(tmp_path, "old", result({name: 0.8 * ratio for name, ratio in BEFORE.items()}))
    assert check.main(["--against", str(slower)]) == 1
    assert check.main(["--against", str(written(tmp_path, "same", result(BEFORE)))]) == 0


def test_a_machine_without_committed_results_is_told_so_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "main", lambda argv: pytest.fail("it measured"))
    monkeypatch.setattr(machine, "describe", lambda device: MACHINE | {"cpu": f"none for {device}"})
    assert check.main(["--device", "cuda"]) == 2
    assert "none for cuda" in capsys.readouterr().out


def test_the_committed_results_equal_themselves() -> None:
    for path in check.RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        if "measured" in content:
            assert check.main([str(path), "--against", str(path)]) == 0
