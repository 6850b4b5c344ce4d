"""A pytest plugin: the native backend's CPU tensors go through the CUDA binding and kernels, on the host harness."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from types import ModuleType

import torch  # noqa: F401  (its libraries are what the harness is linked against)

from looksam_kernels.backends import native


def _harness() -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_harness", os.environ["LOOKSAM_HARNESS"])
    spec = importlib.util.spec_from_file_location("_harness", loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


_compiled = native._C
native.compiled = lambda: _compiled  # what is not of one device stays the CPU module's
native._C = _harness()
native._RULES = frozenset(native._C.rules())
native.first_misfit = lambda tensors, weights, scalar: 0  # table.py then looks for itself
