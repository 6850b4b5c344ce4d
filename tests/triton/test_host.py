"""The host's work in a step, counted: Python functions and calls into C. Times are for ``python -m benchmarks.host``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import looksam
from looksam_kernels.backends import native

pytest.importorskip("triton")

from looksam_kernels.backends.triton.launch import Launch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*interpreter:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="counts on CPU tensors"),
]

K = 5
MOST = {"reuse": (240, 150), "sharp": (450, 275)}
"""Python functions, and calls into C, of a step of LookSAM over AdamW with the extension: a tenth more than was counted."""
OF_A_TENSOR = {"reuse": 0, "sharp": 2}
"""Without it: both together, for each tensor. The sharp step asks whether two gradients share their memory."""


@pytest.fixture(autouse=True)
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(prepared: Launch, grid: Any, device: Any, *arguments: Any) -> None:
        if prepared.kernel.__name__ == "evaluate":
            arguments[6].zero_()  # found_inf, which is read on the CPU

    monkeypatch.setattr(Launch, "__call__", launch)


def counts(tensors: int) -> dict[str, tuple[int, int]]:
    """Of a reuse and of a sharp step, with gradients in new memory. What the closure calls is not counted."""
    params = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(tensors)]
    gradients = [[torch.randn_like(p, requires_grad=False) for p in params] for _ in range(2)]
    optimizer = looksam.LookSAM(params, "adamw", lr=0.1, k=K, backend="triton")
    turn = 0

    def closure() -> None:
        nonlocal turn
        give(params, gradients[turn])
        turn = 1 - turn

    for _ in range(2 * K):
        optimizer.step(closure)
    found = {}
    for kind, steps in (("sharp", 1), ("reuse", K - 1)):
        for _ in range(steps):
            found[kind] = counted(lambda: optimizer.step(closure))
    return found


def give(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for p, x in zip(params, gradients, strict=True):
        p.grad = x


def counted(step: Any) -> tuple[int, int]:
    functions = calls = 0

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal functions, calls
        if frame.f_globals.get("__name__", "").startswith("looksam"):
            functions += event == "call"
            calls += event == "c_call"

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return functions, calls


@pytest.mark.skipif(native.compiled() is None, reason="the extension is not built")
def test_the_count_is_bounded_and_the_same_for_any_number_of_tensors() -> None:
    few, many = counts(4), counts(40)
    assert few == many
    for kind, (functions, calls) in many.items():
        assert functions <= MOST[kind][0], (kind, functions)
        assert calls <= MOST[kind][1], (kind, calls)


def test_without_the_extension_the_count_for_a_tensor_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_C", None)
    few, many = counts(4), counts(40)
    for kind, most in OF_A_TENSOR.items():
        of_a_tensor = (sum(many[kind]) - sum(few[kind])) / 36
        assert of_a_tensor <= most, (kind, of_a_tensor)
