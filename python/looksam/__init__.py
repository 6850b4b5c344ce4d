"""Sharpness-aware optimizers for PyTorch: SAM, LookSAM, LayerSAM, Look-LayerSAM over fused base updates."""

from looksam.optimizer import SharpnessAware
from looksam.passes import frozen_running_stats
from looksam.variants import LAMB, SAM, VARIANTS, LayerSAM, LookLayerSAM, LookSAM

__all__ = ["LAMB", "SAM", "VARIANTS", "LayerSAM", "LookLayerSAM", "LookSAM", "SharpnessAware", "frozen_running_stats"]
