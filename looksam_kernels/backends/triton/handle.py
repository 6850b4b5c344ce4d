"""What the backend keeps for a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from looksam_kernels.backends.triton.graphs import Graphs
from looksam_kernels.backends.triton.places import SAME, Places, places
from looksam_kernels.table import TensorTable


class Handle:
    """The gradients that were taken, where the tensors of each column are, and what the device has of it."""

    def __init__(self) -> None:
        self.layout: Any = None
        """How its tensors lie on the device (:class:`looksam_kernels.backends.triton.layout.Layout`)."""
        self.graphs = Graphs()
        self.places: dict[str, Places] = {}
        self.changed: dict[str, int] = {}
        """The columns whose addresses on the device are out of date, and how much has changed."""

    def look(self, name: str, tensors: list[Tensor | None]) -> None:
        if name not in self.places:
            self.places[name] = places()
        self._note(name, self.places[name].look(tensors))

    def take(self, name: str, params: Sequence[Tensor], weights: list[Tensor]) -> bool | list[bool] | None:
        """As ``take_gradients`` of the backend."""
        if name not in self.places:
            self.places[name] = places()
        taken = self.places[name].take(params, weights)
        if taken is None:
            return None
        self._note(name, taken[0])
        return taken[1]

    def get(self, name: str) -> list[Tensor | None]:
        """The tensors that were taken."""
        return self.places[name].tensors()

    def release(self, name: str) -> None:
        """Lets go of them."""
        if name in self.places:
            self.places[name].release()

    def _note(self, name: str, change: int) -> None:
        if change != SAME:
            self.changed[name] = max(change, self.changed.get(name, SAME))


def handle_of(table: TensorTable) -> Handle:
    if table.handle is None:
        table.handle = Handle()
    handle: Handle = table.handle
    return handle
