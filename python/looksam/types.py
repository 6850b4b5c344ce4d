"""The names that arguments may have, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from looksam_kernels import BackendName as BackendName

BaseName = Literal["sgd", "adam", "adamw", "adagrad", "rmsprop", "adadelta", "lamb", "lars", "lion", "adan"]
"""The fused bases."""
BaseOptimizer = BaseName | type[Optimizer]
NormScope = Literal["global", "tensor"]
NonFinite = Literal["skip", "ignore"]
WeightRounding = Literal["nearest", "stochastic"]
LayerScale = Literal["trust_normalized", "trust", "trust_global", "unit"]
ParameterFilter = Callable[[Tensor], bool]
"""Says of a parameter whether it is among those that are meant."""
Closure = Callable[..., Any]
