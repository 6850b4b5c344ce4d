"""Importing this module ends the program with a remedy if the extra ``lab`` is not installed."""

from __future__ import annotations

from importlib.util import find_spec

for _name in ("click", "matplotlib", "numpy", "PIL", "rich", "scipy", "sklearn"):
    if find_spec(_name) is None:  # not imported: together they take seconds, and few commands need them all
        raise SystemExit(f"looksam: {_name} is not installed; run: pip install 'looksam-kernels[lab]'")
