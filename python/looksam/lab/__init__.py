"""The laboratory: trains small models with every optimizer of looksam and reports what was measured.

Start it with the command ``looksam`` (``pip install 'looksam-kernels[lab]'``). Nothing in ``looksam`` itself imports this package.
"""
