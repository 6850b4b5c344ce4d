"""One module per command of ``looksam``; each offers its click command under the name ``command``."""

from . import compare, info, report, train

COMMANDS = (train.command, compare.command, report.command, info.command)
