"""Tiles of the matrix product: the kinds that were measured, and the model of time that chooses among them."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ....runtime.blocks import ceil_div, power_of_2
from ....runtime.hardware import Gpu
from ..problem import leaves_half_empty
from .form import Config

LEAST_CHANNELS = 16
"""A block of the reduction has at least so many; with fewer most of it would be zeros."""
MOST_RESIDENT_STEPS = 4
"""Up to so many steps the whole of a block of the weight is kept."""
SINGLE_PROGRAM_US = 0.7
"""What programs that have a multiprocessor to themselves wait for, once, where each has one tile at most.

One image in bfloat16, 64 to 256 channels of 56x56 3.0 us with 8 slots, 2.0 in tiles of 128 x 64 with 2; 256 to 256 3.4,
and 2.7 in the same tiles of 64 x 128 with 3 slots; 64 images, 960 to 256 of 7x7 6.2 and 5.5. Not so where half of the
last tiles is empty: 1,280 to 192 channels of 8x8 9.1 us with 8 slots, 10.4 with 3 (H200).
"""
BARRIERS = 1024
"""Bytes of shared memory, at most, that a program has besides its tiles."""


@dataclass(frozen=True, kw_only=True)
class MatmulConfig(Config):
    """A tile of BLOCK_M pixels x BLOCK_N channels, reduced BLOCK_K channels at a time; PROGRAMS on a multiprocessor.

    SLOTS tiles of x, and of the weight, in shared memory; RESIDENT: all that a program needs of the weight stays there.
    The tile has REST_N more channels, so that 160 are 128 and 32: the sides of a block are powers of 2.
    """

    form: ClassVar[str] = "matmul"

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    X_SLOTS: int
    RESIDENT: bool
    num_warps: int
    PROGRAMS: int
    REST_N: int = 0

    @property
    def notes(self) -> list[str]:
        notes = [f"{self.X_SLOTS} slots", f"{self.PROGRAMS} a multiprocessor"]
        more = [f"and {self.REST_N} channels"] if self.REST_N else []
        return more + super().notes + notes + ["weight resident"] * self.RESIDENT

    @property
    def channels(self) -> int:
        """Of a tile."""
        return self.BLOCK_N + self.REST_N


class Kind(NamedTuple):
    """A tile, and what it was measured to take: microseconds of a step of 128 bytes of channels, and of all else.

    As many of them as run on a multiprocessor at a time, together; `alone`: the part of this that one of them takes
    where the others have ended. See `microseconds`.
    """

    block_m: int
    block_n: int
    slots: int
    resident: bool
    num_warps: int
    programs: int
    step_us: float
    tile_us: float
    alone: float = 1.0
    rest_n: int = 0
    uneven: float = 1.0
    """How many times longer it takes where the last block of channels is not full."""

    def config(self, block_k: int) -> MatmulConfig:
        return MatmulConfig(
            BLOCK_M=self.block_m,
            BLOCK_N=self.block_n,
            BLOCK_K=block_k,
            X_SLOTS=self.slots,
            RESIDENT=self.resident,
            num_warps=self.num_warps,
            PROGRAMS=self.programs,
            REST_N=self.rest_n,
        )


FROM_SHARED_MEMORY = {
    2: [
        Kind(128, 64, 4, False, 4, 2, 0.41, 1.5, 0.75),
        Kind(128, 64, 4, True, 4, 2, 0.36, 1.08, 0.5),
        Kind(128, 64, 3, False, 4, 2, 0.46, 1.63, 0.65),
        Kind(128, 64, 2, False, 4, 3, 0.82, 1.53, 0.56),
        Kind(128, 256, 3, False, 8, 1, 0.67, 2.31),
        Kind(128, 256, 3, True, 8, 1, 1.0, 1.5),
        Kind(128, 128, 4, False, 8, 1, 0.45, 1.19),
        Kind(128, 128, 3, True, 8, 2, 0.88, 1.9, 0.5),
        Kind(64, 128, 3, False, 4, 2, 0.47, 1.6, 0.63),
        Kind(64, 128, 8, False, 4, 1, 0.28, 0.92),
        Kind(64, 256, 4, False, 8, 1, 0.42, 1.59),
        Kind(128, 32, 3, False, 4, 3, 0.51, 1.3, 0.56),
        Kind(128, 32, 4, True, 4, 2, 0.34, 0.83),
        Kind(64, 32, 4, False, 4, 4, 0.62, 1.3, 0.41),
        Kind(64, 32, 8, False, 4, 2, 0.48, 1.43, 0.5),
        Kind(64, 64, 3, False, 4, 3, 0.61, 2.05, 0.53, rest_n=16),
        Kind(64, 64, 3, False, 4, 3, 0.63, 2.0, 0.53, rest_n=32),
        Kind(64, 128, 6, False, 4, 1, 0.39, 1.01, rest_n=64),
    ],
    4: [
        Kind(128, 64, 3, False, 4, 2, 0.4, 1.7),
        Kind(128, 128, 4, False, 8, 1, 0.5, 1.6),
        Kind(128, 32, 3, False, 4, 2, 0.4, 1.4),
    ],
}
"""Where both operands are read from shared memory, by the bytes of an element."""
FROM_REGISTERS = [
    Kind(64, 128, 3, False, 4, 2, 0.64, 0.7),
    Kind(64, 64, 3, False, 4, 3, 0.61, 0.7),
    Kind(128, 128, 3, False, 8, 1, 0.76, 0.7),
    Kind(128, 32, 3, False, 4, 3, 0.8, 0.7),
]
"""Where x, of 16-bit numbers, is turned round or otherwise computed in registers."""
ROUNDED = [
    Kind(64, 128, 3, False, 4, 2, 0.566, 1.6, 0.59, uneven=1.33),
    Kind(64, 64, 3, False, 4, 3, 0.529, 0.86, 0.66, uneven=1.28),
    Kind(128, 128, 3, False, 8, 1, 0.523, 3.3),
    Kind(128, 64, 3, False, 4, 2, 1.048, 0.84, 0.5),
    Kind(128, 64, 6, False, 4, 1, 0.38, 1.32, uneven=1.04),
    Kind(128, 32, 4, False, 4, 2, 0.38, 1.69, uneven=1.16),
    Kind(64, 32, 4, False, 4, 3, 0.518, 1.04, 0.45, uneven=1.05),
]
"""Where x, in channels_last, is rounded to TF32 in registers.

As a model of the times of 140 layers, most of 64 images, on an H200: its choices take 1 % longer than the best of these
kinds, those of a model of 29 layers that had been slow 6 %.
"""
TURNED = [
    Kind(64, 128, 3, False, 4, 2, 0.736, 1.76, 0.7, uneven=1.16),
    Kind(64, 64, 3, False, 4, 3, 0.656, 1.54, 0.92, uneven=1.22),
    Kind(128, 128, 3, False, 8, 1, 0.712, 1.96, uneven=1.05),
    Kind(128, 64, 3, False, 4, 2, 0.879, 1.64, 0.97),
    Kind(128, 64, 6, False, 4, 1, 0.435, 0.91, uneven=1.19),
    Kind(128, 32, 4, False, 4, 2, 0.693, 1.05, 0.65, uneven=1.18),
    Kind(64, 32, 4, False, 4, 3, 0.672, 1.08, 0.33, uneven=1.04),
]
"""Where x, in NCHW, is turned round and rounded to TF32 in registers.

As a model of 138 layers: choices take 0.3 % longer than the best, those of a model of 112 4 %; in us, in brackets
those of one kind fewer, 528 to 160 channels of 14x14 28 (35), 960 to 160 45 (57), 200 to 80 7.8 (10.4).
"""
FEW_ROWS = 64
FOR_FEW_ROWS = [
    Kind(64, 32, 8, False, 4, 1, 0.36, 1.8),
    Kind(64, 32, 4, False, 4, 3, 1.08, 0.3, 0.4),
]
"""As SPLIT, for at most FEW_ROWS pixels or rows of a linear layer, where the weight is most of what is read.

On an H200, 64 rows, in brackets by TMA, us: 25,088 to 4,096 features 274 (454), 4,096 to 4,096 50 (78), 440 to 1,000
7.1 (10.4).
"""
SPLIT = [
    Kind(64, 128, 2, False, 4, 2, 1.16, 0.7),
    Kind(64, 64, 2, False, 4, 3, 1.01, 0.7),
    Kind(64, 64, 3, True, 4, 3, 0.9, 0.9),
    Kind(128, 32, 3, False, 4, 2, 1.02, 0.6),
]
"""Where x is split for strict float32.

The kinds of 16-bit numbers and these as a model of the sweep of 142 layers of 64 images, H200 (benchmarks/results): its
choices take 2 % longer than the best of 22 kinds in bfloat16, 1 % in float32. Those of 16-bit numbers fit a second
sweep, too, of 92 kinds and 107 layers, most of which were slower than PyTorch's: choices take 3 % longer than the best
there, and 10 % with the kinds and the times of the first sweep.
"""


def kinds_of(element_size: int, in_registers: bool, split: bool, turned: bool, rows: int) -> list[Kind]:
    """`in_registers`: x is `turned` round, rounded or otherwise computed there; rows: pixels of all images."""
    if split:
        return FOR_FEW_ROWS if rows <= FEW_ROWS and not turned else SPLIT
    if not in_registers:
        return FROM_SHARED_MEMORY[element_size]
    return FROM_REGISTERS if element_size == 2 else TURNED if turned else ROUNDED


def tiles_of(tile: Kind | MatmulConfig, images: int, pixels: int, k: int) -> int:
    """That cover y, of `images` of so many pixels."""
    if isinstance(tile, Kind):
        block_m, block_n = tile.block_m, tile.block_n + tile.rest_n
    else:
        block_m, block_n = tile.BLOCK_M, tile.channels
    return images * ceil_div(pixels, block_m) * ceil_div(k, block_n)


def ranked(
    kinds: list[Kind], images: int, pixels: int, c: int, k: int, element_size: int, split: bool, gpu: Gpu
) -> list[MatmulConfig]:
    """Those that a product may have, the fastest by the model first."""
    block_k = power_of_2(c, LEAST_CHANNELS, 128 // element_size)
    steps = ceil_div(c, block_k)

    def microseconds(kind: Kind) -> float:
        """As many rounds as it takes for all tiles to have run, each of so many steps and the rest.

        In the last round some multiprocessors have fewer programs, and these are faster. If there is but one round,
        programs that leave no room for another are not prepared while the kernel before them runs; times of float32,
        whose kinds were fitted to layers of a single round too, have that.
        """
        tiles = tiles_of(kind, images, pixels, k)
        rounds, last = divmod(tiles, kind.programs * gpu.multiprocessors)
        if last:
            rounds += max(ceil_div(last, gpu.multiprocessors) / kind.programs, kind.alone)
        whole = kind.rest_n == 0 and not leaves_half_empty(k)
        single = element_size == 2 and kind.programs == 1 and tiles <= gpu.multiprocessors and whole
        starts = SINGLE_PROGRAM_US if single else 0.0
        uneven = kind.uneven if c % block_k else 1.0
        return rounds * uneven * (steps * kind.step_us * block_k * element_size / 128 + kind.tile_us) + starts

    def suits(kind: Kind) -> bool:
        wide = kind.block_n >= 2 * k and kind.block_n > min(kind.block_n for kind in kinds)
        many = tiles_of(kind, images, pixels, k) >= 2 * kind.programs * gpu.multiprocessors
        stays = steps <= MOST_RESIDENT_STEPS and many
        fits = shared_memory(kind.config(block_k), element_size, steps, split) <= gpu.shared_memory
        return fits and not wide and (stays or not kind.resident)

    return [kind.config(block_k) for kind in sorted(filter(suits, kinds), key=microseconds)]


def shared_memory(config: MatmulConfig, element_size: int, steps: int, split: bool) -> int:
    """Bytes that the programs of a multiprocessor take together."""
    weights = (2 if split else 1) * (steps if config.RESIDENT else config.X_SLOTS) * config.channels
    lines = config.X_SLOTS * config.BLOCK_M + weights
    tile = config.BLOCK_M * config.channels
    return config.PROGRAMS * (element_size * (lines * config.BLOCK_K + tile) + BARRIERS)
