"""Tiles of the form "tma": boxes of an output, how many programs share one, and what is taken without a measurement."""

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ....runtime.blocks import ceil_div, power_of_2
from ....runtime.hardware import Gpu
from ..problem import leaves_half_empty
from .form import Config

NEIGHBOURS, MOST_COVERED = 8, 1.15
"""Pixels of an image in a box of TF32, at least, if what it covers is no larger than so many times the output."""
FEW_ROWS = 64
"""Rows of a linear layer, or pixels, of which tiles of 16 make more programs than tiles of 64."""
PAIRED = 128, 4, 3
"""BLOCK_N, warps and stages with which two programs fit a multiprocessor: a single one would wait for its loads.

On an H100, 128 images, a program a multiprocessor: bfloat16, 128 to 256 channels, stride 2, 12.7 us, with a fourth
stage 9.8; strict float32, 512 channels, 145, with half as many columns and a fourth stage 102.
"""

LEAST_STEPS, MOST_SPLITS = 10, 6
"""Blocks of the reduction that a part has at least where it is split by default, and parts at most.

So many blocks take longer than to leave a part; many parts are added one after the other. Tuning takes parts of a
quarter of these blocks.
"""


@dataclass(frozen=True, kw_only=True)
class TmaConfig(Config):
    """A tile of TILE_N images x TILE_P rows x TILE_Q columns x BLOCK_N channels, reduced BLOCK_K channels at a time.

    SWAP_AB: the weight is the first operand of the product and x the second. SPLITS programs share a tile, any number
    that is no larger than that of blocks.
    """

    form: ClassVar[str] = "tma"
    shown: ClassVar[tuple[str, ...]] = ("TILE", "BLOCK")

    TILE_N: int
    TILE_P: int
    TILE_Q: int
    BLOCK_N: int
    BLOCK_K: int
    SWAP_AB: bool
    num_warps: int
    num_stages: int
    SPLITS: int = 1

    @property
    def pixels(self) -> int:
        """BLOCK_M of the matrix product."""
        return self.TILE_N * self.TILE_P * self.TILE_Q

    @property
    def notes(self) -> list[str]:
        splits = [f"{self.SPLITS} splits"] * (self.SPLITS > 1)
        return super().notes + ["operands swapped"] * self.SWAP_AB + splits


def block_k_of(c: int, element_size: int) -> int:
    """Channels of a block: a line of 128 bytes, or fewer where there are fewer."""
    return power_of_2(c, 16, 128 // element_size)


@functools.lru_cache
def best_box(n: int, p: int, q: int, pixels: int, neighbours: int = 1) -> tuple[int, int, int]:
    """The box of `pixels` (images, rows, columns), powers of 2, that wastes least of an output of n images of p x q.

    It has at least `neighbours` of an image.
    """

    def waste(box: tuple[int, int, int]) -> tuple[int, int, int]:
        covered = math.prod(ceil_div(size, tile) * tile for size, tile in zip((n, p, q), box))
        return covered, -box[2], -box[1]

    powers = [1 << i for i in range(pixels.bit_length())]
    return min(((pixels // a // b, a, b) for a in powers for b in powers if neighbours <= a * b <= pixels), key=waste)


def with_neighbours(config: TmaConfig, n: int, p: int, q: int, k: int, element_size: int, gpu: Gpu) -> TmaConfig:
    """With a box of 8 pixels of an image in place of one of a single pixel of each, if it wastes little.

    In TF32 under several taps and stride 1: 3x3, 192 to 384 channels of 7x7 26 us with boxes of 16x1x8, 46 with 64x1x1,
    160 to 320 23 and 47, 16 to 64 of 55x55 91 and 239 (H200, 64 images). Not where x is rounded in registers: 64 to 96
    of 35x35 85 us for 76. The first has 128 pixels for 64, 75 programs
    for 132 multiprocessors.
    """
    if config.TILE_P * config.TILE_Q > 1 or not config.SWAP_AB:
        return config
    pixels = config.TILE_N
    if (pixels, config.BLOCK_N) == (64, 128) and config.SWAP_AB:
        programs = ceil_div(n * p * q, 128) * ceil_div(k, 128)
        fits = shared_memory(128, 128, config.BLOCK_K, config.num_stages, element_size, False) <= gpu.shared_memory
        pixels = 128 if fits and 2 * programs >= gpu.multiprocessors else 64
    box = best_box(n, p, q, pixels, NEIGHBOURS)
    covered = math.prod(ceil_div(size, tile) * tile for size, tile in zip((n, p, q), box))
    if covered > MOST_COVERED * n * p * q:
        return config
    return replace(config, TILE_N=box[0], TILE_P=box[1], TILE_Q=box[2])


def config_of(
    box: tuple[int, int, int],
    block_n: int,
    block_k: int,
    swap_ab: bool,
    num_warps: int,
    num_stages: int,
    splits: int = 1,
) -> TmaConfig:
    tile_n, tile_p, tile_q = box
    return TmaConfig(
        TILE_N=tile_n,
        TILE_P=tile_p,
        TILE_Q=tile_q,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SWAP_AB=swap_ab,
        num_warps=num_warps,
        num_stages=num_stages,
        SPLITS=splits,
    )


def tiles_of(config: TmaConfig, n: int, p: int, q: int, k: int) -> int:
    """Tiles that cover y [n, p, q, k]."""
    boxes = ceil_div(n, config.TILE_N) * ceil_div(p, config.TILE_P) * ceil_div(q, config.TILE_Q)
    return boxes * ceil_div(k, config.BLOCK_N)


def shared_memory(block_m: int, block_n: int, block_k: int, num_stages: int, element_size: int, split: bool) -> int:
    """Bytes of a program: the stages of x and of the weight, or of both its parts; after them y takes their place."""
    rows = block_m + (2 * block_n if split else block_n)
    return element_size * max(num_stages * rows * block_k, block_m * block_n)


def default_config(
    n: int,
    p: int,
    q: int,
    c: int,
    k: int,
    taps: int,
    element_size: int,
    swap_ab: bool,
    split: bool,
    gpu: Gpu,
) -> TmaConfig | None:
    """For y [n, p, q, k] as sums over c channels under each of `taps`, of products `split` into three or not.

    None where no tile fits the GPU's shared memory.

    Measured on an H200, and on an H100, over ResNet18's convolutions, 128 and 1,024 images (benchmarks/results), and on
    an H200, 64 images in bfloat16, in blocks of 64 channels, us, in brackets of 128: 1x7, 160 to 160 of 17x17 28.9
    (41.9), 7x1, 192 to 192 23.0 (30.5), 3x3, 160 to 320 of 14x14 28.4 (40.2).
    """
    half, enough, reduction, block_k = element_size == 2, gpu.enough_programs, taps * c, block_k_of(c, element_size)
    if not swap_ab:
        tiles = [(64, 64, 4, 3)] if k <= 64 else [(64, 128, 4, 3), (64, 64, 4, 4)]
    elif k <= 64 or reduction * element_size < 128:  # memory bounds it: as many pixels as fit
        tiles = [(256, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 4)] if half else [(128, 64, 4, 4), (64, 64, 4, 4)]
    elif half and taps > 1 and leaves_half_empty(k):
        tiles = [(256, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 4)]
    elif half and reduction <= 1152:
        tiles = [(128, 128, 4, 3), (128, 128, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4)]
    else:
        tiles = [(256, 128, 8, 3 if half else 4), (128, 128, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4)]
    if c % block_k != 0:  # with four warps
        tiles = [tile for tile in tiles if tile[2] == 4]
        enough = 2 * gpu.multiprocessors // 3 if taps == 1 else enough
    tiles = [t for t in tiles if shared_memory(*t[:2], block_k, t[3], element_size, split) <= gpu.shared_memory]
    if not tiles:
        return None
    # The largest tiles that keep most multiprocessors busy, those of pairs all of them.
    for block_m, block_n, num_warps, num_stages in tiles:
        least = gpu.multiprocessors + 1 if (block_n, num_warps, num_stages) == PAIRED else enough
        config = config_of(best_box(n, p, q, block_m), block_n, block_k, swap_ab, num_warps, num_stages)
        programs = tiles_of(config, n, p, q, k)
        splits = default_splits(programs, taps * ceil_div(c, block_k), n * p * q, gpu)
        if programs >= least:
            return config
        if half and (block_m, block_n) == (64, 128) and splits == 2 and 2 * programs >= enough:
            break
    return replace(config, SPLITS=splits)


def default_splits(tiles: int, steps: int, pixels: int, gpu: Gpu) -> int:
    """How many programs share a tile: as many as make one for each multiprocessor, or, of few pixels, one and a half.

    One image in bfloat16 (H200), us, in brackets unsplit: 3x3, 512 channels of 14x14 8.7 with 4 (14.8), 1,024 of 7x7
    9.9 with 6 (27), 256 of 28x28 7.4 with 2 (8.6), with 3 8.0; 512 of 28x28 in tiles of 64 x 128 12.8 with 2, in tiles
    of 64 x 64, which suffice for all multiprocessors, 17.5. 64 rows of a linear layer: 4,096 to 1,000 features 6.7 with
    6 (13.0), to 4,096 11.8 with 3, 13.0 with 2. TF32, 256 channels of 28x28 13.2 with 2 (17.7).
    """
    programs = gpu.multiprocessors * (3 if pixels <= FEW_ROWS else 2) // 2
    return max(min(MOST_SPLITS, programs // tiles, steps // LEAST_STEPS), 1)
