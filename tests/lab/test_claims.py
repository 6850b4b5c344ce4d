"""The sentences of ``looksam compare``, from results with known numbers."""

import json
import math
import re
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats

from looksam.lab.claims import claims, contender, difference_of
from looksam.lab.measure import EpochRecord
from looksam.lab.records import read_experiment

PASSES = {"sgd": 10, "sam": 20, "sam-5": 12, "looksam-5": 12, "asam": 20, "sgd:lr=1": 10, "sam:rho=1": 20}
PASSES |= {"sgd:batch_size=20": 10, "sam:batch_size=20": 20}


def experiment(folder, accuracy, diverged=(), **header):
    """Of one epoch; ``accuracy``: method -> that of each seed, in percent."""
    seeds = range(max(map(len, accuracy.values())))
    first = {"kind": "header", "methods": {method: {} for method in accuracy}, "seeds": list(seeds)}
    lines = [first | {"config": {"epochs": 1, "data": {"source": "digits", "label_noise": 0}}} | header]
    for method, values in accuracy.items():
        for seed, value in enumerate(values):
            record = EpochRecord(
                method,
                seed,
                1,
                1.0,
                1.0,
                value / 100,
                0.1,
                10,
                PASSES[method],
                1.0,
                0.1,
                "native",
                (method, seed) in diverged,
            )
            lines.append({"kind": "epoch"} | asdict(record))
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read_experiment(folder)


def test_a_gain_that_is_kept_and_one_that_is_lost(tmp_path):
    sentences = claims(
        experiment(
            tmp_path,
            {"sgd": [70, 72, 71], "sam": [80, 81, 83], "sam-5": [71, 72, 72], "looksam-5": [81, 81, 82]},
        )
    )
    assert len(sentences) == 3
    low, high = scipy.stats.t.interval(0.95, 2, loc=31 / 3, scale=scipy.stats.sem([10, 9, 12]))
    assert sentences[0].startswith(
        f"sam gains over sgd, +10.3 points (95 % interval {low:+.1f} to {high:+.1f}): 81.3 ± 0.9 % at 2.00 passes a step, "
        "71.0 ± 0.6 % at 1.00 passes a step."
    )
    assert sentences[1].startswith(
        "sam-5 loses more than half of that gain: 71.7 ± 0.3 % at 1.20 passes a step, -9.7 points"
    )
    assert sentences[2].startswith(
        "looksam-5 keeps more than half of that gain: 81.3 ± 0.3 % at 1.20 passes a step, +0.0 points"
    )


def test_what_the_numbers_do_not_show_is_not_claimed(tmp_path):
    noisy = {"sgd": [70, 72, 71], "sam": [60, 90, 75], "looksam-5": [71, 73, 74]}
    first, second = claims(experiment(tmp_path, noisy))
    assert first.startswith("Not shown: that sam gains over sgd, +4.0 points")
    assert second.startswith("Not shown: that looksam-5 gains over sgd, +1.7 points")
    kept = {"sgd": [70, 72, 71], "sam": [80, 81, 83], "looksam-5": [70, 95, 72]}
    assert claims(experiment(tmp_path, kept))[1].startswith(
        "Not shown: that looksam-5 keeps more than half of that gain"
    )


def test_every_row_of_the_base_is_one_to_beat(tmp_path):
    rows = {"sgd": [70, 72, 71], "sgd:lr=1": [80, 82, 81], "sam": [72, 73, 72], "sam:rho=1": [79, 83, 81]}
    rows |= {"looksam-5": [79, 82, 80]}
    sentences = claims(experiment(tmp_path, rows))
    assert [sentence[:49] for sentence in sentences] == [
        "sam:rho=1 gains over sgd, +10.0 points (95 % inte",
        "looksam-5 keeps more than half of that gain: 80.3",
        "Not shown: that sam:rho=1 gains over sgd:lr=1, +0",
        "Not shown: that looksam-5 gains over sgd:lr=1, -0",
    ]
    del rows["sam:rho=1"]
    assert "sam loses against sgd:lr=1, -8.7 points" in " ".join(claims(experiment(tmp_path, rows)))


def test_other_families_are_compared_with_the_base_themselves(tmp_path):
    rows = {"sgd": [70, 72, 71], "asam": [80, 81, 83], "looksam-5": [81, 81, 82]}
    assert [re.match(r"\S+ gains over \S+(?=,)", s)[0] for s in claims(experiment(tmp_path, rows))] == [
        "asam gains over sgd",
        "looksam-5 gains over sgd",
    ]


def test_controls_make_no_claims(tmp_path):
    rows = {"sgd": [70, 72, 71], "sam": [72, 73, 72], "sam:rho=1": [90, 91, 90]}
    (sentence,) = claims(experiment(tmp_path, rows, controls={"sam:rho=1": "SAM at rho = 1"}))
    assert "sam:rho=1" not in sentence


def test_one_seed_shows_nothing(tmp_path):
    assert claims(experiment(tmp_path, {"sgd": [70], "sam": [90]})) == [
        "Not shown: anything, by a single seed; give --seeds 4 or more."
    ]
    assert claims(experiment(tmp_path, {"sgd": [70, 71]})) == []


def test_a_method_of_which_runs_are_missing_is_paired_by_seed(tmp_path):
    rows = {"sgd": [70, 80, 71, 72], "sam": [80, 0, 83, 81]}
    results = experiment(tmp_path, rows, diverged={("sam", 1)})
    difference = contender(results, "sam").minus(contender(results, "sgd"))
    assert difference.mean == pytest.approx(np.mean([10, 12, 9]))


def test_intervals():
    values = np.random.default_rng(0).normal(size=7)
    difference = difference_of(list(values))
    low, high = scipy.stats.t.interval(0.95, 6, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (difference.low, difference.high) == pytest.approx((low, high))
    assert difference_of([1.0]).low == -math.inf


def test_methods_that_were_trained_differently_are_not_compared(tmp_path):
    accuracy = {"sgd": [70, 71], "sam": [80, 81], "sgd:batch_size=20": [60, 62], "sam:batch_size=20": [61, 62]}
    sentences = claims(experiment(tmp_path, accuracy))
    assert len(sentences) == 2
    assert sentences[0].startswith("sam gains over sgd, +10.0 points")
    assert sentences[1].startswith("Not shown: that sam:batch_size=20 gains over sgd:batch_size=20, +0.5 points")
