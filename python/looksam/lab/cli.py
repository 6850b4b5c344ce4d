"""The command ``looksam``."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from importlib import import_module
from typing import Any

from . import requirements  # noqa: F401  # isort: skip - before all that imports them
import click

COMMANDS = {
    "train": "Train a model with one METHOD.",
    "compare": "Train with each METHOD and compare them.",
    "tradeoff": "Accuracy against passes and throughput, over the period k.",
    "sensitivity": "Accuracy over alpha and rho.",
    "drift": "How far SAM's gradient and its parts move in a few steps.",
    "landscape": "Loss surfaces, sharpness in the rho-ball, Hessian eigenvalues.",
    "robustness": "Accuracy on corrupted and on adversarial images.",
    "large-batch": "LAMB and the variants over it, over growing batches.",
    "report": "Rebuild the reports of experiments, and one page of them all.",
    "cache": "Show or clear the cache of decoded data sets.",
    "info": "Show versions, devices and backends.",
}
"""Each is the module of its name in ``experiments`` or ``commands``, imported when it is called: they import torch, and help
does not need it."""
TOOLS = ("report", "cache", "info")
"""The commands that are no experiments."""


class Commands(click.Group):
    """The commands, loaded when they are asked for. Of the processes of torchrun only the first one speaks."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        package = "commands" if cmd_name in TOOLS else "experiments"
        command: click.Command = import_module(f"{__package__}.{package}.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a locale without the signs of the tables is no reason to fail
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
            return self._in_silence(*args, **kwargs)
        return super().main(*args, **kwargs)

    def _in_silence(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`main`, but what all processes have to say is left to the first. Tracebacks are this process's own."""
        standalone_mode = kwargs.get("standalone_mode", True)
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                status = super().main(*args, **kwargs | {"standalone_mode": False})
            except (click.ClickException, click.Abort) as error:
                if not standalone_mode:
                    raise
                raise SystemExit(getattr(error, "exit_code", 1)) from None
        if standalone_mode:
            raise SystemExit(status)
        return status


@click.group(
    cls=Commands,
    context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="looksam-kernels")
def main() -> None:
    """Train small image classifiers with sharpness-aware optimizers and compare them."""


if __name__ == "__main__":
    main()
