"""``looksam train``: one method."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ..design import SCALES, Design, Values
from ..experiment import command_of
from ..figures import curves


def one(methods: Sequence[str], values: Values) -> list[str]:
    if len(methods) != 1:
        raise click.UsageError(f"train takes one METHOD, not {len(methods)}; looksam compare takes several")
    return list(methods)


DESIGN = Design(
    name="train",
    summary="Train a model with METHOD.",
    scales={scale: {"seeds": 1, "epochs": 2} if scale == "smoke" else {"seeds": 1} for scale in SCALES},
    figures=curves,
    expand=one,
)
command = command_of(DESIGN)
