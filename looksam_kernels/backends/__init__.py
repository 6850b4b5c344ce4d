"""Which implementation runs the ops: native, then triton, then reference; or the one that is asked for.

A backend is a module with the functions of :class:`Backend`. It may add those of :class:`Extras`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from looksam_kernels.preconditioning import Preconditioner

if TYPE_CHECKING:
    from looksam_kernels.formulas import Coefficients, Groups, Pair, Scaling, Sums
    from looksam_kernels.masks import Mask
    from looksam_kernels.table import TensorTable

BackendName = Literal["native", "triton", "reference"]
ORDER: tuple[BackendName, ...] = get_args(BackendName)
"""The first that runs on a device is taken."""

Adaptive = Sequence[float | None] | Preconditioner | None
"""The factor T of each element: ASAM's eta of each row where T = |w| + eta (``None`` in rows where T = 1), or a
preconditioner; ``None``: T = 1 in all."""


def of_rows(adaptive: Adaptive, rows: Sequence[int], device: torch.device) -> Adaptive:
    """T of these rows, which are on this device."""
    if adaptive is None or isinstance(adaptive, Preconditioner):
        return adaptive and adaptive.of_rows(rows, device)
    return [adaptive[row] for row in rows]


class Backend(Protocol):
    """What a backend must have; what the ops do is in :mod:`looksam_kernels.ops`. One of the modules, or
    :class:`looksam_kernels.backends.split.Split` over several devices."""

    __name__: str

    def unavailable(self, device: torch.device) -> str | None:
        """``None`` where it runs on tensors of this device, else the reason why not."""

    def sums(self, table: TensorTable, pairs: Sequence[Pair], adaptive: Adaptive) -> Sums: ...

    def coefficients(
        self, table: TensorTable, rule: str, sums: Sums, groups: Groups, scaling: Scaling
    ) -> Coefficients: ...

    def perturb(
        self, table: TensorTable, coefficients: Coefficients, adaptive: Adaptive, mask: Mask | None
    ) -> None: ...

    def step(self, table: TensorTable, base: str, coefficients: Coefficients, groups: Groups) -> None: ...

    def restore(self, table: TensorTable) -> None: ...


class Extras(Protocol):
    """What a backend may have."""

    def measure(
        self,
        table: TensorTable,
        rule: str,
        pairs: Sequence[Pair],
        known: Sums | None,
        groups: Groups,
        adaptive: Adaptive,
        scaling: Scaling,
    ) -> tuple[Sums, Coefficients]:
        """``sums`` and ``coefficients`` in one launch."""

    def measure_and_perturb(
        self,
        table: TensorTable,
        rule: str,
        pairs: Sequence[Pair],
        known: Sums | None,
        groups: Groups,
        adaptive: Adaptive,
        scaling: Scaling,
        mask: Mask | None,
    ) -> tuple[Sums, Tensor] | None:
        """``measure`` and ``perturb`` in one call: all sums and found_inf. ``None``, and nothing is done, where it cannot."""

    def measure_and_step(
        self,
        table: TensorTable,
        rule: str,
        pairs: Sequence[Pair],
        known: Sums | None,
        groups: Groups,
        scaling: Scaling,
        base: str,
        check: bool,
    ) -> Tensor | None:
        """``measure`` and ``step`` in one call: found_inf. ``None``, and nothing is done, where it cannot."""

    def forget(self, table: TensorTable, column: str) -> None:
        """Lets go of a column's tensors, where the backend holds them too."""

    def take_gradients(self, table: TensorTable, column: str, params: Sequence[Tensor]) -> bool | list[bool] | None:
        """Sets a column to ``p.grad`` of each, and keeps the tensors in ``table.handle``, where ``get(column)`` makes the
        list. True where all have one, else a flag for each; ``None``, and nothing is set, where that does not go."""

    def first_misfit(self, tensors: list[Tensor | None], weights: list[Tensor | None], scalar: bool) -> int:
        """The first row whose tensor may not fit its parameter (``scalar``: may not be 0-dim), or -1."""

    def only_on_request(self, device: torch.device) -> str | None:
        """Why it is not chosen by itself for this device, although it runs there."""


_forced: str | None = None


class BackendInfo(NamedTuple):
    """One line of :func:`backend_info`: is the backend there, is it the one that runs, and why not."""

    available: bool
    selected: bool
    reason: str


class use_backend:
    """Forces a backend from now on; as a context manager, until the end of the block.

    ``use_backend("reference")`` or ``with use_backend("native"): ...``. ``None`` goes back to the automatic choice.
    A table keeps the backend that it was made with.

    Raises:
        ValueError: the name is none of ``native``, ``triton``, ``reference``.
        RuntimeError: the backend is not there; the message says why.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            _require(name, None)
        self._before, _forced = _forced, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> Literal[False]:
        global _forced
        _forced = self._before
        return False


def select(requested: str | None, *devices: torch.device, readable: bool = True) -> Backend:
    """The backend for tensors on these devices: ``requested``, else the forced one, else ``LOOKSAM_BACKEND``, else the
    first that runs there.

    Args:
        readable: :func:`looksam_kernels.memory.readable`; for tensors that are not, the reference.

    Raises:
        ValueError: unknown name. RuntimeError: a backend that was asked for cannot run on one of the devices.
    """
    name = requested or forced()
    if not readable:
        if name not in (None, "reference"):
            raise RuntimeError(
                f"backend {name!r} cannot run on parameters without memory of their own (FakeTensorMode, functorch, "
                "make_fx, tensors around tensors); 'reference' can"
            )
        return _load("reference")
    chosen = {device: _first(device) if name is None else _require(name, device) for device in devices}
    if len(devices) == 1 or all(name_of(module) == "reference" for module in chosen.values()):
        return chosen[devices[0]]
    return _load("split").Split(chosen)


def _first(device: torch.device) -> Backend:
    return next(_load(n) for n in ORDER if _reason(n, device) is None and _only_on_request(n, device) is None)


def forced() -> str | None:
    """The backend that :class:`use_backend` or ``LOOKSAM_BACKEND`` asks for, or ``None``."""
    return _forced or os.environ.get("LOOKSAM_BACKEND") or None


def backend_info(device: torch.device | str | None = None) -> dict[str, BackendInfo]:
    """Which backends run on ``device`` (default: CUDA where there is one, else the CPU), and why the others do not."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        selected = name_of(select(None, device))
    except (RuntimeError, ValueError):
        selected = ""
    return {
        n: BackendInfo((why := _reason(n, device)) is None, n == selected, why or _only_on_request(n, device) or "")
        for n in ORDER
    }


def name_of(backend: Backend) -> str:
    """``native``, ``triton`` or ``reference``."""
    name: str = backend.__name__
    return name.rpartition(".")[2]


def _require(name: str, device: torch.device | None) -> Backend:
    if name not in ORDER:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(ORDER)}")
    where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why = _reason(name, where)
    if why is not None and (device is not None or _reason(name, torch.device("cpu")) is not None):
        raise RuntimeError(f"backend {name!r} cannot run on {where.type} tensors: {why}")
    return _load(name)


def _reason(name: str, device: torch.device) -> str | None:
    try:
        return _load(name).unavailable(device)
    except ImportError as error:
        return str(error)


def _only_on_request(name: str, device: torch.device) -> str | None:
    why = getattr(_load(name), "only_on_request", None)
    return why(device) if why is not None else None


def _load(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
