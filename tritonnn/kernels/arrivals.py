"""Counters by which the programs that share a tile find out which of them ends last.

A kernel finds its counters zero and leaves them so. Kernels on one stream follow each other and share theirs. A CUDA
graph may run on any stream, beside others: each of its kernels has counters of its own.
"""

import threading

import torch

from .block_sizes import ceil_div

COUNTERS = 2**12
"""Of a stream: more than a kernel has tiles."""
RESERVE = 2**18
"""Counters of a device for kernels in graphs, never given twice: some hundred graphs of a ResNet18."""
LINE = 32
"""Counters in 128 bytes."""

_lock = threading.Lock()
_of_streams: dict[tuple[int, int], torch.Tensor] = {}
_reserves: dict[int, tuple[torch.Tensor, int]] = {}


def arrivals(device: torch.device, tiles: int) -> torch.Tensor:
    """Counters [tiles or more], int32, zero, for a kernel that is launched next, on the current stream of `device`."""
    if tiles > COUNTERS:
        raise ValueError(f"{tiles} tiles of several programs: there are counters for {COUNTERS}")
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
                _reserves[device.index] = torch.zeros(RESERVE, dtype=torch.int32, device=device), 0
            counters = _of_streams[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return counters


def _reserved(device: torch.device, tiles: int) -> torch.Tensor:
    """Some that no other kernel has; where none are left, or nothing was warmed up, the graph clears its own."""
    with _lock:
        reserve, used = _reserves.get(device.index, (None, RESERVE))
        if used + tiles > RESERVE:
            return torch.zeros(tiles, dtype=torch.int32, device=device)
        _reserves[device.index] = reserve, used + ceil_div(tiles, LINE) * LINE
    return reserve[used : used + tiles]
