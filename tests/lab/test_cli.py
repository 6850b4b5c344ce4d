"""The commands end to end, through click."""

import io
import itertools
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import looksam_kernels
from looksam.lab.cli import main
from looksam.lab.config import DataConfig, TrainConfig
from looksam.lab.parallel import run_jobs
from looksam.lab.records import read_experiment, summarize

FAST = [
    "--epochs",
    "2",
    "--train-size",
    "200",
    "--batch-size",
    "20",
    "--width",
    "0.5",
    "--device",
    "cpu",
    "--threads",
    "1",
]
FIGURES = {"accuracy_epochs", "accuracy_passes", "accuracy_seconds", "accuracy_final", "train_loss"}


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One comparison for the tests below: 2 methods x 2 seeds, 2 epochs of 10 steps."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    arguments = ["compare", "sgd", "looksam-5", *FAST, "--seeds", 2, "--seed", 7, "--alpha", 0.2, "--out", folder]
    return folder, run(*arguments)


def test_compare_writes_every_file_and_prints_the_report_last(compared):
    folder, result = compared
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().splitlines()[-1] == str(folder / "report.md")
    assert {p.name for p in folder.iterdir()} == {
        *("results.jsonl", "report.md", "checkpoints"),
        *(f"{n}.png" for n in FIGURES),
    }


def test_results_hold_one_line_per_epoch(compared):
    header, *epochs = lines(compared[0])
    assert header["kind"] == "header"
    assert header["methods"] == {"sgd": {}, "looksam-5": {"alpha": 0.2}}
    assert header["seeds"] == [7, 8]
    assert header["command_line"].startswith("looksam compare sgd looksam-5 --epochs 2")
    assert sorted((e["method"], e["seed"], e["epoch"]) for e in epochs) == [
        (m, s, e) for m in ("looksam-5", "sgd") for s in (7, 8) for e in (1, 2)
    ]
    assert {e["passes"] for e in epochs if e["method"] == "sgd"} == {10}
    assert {e["passes"] for e in epochs if e["method"] == "looksam-5"} == {12}
    assert {e["backend"] for e in epochs if e["method"] == "looksam-5"} <= {"native", "triton", "reference"}


def test_tables_show_the_numbers_of_the_results(compared):
    folder, result = compared
    for method, passes in (("sgd", "1.00"), ("looksam-5", "1.20")):
        epochs = [e for e in lines(folder)[1:] if e["method"] == method]
        final = [100 * e["test_accuracy"] for e in epochs if e["epoch"] == 2]
        optimizer = statistics.median(e["optimizer_seconds"] / e["steps"] for e in epochs)
        cells = [
            method,
            f"{statistics.mean(final):.2f} ± {statistics.stdev(final) / 2**0.5:.2f}",
            "2/2",
            passes,
            f"{statistics.median(e['seconds'] for e in epochs):.3f}",
            f"{1000 * optimizer:.3f}",
        ]
        assert "| " + " | ".join(cells) + " |" in (folder / "report.md").read_text()
        assert re.search(r"\s+".join(map(re.escape, cells)), result.output), result.output


def test_report_embeds_figures_that_are_not_blank(compared):
    folder, _ = compared
    report = (folder / "report.md").read_text()
    embedded = re.findall(r"!\[.*?\]\((.*?)\.png\)", report)
    assert set(embedded) == FIGURES
    for name in embedded:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        for colour in ((0, 114, 178), (213, 94, 0)):  # the first two methods
            close = np.abs(pixels.astype(int) - colour).max(2) < 20
            assert close.sum() > 100, (name, colour)


def test_report_command_needs_the_results_file_only(compared, tmp_path):
    folder, _ = compared
    (tmp_path / "results.jsonl").write_bytes((folder / "results.jsonl").read_bytes() + b'{"kind": "epo')
    result = run("report", tmp_path)
    assert result.exit_code == 0
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()
    assert result.output.rstrip().endswith(str(tmp_path / "report.md"))
    (tmp_path / "empty").mkdir()
    assert "holds no results.jsonl" in run("report", tmp_path / "empty").output


def test_results_are_not_overwritten_unasked(compared):
    folder, _ = compared
    before = (folder / "results.jsonl").read_bytes()
    result = run("train", "sgd", *FAST, "--out", folder)
    assert result.exit_code == 2
    assert "already holds results" in result.output
    assert (folder / "results.jsonl").read_bytes() == before


def test_a_failing_method_is_named_and_the_others_finish(tmp_path):
    out = tmp_path / "out"
    arguments = [
        "compare",
        "looksam-5",
        "sgd",
        *FAST,
        "--seeds",
        1,
        "--jobs",
        1,
        "--set",
        "looksam.norm_scope=nonsense",
    ]
    result = run(*arguments, "--out", out)
    assert result.exit_code == 1
    assert "looksam-5, seed 0 failed:" in result.output
    assert "nonsense" in result.output
    failures = [line for line in lines(out) if line["kind"] == "failure"]
    assert [(f["method"], f["seed"]) for f in failures] == [("looksam-5", 0)]
    report = (out / "report.md").read_text()
    assert "**Failed: looksam-5, seed 0**: ValueError" in report
    assert re.search(r"\| sgd \| \d+\.\d\d \| 1/1 ", report)


def test_a_diverging_run_is_reported_and_left_out_of_the_mean(tmp_path):
    result = run("train", "sgd", *FAST, "--lr", "1e30", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "sgd, seed 0 diverged in epoch" in result.output
    assert re.search(r"\| sgd \| - \| 0/1, 1 diverged \|", (tmp_path / "out" / "report.md").read_text())


def test_a_process_that_dies_takes_no_other_run_with_it():
    config = TrainConfig("sgd", epochs=30, width=0.25, data=DataConfig(train_size=200), threads=1)
    configs = [replace(config, seed=seed) for seed in (0, 1)]
    ends, others = {}, set(multiprocessing.active_children())
    for event in run_jobs(configs, jobs=1):
        if event.ends_run:
            ends[event.config.seed] = event.error
        elif event.config.seed == 0 and event.record and event.record.epoch == 1:
            (process,) = set(multiprocessing.active_children()) - others
            process.kill()
    assert set(ends) == {0, 1}
    assert "died with exit status -9" in ends[0]
    assert ends[1] is None


def test_an_interrupt_reports_what_was_measured(tmp_path, monkeypatch):
    import looksam.lab.experiment as experiment

    def interrupted(*arguments):
        for count, event in enumerate(e for e in run_jobs(*arguments) if e.part is None):
            yield event
            if count == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_jobs", interrupted)
    result = run("train", "sam", *FAST, "--epochs", 3, "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert len(lines(tmp_path / "out")) == 3
    summary = summarize(read_experiment(tmp_path / "out"), "sam")
    assert (summary.started, summary.finished, summary.passes_per_step) == (1, 0, 2.0)
    assert "interrupted" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "samm"], "unknown name 'samm'; variants are"),
        (["compare", "sgd", "sgd"], "method given twice: sgd"),
        (["train", "sam", "--alpha", "0.1"], "takes the option 'alpha'"),
        (["train", "sam", "--set", "k"], "--set k: write OPTION=VALUE"),
        (["train", "sam", "--data", "no/such/folder"], "must hold train/<class>"),
        (["train", "sam", "--train-size", "5000"], "digits has 1000 training images"),
        (["compare"], "Missing argument"),
        (["train", "sam", "--fsdp"], "--fsdp needs several processes; start: torchrun --nproc-per-node N -m looksam"),
        (["train", "sam", "--m-sharpness"], "--m-sharpness needs several processes; start: torchrun"),
        (["train", "sam", "--accumulate", "3"], "--batch-size 50 cannot be shared out over 1 process(es) x 3"),
        (["train", "sam", "--resume"], "holds no results to go on with; leave --resume out to begin"),
        (["train", "sam", "--resume", "--overwrite"], "--resume needs --out DIR"),
        (["train", "sam", "--amp", "fp8"], "'fp8' is not one of 'fp16', 'bf16'"),
    ],
)
def test_usage_errors_come_before_any_work(arguments, message, tmp_path):
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_info_lists_versions_and_backends():
    result = run("info")
    assert result.exit_code == 0
    for label in ("looksam-kernels", "Python", "torch", "triton", "CPU", "CUDA devices"):
        assert label in result.output
    for name, backend in looksam_kernels.backend_info().items():
        available = re.search(rf"^\W*{name}\W+(yes|no)\b", result.output, re.MULTILINE)
        assert available[1] == ("yes" if backend.available else "no")


def test_a_missing_dependency_names_the_extra():
    code = "import sys; sys.modules['rich'] = None; import looksam.lab.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'looksam-kernels[lab]'" in done.stderr


def test_colour_images_from_a_tar(tmp_path, monkeypatch):
    """End to end: two classes that differ in colour alone are told apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        for split, label, number in itertools.product(("train", "test"), ("blue", "red"), range(20)):
            pixels = generator.integers(0, 128, (8, 8, 3), dtype=np.uint8)
            pixels[..., 0 if label == "red" else 2] += 100
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            member = tarfile.TarInfo(f"pets/{split}/{label}/{number}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            archive.addfile(member, buffer)
    data = ["--data", tmp_path / "pets.tar", "--model", "cnn", "--width", 0.5, "--threads", 1]
    result = run(
        "train", "looksam-2", *data, "--epochs", 6, "--batch-size", 8, "--device", "cpu", "--out", tmp_path / "o"
    )
    assert result.exit_code == 0, result.output
    assert lines(tmp_path / "o")[-1]["test_accuracy"] == 1.0
