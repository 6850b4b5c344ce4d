"""One wheel, unpacked as an installation would, for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.support import build, copy_tree, unpack


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="the package `build` is not installed")
    pytest.importorskip("setuptools_scm", reason="setuptools-scm is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    return build(copy_tree(folder / "tree"), folder / "dist", "wheel")


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as it is installed with build isolation: no compiled module, but its sources."""
    return unpack(wheel, tmp_path_factory.mktemp("site"))
