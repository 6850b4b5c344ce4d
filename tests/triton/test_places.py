"""Where the tensors of a column are: the compiled class and its twin in Python say the same."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from looksam_kernels.backends import native
from looksam_kernels.backends.triton.places import MOVED, OTHER, SAME, PlainPlaces

Column = list[Tensor | None]


@pytest.fixture(params=["compiled", "plain"])
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    if request.param == "plain":
        return PlainPlaces
    if native.compiled() is None:
        pytest.skip("the extension is not built")
    return native.compiled().Places


def column() -> Column:
    return [torch.zeros(4, 8), torch.zeros(8), None, torch.zeros(())]


def changed(row: int, x: Tensor | None) -> Callable[[Column], Column]:
    return lambda tensors: [*tensors[:row], x, *tensors[row + 1 :]]


def at(offset: int) -> Tensor:
    """Four numbers, so many bytes after a multiple of 16."""
    memory = torch.zeros(32, dtype=torch.uint8)
    assert memory.data_ptr() % 16 == 0
    return memory[offset : offset + 16].view(torch.float32)


CHANGES: dict[str, tuple[Callable[[Column], Column], int]] = {
    "nothing": (list, SAME),
    "new memory": (changed(1, torch.zeros(8)), MOVED),
    "another element type": (changed(1, torch.zeros(8, dtype=torch.float64)), OTHER),
    "other strides": (changed(0, torch.zeros(8, 4).t()), OTHER),
    "a tensor fewer": (changed(1, None), OTHER),
    "a tensor more": (changed(2, torch.zeros(3)), OTHER),
    "negated when it is read": (changed(1, torch.zeros(8, dtype=torch.complex64).conj().imag[:8].expand(8)), OTHER),
    "not at a multiple of 16 bytes": (changed(1, at(4)), OTHER),
    "nowhere": (changed(1, torch.zeros(0)), OTHER),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_since_the_last_time(name: str, make: Callable[[], Any]) -> None:
    change, difference = CHANGES[name]
    places, before = make(), column()
    assert places.look(before) == OTHER
    after = change(before)
    assert places.look(after) == difference
    assert places.look(after) == SAME
    addresses = struct.unpack(f"{len(after)}q", bytes(places.addresses()))
    assert addresses == tuple(0 if x is None else x.data_ptr() for x in after)


def test_other_bytes_beyond_a_multiple_of_16(make: Callable[[], Any]) -> None:
    places = make()
    first, second, third = at(4), at(4), at(8)
    assert [places.look([x]) for x in (first, second, third)] == [OTHER, MOVED, OTHER]


def test_what_has_moved(make: Callable[[], Any]) -> None:
    places, before = make(), [torch.zeros(4), torch.zeros(8), torch.zeros(0)]
    places.look(before)
    assert not places.moved(before)
    assert not places.moved([x.view(-1) for x in before])
    assert places.moved([before[0], torch.zeros(8), before[2]])
    assert places.moved(before[:2])


@pytest.mark.parametrize("absent", [(), (1,), (0, 1, 2)])
def test_gradients_are_taken(absent: tuple[int, ...], make: Callable[[], Any]) -> None:
    params = [torch.nn.Parameter(torch.ones(n, 2)) for n in (1, 2, 3)]
    for row, p in enumerate(params):
        p.grad = None if row in absent else torch.ones_like(p)
    places = make()
    gradients = [p.grad for p in params]
    flags = [row not in absent for row in range(3)]
    assert places.take(params, params) == (OTHER, all(flags) or flags)
    assert all(x is y for x, y in zip(places.tensors(), gradients, strict=True))
    assert places.look(gradients) == SAME
    assert places.take(params, params) == (SAME, all(flags) or flags)


def test_gradients_are_kept_until_they_are_released(make: Callable[[], Any]) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    storage = p.grad.untyped_storage()
    uses, places = torch._C._storage_Use_Count, make()
    before = uses(storage._cdata)
    places.take([p], [p])
    p.grad = None
    assert uses(storage._cdata) == before
    places.release()
    assert uses(storage._cdata) == before - 1


MISFITS: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "sparse": (torch.ones(2, 2), torch.ones(2, 2).to_sparse(), torch.ones(2, 2)),
    "complex": (torch.ones(2, 2) + 1j, torch.ones(2, 2) + 1j, torch.ones(2, 2) + 1j),
    "of another shape": (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 2)),
    "elsewhere": (torch.ones(2, device="meta"), torch.ones(2, device="meta"), torch.ones(2)),
}
"""Parameter, gradient, and what the table has for the parameter."""


@pytest.mark.parametrize("name", MISFITS)
def test_a_gradient_that_does_not_fit_is_not_taken(name: str, make: Callable[[], Any]) -> None:
    start, gradient, weight = MISFITS[name]
    p, places = torch.nn.Parameter(start), make()
    p.grad = gradient
    assert places.take([p], [weight]) is None
    assert places.tensors() == []
