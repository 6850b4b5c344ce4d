"""Finds the compiled modules ``_C`` and ``_cuda`` that fit this torch, this Python and these sources, and loads them.

They may lie in the package's folder (compiled at installation, or in place), in another installed copy of the package (a
Python started in a checkout imports the checkout's files), or in the user's cache (``python -m looksam_kernels build``).
A module that was made for something else is never loaded: it could crash, or compute something else.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from looksam_kernels.build import builder, cache, recipe
from looksam_kernels.build.recipe import COMMAND, CPU, CUDA, Stamp

PACKAGE = "looksam_kernels"


class Found(NamedTuple):
    """A module, or the reason why there is none that can run."""

    module: ModuleType | None
    reason: str | None
    stamp: Stamp | None = None
    """What the module was made for."""


def load(name: str) -> Found:
    """The first module of that name that fits, loaded as ``looksam_kernels.<name>``."""
    misfits = []
    for file in _candidates(name):
        stamp, why = judge(file, name)
        if why is None:
            try:
                return Found(_import(file, name), None, stamp)
            except ImportError as error:
                why = f"{file} cannot be loaded ({error})"
        misfits.append(why)
    return Found(None, f"{misfits[0] if misfits else _never_compiled(name)}; {remedy(name)}")


def judge(file: Path, name: str) -> tuple[Stamp | None, str | None]:
    """The file's stamp, and why it does not fit here."""
    stamp = recipe.read_stamp(file)
    what = "the compiled extension" if name == CPU else "the extension for CUDA tensors"
    if stamp is None:
        return None, f"{what} does not say what it was built for"
    if stamp.python != recipe.python_abi():
        return stamp, f"{what} was built for Python {stamp.python}, this is {recipe.python_abi()}"
    if stamp.torch != torch.__version__:
        return stamp, f"{what} was built for torch {stamp.torch}, this is torch {torch.__version__}"
    if name == CUDA and stamp.cuda != torch.version.cuda:
        return stamp, f"{what} was built for CUDA {stamp.cuda}, this is a torch for CUDA {torch.version.cuda}"
    if stamp.machine != platform.machine():
        return stamp, f"{what} was built for {stamp.machine}, this is {platform.machine()}"
    source = builder.csrc()
    if source is not None and stamp.sources != recipe.digest(source, name):
        return stamp, f"{what} was built from other sources than those in {source}"
    return stamp, None


def remedy(name: str) -> str:
    """What makes the module run here, as a sentence without a full stop."""
    if name == CUDA and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if name == CUDA and recipe.nvcc() is None:
        return f"install nvcc, then run: {COMMAND}"
    if shutil.which(recipe.compiler()[0]) is None:
        return f"install a C++ compiler (on Debian and Ubuntu: apt install g++), then run: {COMMAND}"
    return f"run: {COMMAND}"


def _candidates(name: str) -> Iterator[Path]:
    """The package's own file first, whatever it was made for; then copies of the package elsewhere; then the cache."""
    folder = Path(__file__).resolve().parent
    folders = dict.fromkeys([folder, *((Path(entry) / PACKAGE).resolve() for entry in sys.path if entry)])
    found = [path for folder in folders for path in _modules_in(folder, name)] + cache.modules(name)
    yield from sorted(found, key=lambda path: not path.name.endswith(f".{recipe.python_abi()}.so"))


def _modules_in(folder: Path, name: str) -> list[Path]:
    try:
        return sorted(folder.glob(f"{name}.*.so"))
    except OSError:
        return []


def _never_compiled(name: str) -> str:
    note = Path(__file__).with_name("native_build.txt")  # left by setup.py
    if name == CPU and note.exists():
        return f"there is no compiled extension ({note.read_text().strip()})"
    return "there is no compiled extension" if name == CPU else "there is no extension for CUDA tensors"


def _import(file: Path, name: str) -> ModuleType:
    full = f"{PACKAGE}.{name}"
    spec = importlib.util.spec_from_file_location(full, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[full] = module
    setattr(sys.modules[PACKAGE], name, module)
    return module
