"""One module per command of ``looksam``; each offers its click command under the name ``command``."""
