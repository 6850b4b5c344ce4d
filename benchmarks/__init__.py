"""Speed of the ops and of whole steps, beside a copy on the same memory and beside other packages.

===================================================  ====================================================================
``make bench``                                       all lists and cases; writes ``benchmarks/results/<cpu>-<date>.json``
                                                     and the table made from it
``make bench-check``                                 ratios of now against the committed ones of this kind of machine
``python -m benchmarks.communication``               what a step sends, and the figure of its time over the number of GPUs
``python -m benchmarks.epoch``                       time of an epoch by optimizer, passes included; ten minutes
``python -m benchmarks.memory``                      bytes that every variant and its peers allocate
``python -m benchmarks.pages``                       tables and figures of the documentation, from the results
``python -m benchmarks --quick``                     a short run of half a minute; ``--help`` has the choices
``python -m benchmarks --shapes vit-b --only SAM``   one list, some cases
``python -m benchmarks --device cuda``               on a GPU, with launches, synchronisations and host time
``python -m benchmarks.host``                        host time of a step over many tiny tensors, and the Python calls of one
``pytest benchmarks/ -k LookSAM --shapes vit-s``     the same cases through pytest-benchmark
``python -m benchmarks.report FILE.json``            the table of a result as markdown
===================================================  ====================================================================

``shapes`` has the parameter lists, ``cases`` what is measured and the bytes it must move, ``peers`` the others,
``timing`` the clocks, ``targets`` the goals. A busy machine flatters whoever starts few parallel regions, which is us: look
at the share of the CPU that other processes took, which every result states.
"""
