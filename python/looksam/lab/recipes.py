"""Recipes: the tasks of the literature, by name. What the user gives on the command line takes precedence.

alpha, and rho of Look-LayerSAM, are those of Liu et al. 2022; the other values are the usual ones for these models. Nobody has
run the recipes of this file in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "cifar100-resnet18-looksam": {
        "methods": ("sgd", "sam:rho=0.1", "looksam-5:rho=0.1,alpha=0.7"),
        "data": None, "model": "resnet18", "epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4,
    },
    "cifar100-wrn28-10-looksam": {
        "methods": ("sgd", "sam:rho=0.1", "looksam-5:rho=0.1,alpha=0.7"),
        "data": None, "model": "wrn28-10", "epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4,
    },
    "imagenet-vit-b16-looksam": {
        "methods": ("looksam-5+adamw:rho=0.1,alpha=0.7",),
        "data": None, "stream": True, "image_size": 224, "model": "vit-base", "patch": 16, "epochs": 300, "batch_size": 4096,
        "lr": 3e-3, "weight_decay": 0.3, "warmup": 32.0, "clip": 1.0,
    },
    "imagenet-vit-b16-looklayersam-lamb": {
        "methods": ("looklayersam-5+lamb:rho=1.0,alpha=0.7",),
        "data": None, "stream": True, "image_size": 224, "model": "vit-base", "patch": 16, "epochs": 300, "batch_size": 32768,
        "lr": 1e-2, "weight_decay": 0.1, "warmup": 60.0, "clip": 1.0,
    },
}  # fmt: skip
