"""Sharpness-aware optimizers for PyTorch: SAM, LookSAM, LayerSAM and their relatives over fused base updates."""

from looksam.optimizer import SharpnessAware
from looksam.passes import frozen_running_stats
from looksam.variants import (
    ASAM,
    CRSAM,
    GSAM,
    LAMB,
    LARS,
    SAM,
    SSAM,
    VARIANTS,
    WSAM,
    FriendlySAM,
    LayerSAM,
    Lion,
    LookLayerSAM,
    LookSAM,
    SAMPa,
    VaSSO,
)

__all__ = [
    "ASAM",
    "CRSAM",
    "GSAM",
    "LAMB",
    "LARS",
    "SAM",
    "SSAM",
    "VARIANTS",
    "WSAM",
    "FriendlySAM",
    "LayerSAM",
    "Lion",
    "LookLayerSAM",
    "LookSAM",
    "SAMPa",
    "SharpnessAware",
    "VaSSO",
    "frozen_running_stats",
]
