"""Speed of the ops and of whole steps, against a copy of the same bytes and against other packages.

``shapes`` the parameter lists, ``cases`` what is measured and the bytes it must move, ``peers`` the others, ``timing`` the
clocks, ``run`` the command (``python -m benchmarks``), ``targets`` the goals, ``report`` tables from a result file.
"""
