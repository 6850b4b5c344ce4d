"""``python -m looksam_kernels build``: what it makes, where, and what happens when it goes wrong.

The compiler here compiles a stub in place of the sources; `make release-check` compiles them in fresh environments.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from looksam_kernels import extension
from looksam_kernels.__main__ import main
from looksam_kernels.build import builder, compiling, recipe
from tests.packaging.support import ALONE, QuickCompiler, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a shared library is a .so on Linux")


Lines = list[str]


def environment(site: Path, cache: Path, compiler: QuickCompiler) -> dict[str, str]:
    path = f"{site}:{os.environ.get('PYTHONPATH', '')}"
    return {"PYTHONPATH": path, "LOOKSAM_CACHE_DIR": str(cache), "CXX": str(compiler.path)}


def program(site: Path, code: str) -> list[str]:
    """Python with the package in ``site`` alone."""
    return [sys.executable, "-c", ALONE.format(site=str(site)) + code]


def command(site: Path, *options: str) -> list[str]:
    return [*program(site, "from looksam_kernels.__main__ import main; sys.exit(main(sys.argv[1:]))"), *options]


def builds(cache: Path) -> list[Path]:
    return sorted(cache.glob("builds/*/_C.*.so"))


def left_behind(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "builds").glob(".*"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process builds, too."""
    monkeypatch.setenv("LOOKSAM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def directly(
    recipe: Any, csrc: Path, stamp: recipe.Stamp, objects: Path, into: Path, progress: Callable[[str], None]
) -> Path:
    """In the place of :func:`compile_module`: one call of the compiler, without the process in which torch's helpers run."""
    for folder in (objects, into):
        folder.mkdir()
    (objects / "stamp.cpp").write_text(recipe.stamp_source(stamp))
    made = into / f"{stamp.module}.{stamp.python}.so"
    include = f"-I{sysconfig.get_paths()['include']}"
    sources = (str(csrc / "bindings/cpu.cpp"), "stamp.cpp")
    compiling._run(
        [*recipe.compiler(), "-shared", "-fPIC", include, *sources, "-o", str(made)],
        "",
        objects,
        dict(os.environ),
        progress,
    )
    return made


def compile_with(compiler: QuickCompiler, monkeypatch: pytest.MonkeyPatch, **options: float) -> Lines:
    """A build in this process, without what takes its time, torch being imported in two others; returns what it reports."""
    monkeypatch.setattr(builder, "compile_module", directly)
    monkeypatch.setattr(builder, "_try", lambda made, module: None)
    monkeypatch.setenv("CXX", str(compiler.path))
    said: Lines = []
    builder.build(recipe.CPU, said.append, **options)
    return said


@pytest.mark.slow
def test_the_command_builds_what_later_runs_find(site: Path, cache: Path, tmp_path: Path) -> None:
    env = environment(site, cache, QuickCompiler(tmp_path / "compiler"))
    done = run(*command(site, "build"), cwd=tmp_path, env=env)
    (made,) = builds(cache)
    assert f": {made}" in done.stderr
    code = (
        "from looksam_kernels.__main__ import main\n"
        "import looksam_kernels as low\n"
        "main(['build', '--check'])\n"
        "print(low.backend_info('cpu')['native'].available, low._C.__file__)\n"
    )
    *checked, found = run(*program(site, code), cwd=tmp_path, env=env).stdout.splitlines()
    assert str(made) in " ".join(checked)
    assert found.split() == ["True", str(made)]


@pytest.mark.slow
def test_just_in_time(site: Path, cache: Path, tmp_path: Path) -> None:
    """LOOKSAM_JIT=1 compiles at the first optimizer, not at the import, and says so."""
    env = environment(site, cache, QuickCompiler(tmp_path / "compiler")) | {"LOOKSAM_JIT": "1"}
    code = (
        "import torch, looksam, looksam_kernels\n"
        "from looksam_kernels.build import builder\n"
        "builder._try = lambda made, module: None  # it is loaded below\n"
        "print(looksam_kernels.backend_info('cpu')['native'].available)\n"
        "looksam.SAM([torch.nn.Parameter(torch.ones(3))], 'sgd', lr=0.1)\n"
        "print(looksam_kernels.backend_info('cpu')['native'].available)\n"
        "print(*looksam_kernels.backends.native._RULES)\n"
    )
    done = run(*program(site, code), cwd=tmp_path, env=env)
    assert done.stdout.split() == ["False", "True", "stub"], (
        "the rules that C++ evaluates are known only once it is built"
    )
    assert "looksam: LOOKSAM_JIT=1: compiling for torch" in done.stderr


def test_a_build_is_made_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = QuickCompiler(tmp_path / "compiler")
    said = compile_with(compiler, monkeypatch)
    (made,) = builds(cache)
    assert said[-1].endswith(f": {made}")
    assert extension.judge(made, recipe.CPU)[1] is None
    assert left_behind(cache) == []
    assert compile_with(compiler, monkeypatch) == [f"{made} is up to date"]
    assert compiler.compiled() == 1
    assert main(["build", "--clean"]) == 0
    assert builds(cache) == []


def test_of_two_at_once_one_compiles(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = QuickCompiler(tmp_path / "compiler", "import time; time.sleep(0.3)")
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda _: compile_with(compiler, monkeypatch), range(2)))
    assert compiler.compiled() == 1
    assert sum(line.startswith("waiting for process") for line in said[0] + said[1]) == 1, said


def test_a_failure_says_why_and_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = 'print("step.h:7:1: error: something is wrong", file=sys.stderr)\n    time.sleep(0.5)\n    sys.exit(1)\n'
    bad = QuickCompiler(tmp_path / "bad", f'import time\nif "-c" in given:\n    {fails}')
    monkeypatch.setenv("CXX", str(bad.path))
    with ThreadPoolExecutor(2) as pool:  # one that fails, and one that waited for it and need not fail again
        both = [pool.submit(builder.build, recipe.CPU, print) for _ in range(2)]
        errors = [job.exception() for job in both]
    assert bad.compiled() == 1
    for error in errors:
        assert isinstance(error, builder.BuildError)
        assert str(error).startswith("the compiler failed: step.h:7:1: error: something is wrong\n")
    log = next(Path(str(error).split("All of it: ")[1]) for error in errors if "All of it" in str(error))
    assert "step.h:7:1: error" in log.read_text()
    assert builds(cache) == []
    assert left_behind(cache) == []


def test_a_killed_build_blocks_nobody(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = QuickCompiler(tmp_path / "compiler", "import time\nif '-shared' in given:\n    time.sleep(30)\n")
    monkeypatch.setattr(builder, "compile_module", directly)
    child = os.fork()
    if child == 0:
        os.environ["CXX"] = str(slow.path)
        builder.build(recipe.CPU, print)
    while "/csrc/" not in (slow.log.read_text() if slow.log.exists() else ""):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert left_behind(cache) != []
    slow.path.write_text(slow.path.read_text().replace("time.sleep(30)", "time.sleep(0)"))
    compile_with(slow, monkeypatch, timeout=0)
    assert len(builds(cache)) == 1
    assert left_behind(cache) == []


def test_a_module_that_does_not_load_is_not_published(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "compile_module", directly)
    compiler = QuickCompiler(tmp_path / "compiler")
    (tmp_path / "compiler" / "stub.cpp").write_text("int nothing;")
    monkeypatch.setenv("CXX", str(compiler.path))
    with pytest.raises(builder.BuildError, match="was compiled, but does not load"):
        builder.build(recipe.CPU, print)
    assert builds(cache) == []


def test_waiting_for_another_process_ends(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = QuickCompiler(tmp_path / "compiler", 'if "-shared" in given: sys.exit(1)')
    with pytest.raises(builder.BuildError):  # the lock's file stays
        compile_with(compiler, monkeypatch)
    (lock,) = (cache / "builds").glob("*.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 42 on that machine")
        file.flush()
        with pytest.raises(
            TimeoutError, match=r"process 42 on that machine has been building for more than 0.3 s.*--timeout"
        ):
            compile_with(compiler, monkeypatch, timeout=0.3)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CXX", "/no/compiler", "there is no C++ compiler"),
        ("LOOKSAM_CACHE_DIR", "/proc/nowhere", "LOOKSAM_CACHE_DIR names another folder"),
        *(
            ("LOOKSAM_BUILD_TIMEOUT", value, f"LOOKSAM_BUILD_TIMEOUT='{value}' is not a number of seconds")
            for value in ("soon", "nan", "-1")
        ),
        ("LOOKSAM_CUDA", "yes", "LOOKSAM_CUDA='yes' means nothing; set it to 0 (leave out), 1 (required) or auto"),
    ],
)
def test_what_stands_in_the_way_is_named(
    variable: str,
    value: str,
    said: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["build"]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--check", "--clean"], *(["--timeout", text] for text in ("nan", "-1", "soon"))])
def test_options_that_mean_nothing_are_usage_errors(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["build", *options])
    assert ended.value.code == 2
    assert "error: argument --" in capsys.readouterr().err


def test_without_a_home_folder_modules_are_found_and_none_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user whom the machine does not know, as in many containers."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    before = extension.load(recipe.CPU)
    for name in ("LOOKSAM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert extension.load(recipe.CPU).stamp == before.stamp
    for options in ([], ["--clean"]):
        assert main(["build", *options]) == 1
        assert "there is no home folder; LOOKSAM_CACHE_DIR names the cache" in capsys.readouterr().err


def test_a_cache_that_is_only_read_serves_what_is_there(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = QuickCompiler(tmp_path / "compiler")
    compile_with(compiler, monkeypatch)

    def refused(*arguments: object, **named: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(os, "utime", refused)
    assert compile_with(compiler, monkeypatch)[0].endswith("is up to date")
    monkeypatch.setattr(recipe, "python_abi", lambda: "another")
    with pytest.raises(builder.BuildError, match=r"cannot be written \(Permission denied\); LOOKSAM_CACHE_DIR names"):
        compile_with(compiler, monkeypatch)
