"""Compiles the native backend for the torch that is installed: ``python -m looksam_kernels build``."""

from looksam_kernels.build.builder import BuildError, build

__all__ = ["BuildError", "build"]
