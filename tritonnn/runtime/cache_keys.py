"""Has Triton know the kernels by the same keys in every process, so that each finds on disk what another compiled."""

import sys

import triton

from . import capabilities

PACKAGE = __package__.partition(".")[0]


def settle_cache_keys() -> None:
    """Asks for the keys of all functions imported so far, in an order that does not change.

    In Triton 3.6 a key depends on the functions whose keys were asked for before: https://github.com/triton-lang/triton/pull/10494.
    """
    if triton.knobs.runtime.interpret or not capabilities.knows("cache keys"):
        return
    from triton.runtime.jit import JITCallable

    for name, module in sorted(sys.modules.items()):
        if name.startswith(f"{PACKAGE}."):
            for function in vars(module).values():
                if isinstance(function, JITCallable):
                    _ = function.cache_key
