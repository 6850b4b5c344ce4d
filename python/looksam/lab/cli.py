"""The command ``looksam``."""

from __future__ import annotations

from . import requirements  # noqa: F401  # isort: skip - before all that imports them
import click

from .commands import COMMANDS


@click.group(context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train small image classifiers with sharpness-aware optimizers and compare them."""


for _command in COMMANDS:
    main.add_command(_command)

if __name__ == "__main__":
    main()
