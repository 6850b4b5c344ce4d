"""The runner of the GPU lists, on parts that take no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.gpu import parts, tally, toolchain
from tests.gpu.parts import LISTS, SECONDS, Part
from tests.gpu.runner import GRACE, LINES, Run
from tests.gpu.toolchain import ROOT, Toolchain

HERE = Toolchain(
    {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "python"), str(ROOT)])),
        "PYTEST_ADDOPTS": "",
        "PYTEST_XDIST_WORKER": "gw0",  # as where these tests are themselves run by xdist
    },
    {"gpus": [["a GPU", "9.0"]]},
    2,
)


def python(name: str, code: str, limit: float | None = 60, **more: object) -> Part:
    return Part(name, ("-c", textwrap.dedent(code)), limit, packages=(), **more)  # type: ignore[arg-type]


def run(tmp_path: Path, *chosen: Part, out: Path | None = None, patience: float = 1.0) -> tuple[Run, bool]:
    made = Run("first", HERE, tmp_path / "logs", out, patience)
    return made, made.run(chosen, say=lambda line: None)


def states(made: Run) -> list[str]:
    return [done.state for done in made.done]


# Parts ----------------------------------------------------------------------------------------------------------------


def test_every_part_runs_whatever_became_of_the_others(tmp_path: Path) -> None:
    made, well = run(
        tmp_path,
        python("fails", "import sys; print('the reason'); sys.exit(3)"),
        python("dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        Part("is no program", ("x",), 60, (), ()),
        python("works", "print('here')", shows="here"),
    )
    assert states(made) == ["failed", "failed", "failed", "ok"]
    assert not well
    said = made.summary()
    for text in ("exit status 3", "the reason", "ended by SIGSEGV", "    here"):
        assert text in said


def test_all_well_is_all_well(tmp_path: Path) -> None:
    made, well = run(tmp_path, python("works", "print()"))
    assert states(made) == ["ok"]
    assert well


def test_a_part_out_of_time_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """Also what does not listen to the request to end."""
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    code = f"""
        import signal, subprocess, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", {child!r}])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        child.wait()
    """
    before = time.monotonic()
    made, well = run(tmp_path, python("hangs", code, limit=4), python("works", "print()"))
    assert states(made) == ["out of time", "ok"]
    assert not well
    assert time.monotonic() - before < 4 + 2 * GRACE + 20
    pid = int((tmp_path / "pid").read_text())
    assert not Path("/proc", str(pid)).exists() or "Z" in Path("/proc", str(pid), "stat").read_text().split()[2]


def test_the_last_parts_get_what_is_left(tmp_path: Path) -> None:
    seconds = 8.0
    made, _ = run(
        tmp_path,
        python("short", "import time; time.sleep(60)", limit=2 * SECONDS / seconds),
        python("long", "import time; time.sleep(60)", limit=None),
        python("none", "print()", limit=None),
        patience=seconds / SECONDS,
    )
    assert states(made) == ["out of time"] * 3
    short, long, none = (done.seconds for done in made.done)
    assert short < long < seconds
    assert none == 0


def test_what_is_missing_is_named_and_skipped(tmp_path: Path) -> None:
    made, well = run(
        tmp_path,
        Part("a", ("-c", ""), 60, packages=("torch", "no_such_package")),
        Part("b", ("-c", ""), 60, packages=(), tools=("no-such-tool",)),
    )
    assert states(made) == ["skipped"] * 2
    assert well
    assert "the package no_such_package is not here" in made.summary()
    assert "the tool no-such-tool is not here" in made.summary()


# The summary and what travels ----------------------------------------------------------------------------------------


def test_a_summary_has_at_most_60_lines(tmp_path: Path) -> None:
    code = f"""
        import json, os
        with open(os.environ[{tally.VARIABLE!r}], "w") as file:
            for i in range(500):
                print(json.dumps([f"test_{{i}}", "failed", "why"]), file=file)
    """
    many = [python(f"part {i}", code) for i in range(5)]
    talks = python("talks", "for i in range(99): print('shown')", shows="shown")
    made, well = run(tmp_path, *many, talks)
    lines = made.summary().splitlines()
    assert not well
    assert LINES - 5 <= len(lines) <= LINES
    assert all(any(f"part {i}" in line and "500 failed" in line for line in lines) for i in range(5))
    assert "test_0: why" in made.summary()
    assert "... and " in made.summary()


def test_few_and_small_files_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    loud = python(
        "loud", "print('x' * 79 + '\\n', end='') or [print('y' * 99) for _ in range(200_000)]; print('the end')"
    )
    for name in LISTS:
        Run(name, HERE, tmp_path / "logs", out).run([loud, python("b", "print()")], say=lambda line: None)
    files = sorted(out.iterdir())
    assert {f"gpu-{name}.{kind}" for name in LISTS for kind in ("txt", "log")} <= {path.name for path in files}
    assert len(files) <= 8
    assert all(path.stat().st_size < 16 * 2**20 for path in files)
    assert "the end" in (out / "gpu-first.log").read_text()


def test_what_was_found_is_written_down_if_the_runner_is_stopped(tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    def say(line: str) -> None:
        if line == "== second":
            raise Stopped

    made = Run("first", HERE, tmp_path, tmp_path / "out")
    with pytest.raises(Stopped):
        made.run([python("first", "print()"), python("second", "print()")], say=say)
    assert "ok          first" in (tmp_path / "out" / "gpu-first.txt").read_text()


# Tests as parts -------------------------------------------------------------------------------------------------------

SUITE = """
    import os, signal, time
    import pytest

    pytestmark = pytest.mark.gpu

    def test_works_cuda(): pass
    def test_is_skipped_cuda(): pytest.skip("no")
    def test_fails_cuda(): assert 1 == 2
    def test_dies_cuda(): os.kill(os.getpid(), signal.SIGSEGV)
    def test_triton_cuda(): raise SystemError
    def test_reference_cuda(): pass
    @pytest.mark.parametrize("target", ["reference-cuda"])
    def test_of_torch(target): raise SystemError
"""


def suite(tmp_path: Path, text: str = SUITE) -> Part:
    (tmp_path / "test_suite.py").write_text(textwrap.dedent(text))
    part = parts.tests("native tests", 120, "not triton")
    return part._replace(arguments=(*part.arguments, str(tmp_path / "test_suite.py")))


@pytest.mark.slow
def test_tests_run_in_several_processes_and_are_counted(tmp_path: Path) -> None:
    made, well = run(tmp_path, suite(tmp_path))
    (done,) = made.done
    assert not well
    assert done.said == "2 passed, 2 failed, 1 skipped, exit status 1"
    fails, dies = sorted(done.details, key=lambda x: "test_dies" in x)
    assert fails.endswith("::test_fails_cuda: assert 1 == 2")
    assert "crashed while running" in dies


@pytest.mark.slow
def test_tests_that_are_stopped_are_counted_so_far(tmp_path: Path) -> None:
    part = suite(tmp_path, SUITE.replace("os.kill(os.getpid(), signal.SIGSEGV)", "time.sleep(600)"))
    made, _ = run(tmp_path, part._replace(limit=25))
    assert states(made) == ["out of time"]
    assert made.done[0].said == "2 passed, 1 failed, 1 skipped"


def test_no_test_is_a_failure(tmp_path: Path) -> None:
    made, well = run(tmp_path, suite(tmp_path, "def test_without_a_mark(): pass"))
    assert not well
    assert "no test was run" in made.summary()


@pytest.mark.slow
def test_a_spoilt_context_fails_one_test(tmp_path: Path) -> None:
    text = """
        import pytest, torch
        pytestmark = pytest.mark.gpu
        spoilt = []
        def fails_from_now_on():
            if spoilt: raise RuntimeError("an illegal memory access was encountered")
        torch.cuda.synchronize, torch.cuda.is_available = fails_from_now_on, lambda: True
        def test_a():
            spoilt.append(1)
            torch.cuda.synchronize()
        @pytest.mark.parametrize("i", range(4))
        def test_b(i): torch.cuda.synchronize()
    """
    one = HERE._replace(processes=1)
    made = Run("first", one, tmp_path / "logs")
    made.run([suite(tmp_path, text)], say=lambda line: None)
    (done,) = made.done
    assert done.said.startswith("4 passed, 1 failed"), done
    assert "illegal memory access" in done.details[0]


def test_tests_run_without_the_plugins_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.gpu.runner.importlib.util.find_spec", lambda name: None)
    options = Run("first", HERE, tmp_path).options_of_pytest()
    assert not {"-n", "--timeout=60"} & set(options)


# The lists and the machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTS)
def test_a_list_takes_less_than_ten_minutes(name: str) -> None:
    limits = [part.limit for part in LISTS[name]]
    assert SECONDS + GRACE * 2 <= 590
    assert sum(x for x in limits if x is not None) <= SECONDS - 40, "nothing is left for the last part"
    assert None not in limits[: limits.index(None)]
    assert all(x is None for x in limits[limits.index(None) :]), "a part after the one that takes all the rest"


def test_native_comes_before_triton_and_memcheck_before_the_other_tools() -> None:
    names = [part.name for part in LISTS["first"]]
    assert names.index("native tests") < names.index("smoke triton") < names.index("triton tests")
    assert [part.name for part in LISTS["second"]][1] == "memcheck"


def test_the_toolkit_is_found_behind_links(tmp_path: Path) -> None:
    toolkit, links = tmp_path / "cuda-13.0", tmp_path / "links"
    for path in (toolkit / "bin", links):
        path.mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    (links / "nvcc").symlink_to(nvcc)
    assert toolchain.cuda_home({"PATH": str(links)}) == toolkit
    assert toolchain.cuda_home({"PATH": str(links), "CUDA_HOME": str(tmp_path)}) == toolkit, "no toolkit is named"
    assert toolchain.cuda_home({"PATH": "", "CUDA_HOME": str(toolkit)}) == toolkit


def test_architectures_and_jobs_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [["A", "9.0"], ["B", "8.6"], ["A", "9.0"]]
    monkeypatch.setattr(toolchain, "look", lambda environment, seconds: {"gpus": gpus})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    found = toolchain.find({"PATH": os.environ["PATH"]})
    assert found.environment["TORCH_CUDA_ARCH_LIST"] == "8.6;9.0"
    assert found.environment["MAX_JOBS"] == "16"
    assert found.processes == 14
    given = {"PATH": os.environ["PATH"], "TORCH_CUDA_ARCH_LIST": "7.5", "MAX_JOBS": "3"}
    found = toolchain.find(given)
    assert {name: found.environment[name] for name in given if name != "PATH"} == {
        "TORCH_CUDA_ARCH_LIST": "7.5",
        "MAX_JOBS": "3",
    }
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    assert toolchain.find(given).processes == 8


@pytest.mark.parametrize(
    ("code", "problem"),
    [("import time; time.sleep(60)", "no answer"), ("import os; os.abort()", "exit status"), ("1 / 0", "ZeroDivision")],
)
def test_a_torch_that_cannot_be_asked_is_said(monkeypatch: pytest.MonkeyPatch, code: str, problem: str) -> None:
    monkeypatch.setattr(toolchain, "LOOK", code)
    assert problem in toolchain.look(dict(os.environ), 3)["problem"]


def test_the_machine_is_told_from_torch() -> None:
    facts = toolchain.look(HERE.environment, 120)
    assert (
        facts["torch"]
        == subprocess.check_output([sys.executable, "-c", "import torch; print(torch.__version__)"], text=True).strip()
    )
    assert "gpus" in facts
