"""Launches past the Python of Triton's launcher, which does the same at every call.

Triton's launcher makes of a kernel's arguments those of a function in C: what the compiler decided, the scratch memory,
of which our kernels need none, and for each tensor descriptor an encoded one with its sizes and strides. What that
function is given is noted once; later launches call it with other addresses. An encoded descriptor holds an address
and what does not change, and is kept by that address: PyTorch's allocator hands out the same ones again and again.
"""

import copy
import types
from collections.abc import Callable

from . import capabilities

MOST_ENCODED = 512
"""Encoded descriptors, of 128 bytes, that are kept for each argument."""
NUMBERS = (int, float, bool)


class _Mark(int):
    """A number that is told from its equals."""


def direct_launch(
    compiled, grid: tuple, arguments: list, pointers: list, descriptors: list, addresses: list[int]
) -> Callable[[int, list[int]], None] | None:
    """A function of a stream and a plan's addresses that launches `compiled`; None where Triton's launcher is needed.

    `arguments` are those of `compiled.run` after the hooks, where each `Pointer` and `Descriptor` (replay.py) has its
    place. `addresses` are those of the launch that was recorded.
    """
    run = compiled.run
    in_c = _function_in_c(run)
    if in_c is None:
        return None
    stream, arguments = _Mark(), arguments.copy()
    marks = [_Mark() for _ in pointers]
    for mark, (position, _, _) in zip(marks, pointers):
        arguments[position] = mark
    options = *grid, stream, compiled.function, compiled.packed_metadata, None, None, None

    def given(addresses: list[int]) -> list:
        """What the function in C is given; the arguments of the kernel alone where they come together."""
        filled, seen = arguments.copy(), []
        for descriptor in descriptors:
            position, source, offset = descriptor.base
            filled[position] = descriptor.at(addresses[source] + offset)
        noting = copy.copy(run)
        noting.launch = _with_launcher(run.launch, lambda *args: seen.extend(args))
        noting(*options, *filled)
        return seen

    first = given(addresses)
    together = hasattr(run, "arg_annotations")  # from triton 3.7 on
    before, kernels = (first[:-1], list(first[-1])) if together else ([], first)
    known = {id(arg) for arg in (*arguments, *options)}
    encoded = [i for i, arg in enumerate(kernels) if id(arg) not in known and type(arg) not in NUMBERS]
    places = [[i for i, arg in enumerate(kernels) if arg is mark] for mark in marks]
    at_stream = [i for i, arg in enumerate(before or kernels) if arg is stream]
    if len(encoded) != len(descriptors) or any(len(place) != 1 for place in (*places, at_stream)):
        return None
    (at_stream,) = at_stream
    places = [(place, source, offset) for (place,), (_, source, offset) in zip(places, pointers)]
    kept: list[tuple[int, int, int, dict]] = [
        (place, descriptor.base.source, descriptor.base.offset, {}) for place, descriptor in zip(encoded, descriptors)
    ]

    def encode(addresses: list[int], wanted: int) -> object:
        """The encoded descriptor at this place; all of the launch are kept."""
        found = given(addresses)
        found = found[-1] if together else found
        for place, source, offset, by_address in kept:
            if len(by_address) >= MOST_ENCODED:
                by_address.clear()
            by_address[addresses[source] + offset] = found[place]
        return found[wanted]

    def launch(stream: int, addresses: list[int]) -> None:
        args = kernels.copy()
        for place, source, offset in places:
            args[place] = addresses[source] + offset
        for place, source, offset, by_address in kept:
            args[place] = by_address.get(addresses[source] + offset) or encode(addresses, place)
        if before:
            options = before.copy()
            options[at_stream] = stream
            in_c(*options, args)
        else:
            args[at_stream] = stream
            in_c(*args)

    return launch


def _function_in_c(run: object) -> Callable | None:
    """What a launcher of Triton calls in the end, once it has found out the arguments; None for unknown launchers."""
    if not capabilities.knows("launchers") or not capabilities.is_plain_launcher(run):
        return None
    launch = run.launch
    if isinstance(launch, types.FunctionType):
        if "launcher" not in launch.__code__.co_freevars:
            return None
        launch = launch.__closure__[launch.__code__.co_freevars.index("launcher")].cell_contents
    return launch if isinstance(launch, types.BuiltinFunctionType) else None


def _with_launcher(launch: Callable, launcher: Callable) -> Callable:
    """A launcher's `launch` that calls another function in the end."""
    if not isinstance(launch, types.FunctionType):
        return launcher
    code = launch.__code__
    cells = dict(zip(code.co_freevars, launch.__closure__)) | {"launcher": types.CellType(launcher)}
    return types.FunctionType(code, launch.__globals__, closure=tuple(cells.values()))
