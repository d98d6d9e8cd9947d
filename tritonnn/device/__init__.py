"""Functions that kernels of several operations share."""
