"""Every optimizer class of torch.optim and of the packages that people take theirs from: how each is made, and which of
them cannot be a base, with the reason."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

PACKAGES = {
    "torch.optim": "torch",
    "pytorch_optimizer": "pytorch-optimizer",
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigyopt",
    "dadaptation": "dadaptation",
}
"""Module -> distribution."""

NEEDS_CLOSURE = "its `step` calls the closure itself"
WRAPS = "it takes an optimizer, not parameters"
SHARPNESS = "it is a sharpness-aware optimizer itself"
MODEL = "it takes the model, not parameters"
SECOND_ORDER = "it differentiates the gradient once more, and a combination of gradients has no graph"
MATRICES = "matrices"
MUON = "muon"

CANNOT: dict[str, str] = {
    "torch.optim.LBFGS": NEEDS_CLOSURE,
    "torch.optim.SparseAdam": "it takes sparse gradients only",
    "pytorch_optimizer.AliG": NEEDS_CLOSURE,
    "pytorch_optimizer.AdaHessian": SECOND_ORDER,
    "pytorch_optimizer.SophiaH": SECOND_ORDER,
    "pytorch_optimizer.AdaLOMO": MODEL,
    "pytorch_optimizer.LOMO": MODEL,
    "pytorch_optimizer.AdamMini": MODEL,
    "pytorch_optimizer.BSAM": SHARPNESS,
    "pytorch_optimizer.FriendlySAM": SHARPNESS,
    "pytorch_optimizer.GSAM": SHARPNESS,
    "pytorch_optimizer.LookSAM": SHARPNESS,
    "pytorch_optimizer.SAM": SHARPNESS,
    "pytorch_optimizer.WSAM": SHARPNESS,
    "pytorch_optimizer.Lookahead": WRAPS,
    "pytorch_optimizer.OrthoGrad": WRAPS,
    "pytorch_optimizer.PCGrad": WRAPS,
    "pytorch_optimizer.SafeFP16Optimizer": WRAPS,
    "pytorch_optimizer.ScheduleFreeWrapper": WRAPS,
    "pytorch_optimizer.TRAC": WRAPS,
    "schedulefree.AdamWScheduleFreeClosure": NEEDS_CLOSURE,
    "schedulefree.RAdamScheduleFreeClosure": NEEDS_CLOSURE,
    "schedulefree.SGDScheduleFreeClosure": NEEDS_CLOSURE,
}
"""Those that no sharpness-aware optimizer can have as its base."""

LAST_BIT_DECIDES = ("pytorch_optimizer.SOAP",)
"""Those that take the eigenvectors of singular matrices: gradients that differ by a rounding lead elsewhere."""

NOT_RESUMED = ("torch.optim.NAdam", "pytorch_optimizer.Kron", "pytorch_optimizer.QHAdam")
"""Those that alone do not go on bit for bit after their checkpoint was loaded: torch casts float32 entries of their state to
the parameters' float64, or an attribute is not saved."""

OPTIONS: dict[str, dict[str, Any]] = {
    "pytorch_optimizer.AdaShift": {"keep_num": 2},
    "pytorch_optimizer.Ranger21": {"num_iterations": 100},
    "pytorch_optimizer.SaRA": {"threshold": 1.0},
    "pytorch_optimizer.AdaMuon": {"adamw_lr": 1e-2},
    "pytorch_optimizer.Prodigy": {"lr": 1.0, "d0": 1e-2},
    "prodigyopt.Prodigy": {"lr": 1.0, "d0": 1e-2},
    **{
        f"{package}.DAdapt{name}": {"lr": 1.0, "d0": 1e-2}
        for package in ("pytorch_optimizer", "dadaptation")
        for name in ("AdaGrad", "Adam", "Adan", "Lion", "SGD")
    },
}
"""Without which a class does not move in a few steps, or cannot be made."""

PARAMETERS: dict[str, str] = {
    "torch.optim.Muon": MATRICES,
    "pytorch_optimizer.SpectralSphere": MATRICES,
    **{
        f"pytorch_optimizer.{name}": MUON
        for name in ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")
    },
}
"""Classes for matrices alone, or with groups that say which they are."""


ONLY_FLOAT32 = ("pytorch_optimizer.FAdam",)
NEED_PROCESS_GROUP = ("pytorch_optimizer.DeMo", "pytorch_optimizer.DistributedMuon")


class Class(NamedTuple):
    name: str
    cls: type[Optimizer]

    @property
    def options(self) -> dict[str, Any]:
        options = {"lr": 1e-2} if "lr" in inspect.signature(self.cls).parameters else {}
        return {**options, **OPTIONS.get(self.name, {})}

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.name in ONLY_FLOAT32 else torch.float64

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        bias = PARAMETERS.get(self.name) != MATRICES
        layers = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 4, bias=bias))
        return layers.to(self.dtype)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        params = [*model.parameters()]
        if PARAMETERS.get(self.name) != MUON:
            return [{"params": params}]
        return [
            {"params": [p for p in params if p.ndim == 2], "use_muon": True},
            {"params": [p for p in params if p.ndim < 2], "use_muon": False},
        ]


def importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def all_classes() -> list[Class]:
    """The optimizer classes that the modules export, each once: pytorch_optimizer exports some of torch's."""
    found: dict[type[Optimizer], Class] = {}
    for module in filter(importable, PACKAGES):
        for name, cls in sorted(vars(importlib.import_module(module)).items()):
            if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer:
                found.setdefault(cls, Class(f"{module}.{name}", cls))
    return [*found.values()]
