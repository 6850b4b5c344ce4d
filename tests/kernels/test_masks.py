"""The random element masks: rates, independence of what a mask is drawn for, and offsets that no test table reaches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import looksam_kernels as lk
from looksam_kernels.masks import mix

N = 1 << 20
SIGMAS = 4.5
"""Deviations that one of a hundred thousand fair draws exceeds."""


def bits(keep: float, seed: int = 0, draw: int = 0, row: int = 0, n: int = N) -> Tensor:
    return lk.Mask(keep, seed, draw).row(row, torch.empty(n)).double()


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.5, 0.6, 0.999])
@pytest.mark.parametrize("seed", [0, 1, 2**63 + 1])
def test_the_share_of_kept_elements_is_keep(keep: float, seed: int) -> None:
    sigma = math.sqrt(keep * (1 - keep) / N)
    assert abs(bits(keep, seed).mean().item() - keep) < SIGMAS * sigma


ORIGIN = {"seed": 0, "draw": 0, "row": 0}


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 2**32}, {"draw": 1}, {"row": 1}, {"row": 2**20}])
@pytest.mark.parametrize("shift", [0, 1, 2, 64, 4096])
def test_masks_of_other_seeds_draws_and_rows_are_uncorrelated_at_every_shift(other: dict[str, int], shift: int) -> None:
    assert_uncorrelated(bits(0.5), bits(0.5, **(ORIGIN | other)), shift)


@pytest.mark.parametrize("shift", [1, 2, 3, 16, 256, 8192, 65536])
def test_elements_of_one_mask_are_uncorrelated(shift: int) -> None:
    assert_uncorrelated(bits(0.5), bits(0.5), shift)


@pytest.mark.parametrize("other", [{"seed": 1}, {"draw": 1}, {"row": 1}])
@pytest.mark.parametrize("flip", [1, 2, 256, 1 << 19])
def test_no_mask_is_another_one_with_its_indices_flipped(other: dict[str, int], flip: int) -> None:
    """As it would be if the key were only xored to the index."""
    assert_uncorrelated(bits(0.5), bits(0.5, **(ORIGIN | other))[torch.arange(N) ^ flip], 0)


def assert_uncorrelated(x: Tensor, y: Tensor, shift: int) -> None:
    x, y = x[: N - shift] - 0.5, y[shift:] - 0.5
    assert abs((4 * x * y).mean().item()) < SIGMAS / math.sqrt(len(x))


def test_a_larger_keep_keeps_more_of_the_same() -> None:
    assert (bits(0.3) <= bits(0.6)).all()


def test_mix_is_a_bijection_on_ints_and_tensors_alike() -> None:
    words = torch.randint(0, 2**32, (1000,), generator=torch.Generator().manual_seed(0))
    mixed = mix(words)
    assert [mix(x) for x in words.tolist()] == mixed.tolist()
    assert ((mixed >= 0) & (mixed < 2**32)).all()
    assert len(set(mix(torch.arange(1 << 20)).tolist())) == 1 << 20


@pytest.mark.parametrize(("keep", "threshold"), [(1e-12, 1), (0.25, 2**30), (1 - 1e-12, 2**32 - 1)])
def test_thresholds_have_32_bits_and_are_never_0(keep: float, threshold: int) -> None:
    assert lk.Mask(keep).threshold == threshold
