"""Importing this module makes ``import looksam_kernels`` find the copy that belongs to this ``looksam``.

A Python started in a checkout would take ``looksam_kernels`` from there, beside an installed ``looksam`` of perhaps another
version: it looks into its working folder first.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

NAME = "looksam_kernels"


class Companion:
    """Finds ``looksam_kernels`` in one folder, before Python looks anywhere else."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(NAME, [str(self.root)]) if name == NAME else None


def settle(here: Path) -> None:
    """``here`` is the folder of ``looksam``."""
    for root in (here.parent, here.parent.parent):  # installed side by side, or python/looksam in a checkout
        if not (root / NAME / "__init__.py").is_file():
            continue
        if NAME not in sys.modules:
            sys.meta_path.insert(0, Companion(root))
        elif (loaded := Path(str(sys.modules[NAME].__file__)).resolve().parent) != (root / NAME).resolve():
            warnings.warn(
                f"looksam is imported from {here}, but looksam_kernels from {loaded}, which may be another version; "
                "start Python in another folder, or import looksam first",
                RuntimeWarning,
                stacklevel=2,
            )
        return


settle(Path(__file__).parent)
