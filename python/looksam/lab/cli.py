"""The command ``looksam``."""

from __future__ import annotations

try:
    import click
    import matplotlib  # noqa: F401
    import PIL  # noqa: F401
    import rich  # noqa: F401
    import sklearn  # noqa: F401
except ModuleNotFoundError as error:
    raise SystemExit(f"looksam: {error.name} is not installed; run: pip install 'looksam-kernels[lab]'") from error

from .commands import COMMANDS


@click.group(context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train small image classifiers with sharpness-aware optimizers and compare them."""


for _command in COMMANDS:
    main.add_command(_command)

if __name__ == "__main__":
    main()
