"""One module per experiment: what runs, what is measured, which figures show it. Each offers its ``DESIGN`` and ``command``."""
