"""Semaphores: counters by which the programs that share a tile find out which of them finishes last.

A kernel finds its semaphores zero and leaves them zero. Kernels on one stream follow each other and share theirs. A
CUDA graph may run on any stream, beside other graphs, so each of its kernels has semaphores of its own.
"""

import threading

import torch

from .blocks import ceil_div

PER_STREAM = 2**12
"""Semaphores of one stream: an upper bound on the tiles of a kernel that splits them."""
RESERVE = 2**18
"""Semaphores of a device for kernels in graphs, each given out once: enough for some hundred graphs of a ResNet18."""
LINE = 32
"""Semaphores in one cache line of 128 bytes."""

_lock = threading.Lock()
_of_streams: dict[tuple[int, int], torch.Tensor] = {}
_reserves: dict[int, tuple[torch.Tensor, int]] = {}


def semaphores(device: torch.device, tiles: int) -> torch.Tensor:
    """Semaphores [tiles or more], int32, zero, for the kernel that is launched next on the current stream of `device`.

    Raises:
        ValueError: more tiles than there are semaphores.
    """
    if tiles > PER_STREAM:
        raise ValueError(f"{tiles} tiles are split among programs, but there are semaphores for {PER_STREAM} only")
    if device.type != "cuda":
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _reserved(device, tiles)
    stream = torch.cuda.current_stream(device)
    key = device.index, stream.cuda_stream
    counters = _of_streams.get(key)
    if counters is None:
        with _lock:
            if device.index not in _reserves:
                _reserves[device.index] = _zeros_for_good(RESERVE, device), 0
            counters = _of_streams[key] = _zeros_for_good(PER_STREAM, device)
    return counters


def _zeros_for_good(size: int, device: torch.device) -> torch.Tensor:
    """Made by a thread of its own, as this one's memory may come from the pool of CUDA graphs that are being warmed up.

    Such a pool, that of torch.compile's mode "reduce-overhead" for instance, is to have nothing that outlives a call.
    """
    made = []

    def make() -> None:
        with torch.cuda.device(device):
            made.append(torch.zeros(size, dtype=torch.int32, device=device))
            torch.cuda.current_stream().synchronize()  # other streams will use it

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def _reserved(device: torch.device, tiles: int) -> torch.Tensor:
    """Semaphores for one kernel of a CUDA graph.

    If none are left in reserve, or no reserve was made before the capture, the graph allocates some and clears them at
    each replay.
    """
    with _lock:
        reserve, used = _reserves.get(device.index, (None, RESERVE))
        if used + tiles > RESERVE:
            return torch.zeros(tiles, dtype=torch.int32, device=device)
        _reserves[device.index] = reserve, used + ceil_div(tiles, LINE) * LINE
    return reserve[used : used + tiles]
