"""The commands end to end, through click."""

import errno
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

import looksam_kernels
from looksam.lab import plan
from looksam.lab.cli import COMMANDS, TOOLS, main
from looksam.lab.config import DataConfig, TrainConfig
from looksam.lab.options import Count, Finite
from looksam.lab.parallel import run_jobs
from looksam.lab.records import read_experiment, summarize
from looksam.lab.report import console_table

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
        *("results.jsonl", "report.md", "report.html", "checkpoints"),
        *(f"{n}.{suffix}" for n in FIGURES for suffix in ("png", "svg")),
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
            passes,
            "2/2",
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


def test_a_failing_method_is_named_and_the_others_finish(tmp_path, monkeypatch):
    monkeypatch.setattr("looksam.lab.plan.try_optimizer", lambda config: {})  # which finds it before anything starts
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
    assert re.search(r"\| sgd \| \d+\.\d\d \| 1\.00 \| 1/1 ", report)


def test_a_diverging_run_is_reported_and_left_out_of_the_mean(tmp_path):
    result = run("train", "sgd", *FAST, "--lr", "1e30", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "sgd, seed 0 diverged in epoch" in result.output
    assert re.search(r"\| sgd \| - \| 1\.00 \| 0/1, 1 diverged \|", (tmp_path / "out" / "report.md").read_text())


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


def test_a_process_that_dies_before_it_is_sent_its_run_says_so():
    multiprocessing.set_executable(shutil.which("false"))
    try:
        (event,) = run_jobs([TrainConfig("sgd", epochs=1)], jobs=1)
    finally:
        multiprocessing.set_executable(sys.executable)
    assert event.error == "its process died with exit status 1"


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
        (["train"], "Missing argument 'METHOD'"),
        (["train", "sam", "sgd"], "train takes one METHOD, not 2; looksam compare takes several"),
        (["tradeoff", "--scale", "gpu"], "--scale gpu needs images: give --data"),
        (["train", "--recipe", "imagenet-vit-b16-looksam"], "--recipe imagenet-vit-b16-looksam needs images: give --data"),
        (["tradeoff", "--periods", "0,1"], "0,1 holds a number below 1"),
        (["tradeoff", "--periods", "x"], "'x' is not a list of numbers"),
        (["tradeoff", "samm"], "unknown name 'samm'; variants are"),
        (["sensitivity", "sam:rho=0.1"], "method 'sam:rho=0.1,rho=0.05': rho is given twice"),
        (["large-batch", "lamb:warmup=1"], "large-batch chooses warmup of lamb:warmup=1; leave it out there"),
        (["sensitivity", "sgd"], "sensitivity: sgd has no radius rho"),
        (["train", "sgd:batch_size=0"], "batch_size=0 is not possible"),
        (["train", "sgd:adversarial=x"], "adversarial=x is not possible"),
        (["train", "sam", "--fsdp"], "--fsdp needs several processes; start: torchrun --nproc-per-node N -m looksam"),
        (["train", "sam", "--m-sharpness"], "--m-sharpness needs several processes; start: torchrun"),
        (["train", "sam", "--accumulate", "3"], "--batch-size 50 cannot be shared out over 1 process(es) x 3"),
        (["train", "sam", "--resume"], "holds no results to go on with; leave --resume out to begin"),
        (["train", "sam", "--resume", "--overwrite"], "--resume needs --out DIR"),
        (["train", "sam", "--amp", "fp8"], "'fp8' is not one of 'fp16', 'bf16'"),
        *((["train", "sam", option, value], f"Invalid value for '{option}': {value} is not ")
          for value in ("nan", "inf")
          for option in ("--rho", "--alpha", "--lr", "--momentum", "--weight-decay", "--label-noise", "--warmup",
                         "--rho-warmup", "--clip", "--mixup", "--width")),
        (["train", "sam", "--randaugment", "2", "nan"], "nan is not a finite number"),
        (["train", "sam", "--randaugment", "2", "31"], "31.0 is not in the range 0<=x<=30"),
        *((["train", "sam", option, "9" * 20], f"Invalid value for '{option}': {'9' * 20} is more than ")
          for option in ("--seeds", "--epochs", "--threads", "--checkpoint-every")),
        (["train", "sam", "--out", ""], "--out: the folder's name is empty"),
        (["train", "sam", "--set", "rho=0.1", "--set", "rho=0.2"], "--set rho=0.2: rho is given twice"),
        (["train", "sam", "--rho", "0.1", "--set", "rho=0.2"], "--rho and --set rho: give one of them"),
        (["train", "sam", "--set", ".rho=0.1"], "--set .rho=0.1: write OPTION=VALUE or NAME.OPTION=VALUE"),
        (["train", "sam-5", "--set", "k=2"], "no method given takes the option 'k'"),
        (["train", "sam:batch_size=true"], "batch_size=True is not possible"),
        (["train", "sam+adam", "--set", "betas=[0.9]"], "betas must be a tuple of 2 numbers"),
        (["train", "adam:betas=[0.9]"], "betas must be a tuple of 2 numbers"),
        (["train", "sgd", "--set", "nesterov=maybe"], "nesterov must be a flag, True or False, not 'maybe'"),
        (["train", "sam", "--set", "rho=NaN"], "--set rho=NaN: NaN is not a finite number"),
        (["train", "sam", "--set", "rho=wide"], "sam with rho=wide: "),
        (["train", "sam+adam", "--set", "betas=3"], "sam+adam with betas=3: "),
        (["compare", "sgd", "looksam-5", "--set", "looksam.norm_scope=all"], "looksam-5 with norm_scope=all: norm_scope"),
        (["train", "sam", "--backend", "fast"], "--backend fast: unknown; choose one of native, triton, reference"),
        (["train", "sam", "--seed", "-1"], "Invalid value for '--seed'"),
        (["train", "sam", "--image-size", "3"], "--image-size 3: digits come in one size"),
        (["train", "sam", "--stream"], "--stream: digits fits in memory"),
        (["train", "sam", "--patch", "2"], "--patch 2: cnn has no patches"),
        (["train", "sam", "--model", "resnet18", "--batch-size", "1"], "--model resnet18 cannot take 1 images of 8x8"),
        (["train", "sam", "--width", "1e30"], "--model cnn --width 1e+30 cannot take 50 images of 8x8 pixels: "),
        (["compare", "sgd", "--tune", "26"], "--tune 26: sgd has a grid of 25 settings only"),
        (["compare", "sgd", "--tune", "2", "--validation", "0.0001"], "--validation 0.0001: nothing is left"),
    ],
)  # fmt: skip
def test_usage_errors_come_before_any_work(arguments, message, tmp_path):
    result = run(*(arguments if "--out" in arguments else [*arguments, "--out", tmp_path / "out"]))
    assert result.exit_code == (
        1 if message.startswith("must hold") else 2
    )  # 1: the options are right, the data are not
    assert "Traceback" not in result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_a_long_read_of_data_is_announced(tmp_path, monkeypatch):
    """A folder may hold millions of files."""
    read = plan.load_dataset

    def slow(*arguments):
        time.sleep(0.3)
        return read(*arguments)

    monkeypatch.setattr(plan, "load_dataset", slow)
    options = (
        "train",
        "sgd",
        "--epochs",
        "1",
        "--train-size",
        "50",
        "--test-size",
        "50",
        "--overwrite",
        "--out",
        tmp_path,
    )
    assert "reading digits ..." not in run(*options).output
    monkeypatch.setattr(plan, "PATIENCE", 0.05)
    assert "reading digits ..." in run(*options).output


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in TOOLS])
def test_every_number_of_every_command_is_finite_and_bounded(name):
    for option in main.get_command(None, name).params:
        for kind in getattr(option.type, "types", [option.type]):
            assert isinstance(kind, Finite) or not isinstance(kind, click.types.FloatParamType), option.name
            bounded = isinstance(kind, Count) or getattr(kind, "max", None) is not None
            assert bounded or not isinstance(kind, click.types.IntParamType), option.name


def test_an_unknown_backend_of_the_environment_is_found_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOKSAM_BACKEND", "fast")
    result = run("train", "sam", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "LOOKSAM_BACKEND=fast: unknown; choose one of native, triton, reference" in result.output
    assert not (tmp_path / "out").exists()
    result = run("info")
    assert result.exit_code == 1
    assert "LOOKSAM_BACKEND=fast: no such backend can run here" in result.output


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


@pytest.mark.parametrize("place", ["file/out", "/proc/looksam/out"])
def test_a_folder_that_cannot_be_written_is_found_before_any_work(tmp_path, place):
    (tmp_path / "file").write_text("")
    result = run("train", "sgd", *FAST, "--out", tmp_path / place)
    assert result.exit_code == 2
    assert "cannot write there" in " ".join(result.output.split())


def test_a_pipe_gets_a_line_of_each_run(compared):
    _, result = compared
    for method, seed in itertools.product(("sgd", "looksam-5"), (7, 8)):
        assert re.search(
            rf"^{method}, seed {seed}: epoch 2/2, \d+\.\d %, [1-4]/4 runs, \d+ s", result.output, re.MULTILINE
        )
    for ended in (1, 2, 3):
        assert re.search(rf"{ended}/4 runs, \d+ s, about \d+ s left$", result.output, re.MULTILINE)
    assert re.search(r"4/4 runs, \d+ s$", result.output, re.MULTILINE)


def test_the_report_says_what_was_used(compared):
    report = (compared[0] / "report.md").read_text(encoding="utf-8")
    assert "default |" not in report
    for line in ("| model | cnn |", "| batch_size | 20 |", "| augment | none |", "| device | cpu |", "| steps | 20 |"):
        assert line in report
    (sgd,) = re.findall(r"^\| sgd \| .*lr = .*$", report, re.MULTILINE)
    assert "lr = 0.05, " in sgd
    assert "weight_decay = 0.0005" in sgd
    (looksam,) = re.findall(r"^\| looksam-5 \| .*lr = .*$", report, re.MULTILINE)
    assert "alpha = 0.2, " in looksam
    assert "rho = 0.05, " in looksam


def test_reports_are_utf8_whatever_the_locale(compared, tmp_path):
    (tmp_path / "results.jsonl").write_bytes((compared[0] / "results.jsonl").read_bytes())
    code = "import sys; from looksam.lab.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(tmp_path)], capture_output=True, check=False,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.md").read_bytes() == (compared[0] / "report.md").read_bytes()


@pytest.mark.parametrize("width", [44, 60, 100])
def test_the_table_fits_the_terminal(compared, width):
    experiment = read_experiment(compared[0])
    console = Console(width=width, file=io.StringIO())
    console.print(console_table(experiment, console))
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for method in experiment.methods:
        assert re.search(rf"^ {method} +\d+\.\d\d ± \d+\.\d\d +1\.[02]0 ", text, re.MULTILINE), text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:2], b"{", *lines[3:]], "line 3 is damaged"),
        (lambda lines: [*lines[:2], b"\xff\xfe", *lines[3:]], "line 3 is damaged"),
        (lambda lines: [*lines[:2], b'{"kind": "epoch"}', *lines[3:]], "line 3 is damaged"),
        (lambda lines: [*lines[:2], b"3", *lines[3:]], "line 3 is damaged"),
        (lambda lines: lines[1:], "does not begin with a header line"),
        (lambda lines: [b"nonsense"], "does not begin with a header line"),
        (lambda lines: [], "is empty"),
    ],
)
def test_damaged_results_are_one_sentence(compared, tmp_path, damage, message):
    whole = (compared[0] / "results.jsonl").read_bytes().splitlines()
    (tmp_path / "results.jsonl").write_bytes(b"\n".join(damage(whole)))
    result = run("report", tmp_path)
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "report.md").exists()


def test_a_full_disk_keeps_the_records(tmp_path):
    """Every file larger than 20 kB: too large for a checkpoint, not for the records."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from looksam.lab.cli import main; main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "sgd", *FAST, "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "File too large" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert [line["kind"] for line in lines(out)] == ["header", "failure"]


def test_a_full_disk_under_the_records(tmp_path, monkeypatch):
    def full(writer, record):
        raise OSError(errno.ENOSPC, "No space left on device", str(writer.path))

    monkeypatch.setattr("looksam.lab.records.ResultsWriter.epoch", full)
    out = tmp_path / "out"
    result = run("train", "sgd", *FAST, "--out", out, "--overwrite")
    assert result.exit_code == 1
    message = " ".join(result.output.split())
    assert (
        f"No space left on device: {out}/results.jsonl; what was measured before is kept. Go on with: looksam"
        in message
    )
    assert message.endswith("--resume")
    assert "--overwrite" not in message


def test_a_reader_that_leaves_is_named_and_the_records_are_kept(tmp_path):
    code = "import sys; from looksam.lab.cli import main; main(sys.argv[1:], prog_name='looksam')"
    command = [sys.executable, "-c", code, "train", "sgd", "--seeds", "2", "--jobs", "1", *FAST, "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 1
    assert "nobody reads the output any more" in error
    assert "--resume" in error
    assert len(read_experiment(tmp_path).runs) == 1
