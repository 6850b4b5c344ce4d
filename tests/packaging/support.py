"""A copy of the tree, its wheel unpacked as if installed, and a compiler that is quick."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = [
    ".ci", ".gitignore", ".pre-commit-config.yaml", "benchmarks", "build_backend.py", "CHANGELOG.md", "CITATION.cff",
    "CMakeLists.txt", "constraints.txt", "CONTRIBUTING.md", "csrc", "docs", "examples", "LICENSE", "looksam_kernels", "Makefile",
    "MANIFEST.in", "mkdocs.yml", "pyproject.toml", "python", "README.md", "setup.py", "tests",
]  # fmt: skip
VERSION = "9.8.7"
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", ".*_cache", "*.so", "native_build.txt", "*.egg-info")


def copy_tree(target: Path) -> Path:
    """The checkout, without what was compiled in it."""
    target.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=LEFT_BEHIND)
        else:
            shutil.copy(source, target / part)
    return target


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None, code: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """With an environment that says nothing about looksam, and ``env``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LOOKSAM_")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | (env or {}), capture_output=True, text=True, check=False
    )
    assert code is None or done.returncode == code, f"{done.args}\n{done.stdout}{done.stderr}"
    return done


def build(tree: Path, into: Path, kind: str, env: dict[str, str] | None = None) -> Path:
    """``kind`` is ``wheel`` or ``sdist``. Without isolation, which would fetch the build requirements, and without a
    compiler, as where torch is not there."""
    env = {"CXX": "/no/compiler", "SETUPTOOLS_SCM_PRETEND_VERSION": VERSION} | (env or {})
    command = (sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", into, ".")
    run(*command, cwd=tree, env=env)
    (made,) = into.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def unpack(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return into


ALONE = """
import sys
sys.path[:] = [p for p in sys.path if p == {site!r} or not __import__("pathlib").Path(p, "looksam_kernels").is_dir()]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]
"""
"""Only the package in ``site``, whatever else of us this Python has installed."""

QUICK = """#!{python} -IS
# The compiler, but of our sources only what a module must have: they take a minute.
import os, subprocess, sys
given = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*given, file=log)
{extra}
def part(word):
    if "/csrc/" not in word or not word.endswith((".cpp", ".cu")):
        return word
    return {stub!r} if word.endswith("bindings/cpu.cpp") else {empty!r}
sys.exit(subprocess.call(["c++", *map(part, given)]))
"""
STUB = """
#include <Python.h>
static PyObject* rules(PyObject*, PyObject*) { return Py_BuildValue("[s]", "stub"); }
static PyMethodDef methods[] = {{"rules", rules, METH_NOARGS, nullptr}, {}};
static PyModuleDef def = {PyModuleDef_HEAD_INIT, "stub", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&def); }
"""


class QuickCompiler:
    """``CXX`` for a build that takes seconds; ``extra`` is Python that runs in every call."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        folder.mkdir()
        self.log, self.path = folder / "calls.log", folder / "c++"
        stub, empty = folder / "stub.cpp", folder / "empty.cpp"
        stub.write_text(STUB)
        empty.write_text("")
        script = QUICK.format(python=sys.executable, log=str(self.log), extra=extra, stub=str(stub), empty=str(empty))
        self.path.write_text(script)
        self.path.chmod(0o755)

    def compiled(self) -> int:
        """How many times the module was compiled."""
        return self.log.read_text().count("/csrc/bindings/cpu.cpp") if self.log.exists() else 0
