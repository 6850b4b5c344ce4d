"""``looksam compare``: several methods on the same task with the same seeds."""

from __future__ import annotations

import click

from ..design import Design
from ..experiment import command_of
from ..figures import curves
from ..options import COUNT, SEEDS, SHARE

METHODS = ("sgd", "sam", "sam-5", "looksam-5", "looksam-10", "looksam-20")
OPTIONS = (
    click.option(
        "--tune",
        type=COUNT,
        metavar="N",
        help="First try N settings of lr, weight decay, rho and alpha for each method, on seeds and a validation part of "
        "their own; then compare the best of each on --seeds and the test part.",
    ),
    click.option("--tune-seeds", type=SEEDS, default=2, help="Seeds of each setting that --tune tries."),
    click.option("--validation", type=SHARE, default=0.2, help="Part of the training images that --tune holds out."),
    click.option(
        "--controls/--no-controls", default=True, help="After --tune: add what LookSAM has to be better than."
    ),
)

DESIGN = Design(
    name="compare",
    summary="Train with each METHOD and compare.",
    scales={
        "smoke": {"methods": METHODS[:4], "seeds": 2, "epochs": 2, "train_size": 200},
        "laptop": {"methods": METHODS},
        "gpu": {"methods": METHODS, "data": None, "epochs": 30, "amp": "bf16"},
    },
    figures=curves,
    options=OPTIONS,
)
command = command_of(DESIGN)
