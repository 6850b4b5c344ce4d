"""One module per command of ``looksam`` that is no experiment; each offers its click command under the name ``command``."""
