"""Sharpness-aware optimizers for PyTorch: SAM, LookSAM, LayerSAM and their relatives over fused base updates."""

from looksam.optimizer import SharpnessAware
from looksam.parallel import SAMPa
from looksam.passes import frozen_running_stats
from looksam.selecting import AESAM, ESAM, AELookSAM
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
    VaSSO,
)

__all__ = [
    "AESAM",
    "ASAM",
    "CRSAM",
    "ESAM",
    "GSAM",
    "LAMB",
    "LARS",
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
    "frozen_running_stats",
]
