"""One place an operation: its Triton kernels, the function that launches them, and its registration with PyTorch."""

from . import flops  # noqa: F401
