"""Sharpness-aware optimizers for PyTorch: SAM, LookSAM, LayerSAM and their relatives over fused base updates."""

from __future__ import annotations

from . import _companion  # noqa: F401  # isort: skip - before all that imports looksam_kernels
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looksam.aesam import AESAM, AELookSAM
    from looksam.esam import ESAM
    from looksam.one_pass import MSAM, S2SAM
    from looksam.optimizer import SharpnessAware
    from looksam.passes import frozen_running_stats
    from looksam.plans import rule
    from looksam.sampa import SAMPa
    from looksam.standalone import LAMB, LARS, Lion
    from looksam.variants import (
        ASAM,
        CRSAM,
        GSAM,
        SAM,
        SSAM,
        VARIANTS,
        WSAM,
        FriendlySAM,
        LayerSAM,
        LookLayerSAM,
        LookSAM,
        VaSSO,
    )

    __version__: str

__all__ = [
    "AESAM",
    "ASAM",
    "CRSAM",
    "ESAM",
    "GSAM",
    "LAMB",
    "LARS",
    "MSAM",
    "S2SAM",
    "SAM",
    "SSAM",
    "VARIANTS",
    "WSAM",
    "AELookSAM",
    "FriendlySAM",
    "LayerSAM",
    "Lion",
    "LookLayerSAM",
    "LookSAM",
    "SAMPa",
    "SharpnessAware",
    "VaSSO",
    "__version__",
    "frozen_running_stats",
    "rule",
]

_MODULES = ("aesam", "esam", "one_pass", "optimizer", "passes", "plans", "sampa", "standalone", "variants")


def __getattr__(name: str) -> Any:
    """Loads everything, torch included, at the first use of a public name: ``looksam --help`` needs none of it."""
    if name == "__version__":
        return _version()
    if name in __all__:
        for module in _MODULES:
            members = vars(import_module(f"{__name__}.{module}"))
            globals().update({public: members[public] for public in __all__ if public in members})
        return globals()[name]
    if name in _MODULES:  # not the others: the modules themselves ask here for what they import from the package
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("looksam-kernels")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
