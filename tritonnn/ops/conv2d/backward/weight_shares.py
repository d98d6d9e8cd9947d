"""How the programs of a filter's gradient share the work, and the sum of what they store.

A tile of the gradient is a sum over BOXES of pixels. Programs that run at the same time take the same boxes, of which
L2 then has one copy on its way: the first FULL programs take a SHARE of boxes of one tile each, tile by tile the same
boxes. What remains of all tiles, REST boxes of each, are shares of the other programs, one tile after the other, which
see SEGMENTS tiles at most. So all finish at the same time, whatever the number of tiles. Each segment is stored apart,
and those of a tile are added up in a fixed order.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ....device.arithmetic import round_to
from ....device.dependent_launch import start_successor, wait_for_predecessor
from ....runtime.blocks import ceil_div
from ....runtime.dependent_launch import dependent_launch
from ....runtime.launch_plan import launch

LEAST_SHARE = 8
"""Boxes of a program, at least: what it stores costs as much as some boxes."""
ALIKE = 0.8
"""If at least this part of the programs would be busy, each takes boxes of one tile alone, and nothing is shared out.

On an H200, with 0.82 of them busy that takes 33.7 us, and sharing out the rest among all 35.0; with 0.73 of them 62.8
and 57.9.
"""

SUM = 2048
"""Terms that a program of the sum adds up at a time, of all its elements together, which are at least 32."""
MOST_TERMS = 64
"""Terms of one element that it adds up at a time, at most."""


class Shares(NamedTuple):
    """The constants of the work of `programs` programs, and the number of their segments that are stored."""

    SHARE: int
    FULL: int
    REST: int
    BOXES: int
    SEGMENTS: int
    programs: int

    @property
    def stored(self) -> int:
        return self.FULL + (self.programs - self.FULL) * self.SEGMENTS

    @property
    def work(self) -> tuple[int, int, int, int]:
        """SHARE, FULL, REST and BOXES, as the kernels take them."""
        return self[:4]

    def partial_sums(self, tile: tuple[int, int, int], device: torch.device) -> torch.Tensor:
        """[stored, *tile]: a place for the sum of each segment."""
        return torch.empty(self.stored, *tile, dtype=torch.float32, device=device)


def are_alike(tiles: int, programs: int) -> bool:
    """Whether these programs take one tile each, of one size, and few are idle."""
    return programs // tiles * tiles >= ALIKE * programs


def shares_of(boxes: int, tiles: int, programs: int) -> Shares:
    """How so many programs, all that run at the same time, or fewer of them, share the work."""
    splits = programs // tiles
    if are_alike(tiles, programs) or splits * LEAST_SHARE >= boxes:
        share = max(ceil_div(boxes, splits), min(LEAST_SHARE, boxes))
        splits = ceil_div(boxes, share)
        return Shares(share, splits * tiles, 1, boxes, 1, splits * tiles)
    share = min(max(ceil_div(boxes * tiles, programs), LEAST_SHARE), boxes)
    splits = min(splits, boxes // share)
    rest = boxes - splits * share
    full = splits * tiles
    if rest == 0:
        return Shares(share, full, 1, boxes, 1, full)
    return Shares(share, full, rest, boxes, ceil_div(share - 1, rest) + 1, full + ceil_div(rest * tiles, share))


@triton.jit
def segment_of(pid, segment, first, SHARE, FULL, REST, BOXES, TILES: tl.constexpr, SEGMENTS: tl.constexpr):
    """(tile, first box, end, where it is stored, `first` of the next segment) of a program's segment; it may be empty.

    What remains of all tiles is one row of boxes, tile after tile. `first` is the box of that row at which the segment
    begins: for a program's first segment (pid - FULL) * SHARE.
    """
    if pid < FULL:
        tile = pid % TILES
        begin = pid // TILES * SHARE
        end = tl.where(segment == 0, tl.minimum(begin + SHARE, BOXES), begin)
        place = pid
    else:
        last = tl.minimum((pid - FULL + 1) * SHARE, TILES * REST)
        tile = tl.minimum(first // REST, TILES - 1)
        begin = BOXES - REST + first - tile * REST
        first = tl.minimum((tile + 1) * REST, last)
        end = BOXES - REST + first - tile * REST
        place = FULL + (pid - FULL) * SEGMENTS + segment
    return tile, begin, end, place, first


@triton.jit
def conv2d_backward_weight_sum_kernel(
    partial_ptr,
    y_ptr,
    SHARE,
    FULL,
    REST,
    SEGMENTS,
    TERMS,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    TAPS: tl.constexpr,
    TILE_STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK elements of a tile of y [K, C, R, S]; partial is [places, TAPS, BLOCK_M, BLOCK_N].

    A tile has TERMS segments, or one or two fewer. First taps of tiles are TILE_STEP apart, those of a tile TAP_STEP.
    """
    BLOCKS: tl.constexpr = TAPS * BLOCK_M * BLOCK_N // BLOCK
    BLOCKS_M: tl.constexpr = K // BLOCK_M
    BLOCKS_N: tl.constexpr = C // BLOCK_N
    pid = tl.program_id(0)
    tile = pid // BLOCKS
    offs = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    splits = FULL // TILES
    wait_for_predecessor(DEPENDENT)
    y = tl.full((BLOCK,), 0, tl.float32)
    for start in range(0, TERMS, BLOCK_TERMS):
        term = start + tl.arange(0, BLOCK_TERMS)  # [BLOCK_TERMS]
        program = tile * REST // SHARE + term - splits  # of those that share what remains
        place = tl.where(term < splits, term * TILES + tile, FULL + program * SEGMENTS + tile - program * SHARE // REST)
        mask = (term < splits) | ((term < TERMS) & (program * SHARE < (tile + 1) * REST))
        partial_ptrs = partial_ptr + place.to(tl.int64)[:, None] * (TAPS * BLOCK_M * BLOCK_N) + offs[None, :]
        y += tl.sum(tl.load(partial_ptrs, mask=mask[:, None] & (offs >= 0)[None, :], other=0.0), 0)
    start_successor(DEPENDENT)
    k = tile % BLOCKS_M * BLOCK_M + offs // BLOCK_N % BLOCK_M
    c = tile // BLOCKS_M % BLOCKS_N * BLOCK_N + offs % BLOCK_N
    tap = tile // (BLOCKS_M * BLOCKS_N) * TILE_STEP + offs // (BLOCK_M * BLOCK_N) * TAP_STEP
    offs_y = k.to(tl.int64) * stride_k + c.to(tl.int64) * stride_c + tap // S * stride_r + tap % S * stride_s
    tl.store(y_ptr + offs_y, round_to(y, y_ptr.dtype.element_ty))


def add_up(
    partial: torch.Tensor, grad_weight: torch.Tensor, shares: Shares, tile: tuple[int, int, int], taps: tuple[int, int]
) -> None:
    """grad_weight [K, C, R, S], any strides, from partial [shares.stored, *tile]; taps: TILE_STEP, TAP_STEP."""
    K, C, _, S = grad_weight.shape
    size = math.prod(tile)
    tiles = grad_weight.numel() // size
    terms = shares.FULL // tiles
    if shares.programs > shares.FULL:
        terms += ceil_div(shares.REST, shares.SHARE) + 1
    block_terms = min(triton.next_power_of_2(terms), MOST_TERMS)
    block = size & -size if triton.knobs.runtime.interpret else max(SUM // block_terms, 32)
    launch(
        conv2d_backward_weight_sum_kernel,
        (tiles * size // block,),
        partial,
        grad_weight,
        shares.SHARE,
        shares.FULL,
        shares.REST,
        shares.SEGMENTS,
        terms,
        *grad_weight.stride(),
        C,
        K,
        S,
        TAPS=tile[0],
        TILE_STEP=taps[0],
        TAP_STEP=taps[1],
        BLOCK_M=tile[1],
        BLOCK_N=tile[2],
        TILES=tiles,
        **dependent_launch(partial),
        BLOCK_TERMS=block_terms,
        BLOCK=block,
    )
