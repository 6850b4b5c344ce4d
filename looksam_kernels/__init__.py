"""The lower layer: functions on tensors. No optimizer class and no variant's name in here.

A sharpness-aware step is a few :func:`sums` over aligned lists of tensors, a few scalars on the device
(:func:`coefficients`), and one linear combination fused into a base update (:func:`perturb`, :func:`step`).
"""

from looksam_kernels import one_pass as one_pass  # its rules stand in the table from the first import on
from looksam_kernels.backends import ORDER as BACKENDS
from looksam_kernels.backends import BackendInfo, BackendName, backend_info, use_backend
from looksam_kernels.masks import Mask
from looksam_kernels.ops import coefficients, measure, perturb, restore, step, sums
from looksam_kernels.preconditioning import Preconditioner, preconditioner
from looksam_kernels.rounding import Rounding
from looksam_kernels.table import TensorTable

__all__ = [
    "BACKENDS",
    "BackendInfo",
    "BackendName",
    "Mask",
    "Preconditioner",
    "Rounding",
    "TensorTable",
    "backend_info",
    "coefficients",
    "measure",
    "perturb",
    "preconditioner",
    "restore",
    "step",
    "sums",
    "use_backend",
]
