"""The build backend: setuptools', working on a copy of the tree.

A stale ``build/`` folder or a module that was compiled in place then never gets into a wheel or an sdist, and nothing is
written into the tree, which may be read-only. Editable installs work in the tree itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import build_meta

LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", ".editable", ".hypothesis", ".benchmarks", "__pycache__", "*.egg-info", "*.so", "*.pyc",
    "native_build.txt",
)  # fmt: skip
AT_THE_TOP = {"build", "dist", "site", "runs", "venv", "env"}

get_requires_for_build_editable = build_meta.get_requires_for_build_editable
build_editable = build_meta.build_editable
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return []


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    with a_copy():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    wheel_directory = os.path.abspath(wheel_directory)
    with a_copy():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    sdist_directory = os.path.abspath(sdist_directory)
    with a_copy():
        return build_meta.build_sdist(sdist_directory, config_settings)


@contextlib.contextmanager
def a_copy() -> Iterator[None]:
    """The working folder is a copy of the tree, which goes when it is done; the version is that of the tree itself."""
    root = Path.cwd()
    environment = dict(os.environ)

    def left_behind(folder: str, names: list[str]) -> set[str]:
        return set(LEFT_BEHIND(folder, names)) | (AT_THE_TOP & set(names) if Path(folder) == root else set())

    with tempfile.TemporaryDirectory(prefix="looksam-build-") as temporary:
        copy = Path(temporary, "tree")
        os.environ.setdefault("SETUPTOOLS_SCM_PRETEND_VERSION_FOR_LOOKSAM_KERNELS", version_of(root))
        shutil.copytree(root, copy, ignore=left_behind, symlinks=True)
        os.chdir(copy)
        try:
            yield
        finally:
            os.chdir(root)
            os.environ.clear()
            os.environ.update(environment)


def version_of(root: Path) -> str:
    """From git, or from an sdist's metadata, or else the fallback; pyproject.toml says how."""
    command = [sys.executable, "-m", "setuptools_scm"]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()[-1]
