"""``python -m looksam``: the command ``looksam``."""

from looksam.lab.cli import main

if __name__ == "__main__":
    main(prog_name="looksam")
