"""One wheel and one sdist for all tests here, of a tree that has been worked in."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.packaging.support import VERSION, build, copy_tree, unpack


class Artefacts(NamedTuple):
    """``before`` and ``after``: every file of the tree, and when it was written."""

    wheel: Path
    sdist: Path
    before: dict[str, int]
    after: dict[str, int]


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    """Built from a tree with a stale build folder and a module that was compiled in place."""
    pytest.importorskip("build", reason="the package `build` is not installed")
    pytest.importorskip("setuptools_scm", reason="setuptools-scm is not installed")
    folder = tmp_path_factory.mktemp("artefacts")
    tree = copy_tree(folder / "tree")
    stale = tree / "build" / "lib" / "looksam_kernels"
    stale.mkdir(parents=True)
    (stale / "gone.py").write_text("a file of last year")
    (tree / "looksam_kernels" / "_C.cpython-399-x86_64-linux-gnu.so").write_text("compiled in place")
    before = files(tree)
    wheel, sdist = (build(tree, folder / "dist", kind) for kind in ("wheel", "sdist"))
    return Artefacts(wheel, sdist, before, files(tree))


def files(tree: Path) -> dict[str, int]:
    """Without Python's own caches: it compiles the build backend, which is a module of the tree, before that runs."""
    paths = (path for path in tree.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(tree)): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="session")
def wheel(artefacts: Artefacts) -> Path:
    return artefacts.wheel


@pytest.fixture(scope="session")
def sdist(artefacts: Artefacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(artefacts.sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"looksam_kernels-{VERSION}"


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as it is installed with build isolation: no compiled module, but its sources."""
    return unpack(wheel, tmp_path_factory.mktemp("site"))
