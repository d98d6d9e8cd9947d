"""Configurations of the form with a halo: the measured defaults, and what tuning tries."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from .....runtime.blocks import ceil_div
from .....runtime.hardware import Gpu
from ...problem import leaves_half_empty
from ..form import Config


@dataclass(frozen=True, kw_only=True)
class TmaHaloConfig(Config):
    """A tile of TILE_N images x TILE_P rows x TILE_Q columns x BLOCK_N channels, reduced BLOCK_K channels at a time.

    X_SLOTS boxes of x and W_SLOTS tiles of the weight in shared memory; y is STAGED there (IN_SLOT: in a box of x) or
    stored from registers; PROGRAMS run on a multiprocessor.
    """

    form: ClassVar[str] = "tma_halo"

    TILE_N: int
    TILE_P: int
    TILE_Q: int
    BLOCK_N: int
    BLOCK_K: int
    X_SLOTS: int
    W_SLOTS: int
    STAGED: bool
    IN_SLOT: bool
    num_warps: int
    PROGRAMS: int

    @property
    def notes(self) -> list[str]:
        notes = [f"{self.X_SLOTS} + {self.W_SLOTS} slots", f"{self.PROGRAMS} a multiprocessor"]
        return super().notes + notes + ["staged in a slot" if self.IN_SLOT else "staged"] * self.STAGED

    @property
    def rounds_ahead(self) -> bool:
        """Whether x is rounded a box earlier than it has to be; the box after that arrives meanwhile, in a third slot.

        Measured on an H200, 1,024 images: 128 channels at 16x16 211 us for 227, 256 at 8x8 198 for 221; 256 channels at
        a time 234 for 211, as rounding then competes with more products.
        """
        return self.X_SLOTS > 2 and self.TILE_P > 1 and self.BLOCK_N <= 128

    @property
    def pixels(self) -> int:
        return self.TILE_N * self.TILE_P * self.TILE_Q

    def tiles(self, n: int, p: int, q: int) -> int:
        """Boxes of pixels that cover n images of p x q."""
        return math.prod(ceil_div(a, b) for a, b in zip((n, p, q), (self.TILE_N, self.TILE_P, self.TILE_Q)))


def tile(
    pixels: tuple[int, int, int],
    block_n: int,
    element_size: int,
    *,
    slots: tuple[int, int],
    store: Literal["registers", "stage", "slot"],
    num_warps: int,
    programs: int,
) -> TmaHaloConfig:
    """Of (images, rows, columns) of pixels x block_n channels, with lines of 128 bytes of x's channels.

    slots: of x and of the weight; store: from where y is stored, registers, shared memory of its own, or a slot of x.
    """
    tile_n, tile_p, tile_q = pixels
    return TmaHaloConfig(
        TILE_N=tile_n,
        TILE_P=tile_p,
        TILE_Q=tile_q,
        BLOCK_N=block_n,
        BLOCK_K=128 // element_size,
        X_SLOTS=slots[0],
        W_SLOTS=slots[1],
        STAGED=store != "registers",
        IN_SLOT=store == "slot",
        num_warps=num_warps,
        PROGRAMS=programs,
    )


class Default(NamedTuple):
    """3x3 convolutions to images of one size, of as many channels as those before times the stride.

    The configuration for 16-bit numbers, for TF32 and for TF32 that is rounded on the way, each with the number of
    tiles from which on it is taken; None where another form is faster.
    """

    half: tuple[TmaHaloConfig, int] | None = None
    tf32: tuple[TmaHaloConfig, int] | None = None
    rounded: tuple[TmaHaloConfig, int] | None = None


_HALF_64 = tile((1, 8, 32), 64, 2, slots=(2, 4), store="slot", num_warps=4, programs=2)
_TF32_64 = tile((1, 8, 32), 64, 4, slots=(2, 4), store="registers", num_warps=4, programs=2)
_HALF_128 = tile((1, 16, 16), 128, 2, slots=(3, 3), store="stage", num_warps=8, programs=1)
_TF32_128 = tile((1, 16, 16), 128, 4, slots=(3, 6), store="registers", num_warps=8, programs=1)
_HALF_8 = tile((4, 8, 8), 128, 2, slots=(2, 5), store="stage", num_warps=8, programs=1)
_TF32_8 = tile((4, 8, 8), 128, 4, slots=(3, 6), store="registers", num_warps=8, programs=1)
_HALF_4 = tile((16, 4, 4), 128, 2, slots=(2, 4), store="stage", num_warps=8, programs=1)
_HALF_BY_2 = tile((1, 8, 16), 128, 2, slots=(3, 7), store="slot", num_warps=8, programs=1)
_TF32_BY_2 = tile((1, 8, 16), 128, 4, slots=(3, 7), store="registers", num_warps=8, programs=1)
_TF32_28_BY_2 = tile((1, 4, 32), 128, 4, slots=(3, 7), store="registers", num_warps=8, programs=1)
_HALF_8_BY_2 = tile((2, 8, 8), 128, 2, slots=(3, 7), store="slot", num_warps=8, programs=1)
_TF32_8_BY_2 = tile((2, 8, 8), 128, 4, slots=(3, 7), store="registers", num_warps=8, programs=1)
_ROUNDED_8_BY_2 = tile((2, 8, 8), 256, 4, slots=(2, 4), store="registers", num_warps=8, programs=1)
_HALF_4_BY_2 = tile((16, 4, 4), 128, 2, slots=(2, 5), store="slot", num_warps=8, programs=1)
_TF32_4_BY_2 = tile((16, 4, 4), 128, 4, slots=(2, 5), store="registers", num_warps=8, programs=1)
_ROUNDED_4_BY_2 = tile((8, 4, 4), 256, 4, slots=(2, 4), store="registers", num_warps=8, programs=1)
DEFAULTS = {
    (64, 32, 1): Default((_HALF_64, 512), (_TF32_64, 512), (_TF32_64, 512)),
    (64, 56, 1): Default((_HALF_64, 512), (_TF32_64, 512), (_TF32_64, 512)),
    (128, 16, 1): Default((_HALF_128, 512), (_TF32_128, 128), (_TF32_128, 128)),
    (128, 28, 1): Default(None, None, (_TF32_128, 512)),
    (256, 8, 1): Default((_HALF_8, 512), (_TF32_8, 512), (_TF32_8, 512)),
    (512, 4, 1): Default((_HALF_4, 256), None, None),
    (64, 16, 2): Default((_HALF_BY_2, 512), (_TF32_BY_2, 512), (_TF32_BY_2, 256)),
    (64, 28, 2): Default((_HALF_BY_2, 512), (_TF32_28_BY_2, 512), (_TF32_28_BY_2, 512)),
    (128, 8, 2): Default((_HALF_8_BY_2, 512), (_TF32_8_BY_2, 512), (_ROUNDED_8_BY_2, 256)),
    (128, 14, 2): Default(None, (_TF32_BY_2, 512), None),
    (256, 4, 2): Default((_HALF_4_BY_2, 256), (_TF32_4_BY_2, 256), (_ROUNDED_4_BY_2, 256)),
    (256, 7, 2): Default(None, None, (_ROUNDED_8_BY_2, 128)),
}
"""By channels, side of y and stride. Measured, 1,024 images, or 128 where it says so; us, in brackets the next form.

Stride 1 on an H200 (benchmarks/results): 64 at 32x32 in bfloat16 114 (193), TF32 that is rounded on the way 278 (445);
64 at 56x56, 128 images, 51 (79), TF32 100 (145), rounded 126 (172); 128 at 16x16 104 (119), rounded 211 (294), of 128
images 31 (40); 128 at 28x28, 128 images, rounded 109 (117); 256 at 8x8 97 (106), TF32 185 (195), rounded 198 (229); 512
at 4x4 95 (99).

Stride 2 on an H100: 64 to 16x16 in bfloat16 78 (92), TF32 150 (179), rounded 176 (214), of 128 images 29 (34); 64 to
28x28, 128 images, 37 (40), TF32 65 (80), rounded 80 (84); 128 to 8x8 59 (69), TF32 109 (131), rounded 126 (185); 128 to
14x14, 128 images, TF32 56 (61); 256 to 4x4 53 (56), TF32 96 (107), rounded 117 (153); 256 to 7x7, 128 images, rounded
61 (70).
"""


def default_config(
    n: int, p: int, q: int, c: int, k: int, stride: int, element_size: int, round_x: bool, gpu: Gpu
) -> TmaHaloConfig | None:
    """For a 3x3 convolution to n images of p x q pixels, c to k channels; None where it is not known to be the fastest.

    `round_x`: to TF32, on the way.
    """
    default = DEFAULTS.get((c, p, stride)) if k == c * stride and p == q else None
    if default is None:
        return config_by_rule(n, p, q, c, k, stride, element_size, gpu)
    found = default.half if element_size == 2 else default.rounded if round_x else default.tf32
    if not found:
        return None
    config, least = found
    return config if config.tiles(n, p, q) * (k // config.BLOCK_N) >= least else None


def config_by_rule(
    n: int, p: int, q: int, c: int, k: int, stride: int, element_size: int, gpu: Gpu
) -> TmaHaloConfig | None:
    """The tile that keeps the tensor cores busiest, if they are busy enough.

    Measured on an H200, 64 images in bfloat16, us, in brackets the next form: up to 64 channels of y, 128 to 32 at
    56x56 54 (86), at 28x28 15 (26), at 14x14 7.2 (11); more, of tiles of 128 channels of which 74 % are used, 256 at
    14x14 25.4 (27.0), 128 at 28x28 27.6 (28.2), stride 2, 128 to 28x28 30.6 (32.4), 256 to 14x14 26.1 (27.2). Blocks of
    64 channels also where half of the last one of 128 would be empty: to 192, 64 at 56x56 82 (131), 128 at 28x28 39
    (65), 80 at 71x71 221 (449). Not where both channels are few, which the form "pointers" does not fill up with zeros:
    32 to 32 at 147x147 165 and more (138).

    In TF32, too, blocks of 64 channels where half of the last one of 128 would be empty, if most of the tiles lies
    inside: 48 to 192 at 56x56 185 (240), but 160 to 320 at 14x14 72 (65), 80 to 192 at 71x71 643 (596).
    """
    few = element_size == 2 and max(c, k) <= 32
    if c * element_size < 64 or few or _fits_boxes_of_4(n, p, q, c, k, stride, element_size):
        return None
    in_64 = k <= 64 or (element_size == 2 and leaves_half_empty(k))
    block_n, most = (64, 0.5) if in_64 else (128, LEAST_INSIDE)
    if element_size == 4 and k > 64 and stride == 1 and leaves_half_empty(k):
        block_n, most = 64, LEAST_INSIDE_64

    def covered(config: TmaHaloConfig) -> int:
        return config.tiles(n, p, q) * config.pixels

    def busy(config: TmaHaloConfig) -> float:
        """The part of the time of all multiprocessors in which there is a pixel and a channel to compute.

        Tiles of 512 pixels, which have the GPU to themselves, read more of a long reduction's weight at a time: 128
        channels to 32 at 56x56 54 us for 61, 64 channels to 64 32 us for 29.
        """
        rounds = ceil_div(config.tiles(n, p, q) * ceil_div(k, block_n), config.PROGRAMS * gpu.multiprocessors)
        slots = rounds * config.PROGRAMS * gpu.multiprocessors
        filled = ceil_div(k, block_n) * block_n if element_size == 2 else max(k, 64)  # as other forms do
        used = n * p * q * filled / (slots * config.pixels * block_n)
        return used * (1.15 if c * element_size > 128 else 0.9) if config.pixels > 256 else used

    fitting = [
        config
        for config in CANDIDATES[element_size, stride]
        if config.BLOCK_N == block_n
        and (config.TILE_N == 1 or (p <= config.TILE_P and q <= config.TILE_Q))
        and config.PROGRAMS == (2 if block_n == 64 and config.num_warps == 4 else 1)
        and (config.pixels >= 256 or block_n == 64 or element_size == 4)
        and most * covered(config) <= n * p * q
    ]
    best = max(fitting, key=lambda config: (round(busy(config), 3), -covered(config)), default=None)
    return best if best and busy(best) >= (LEAST_BUSY_64 if block_n == 64 else LEAST_BUSY_128) else None


def _fits_boxes_of_4(n: int, p: int, q: int, c: int, k: int, stride: int, element_size: int) -> bool:
    """Whether TMA's boxes of 4 x 4 pixels of several images waste nothing, of images in which a tile here wastes a lot.

    Measured on an H200, 64 images in bfloat16, us, in brackets with a halo: at 28x28, 64 to 256 channels 25.4 (29.2),
    256 to 256 83.5 (93.6), with stride 2 87.1 (98.9).
    """
    if element_size != 2 or leaves_half_empty(k) or (stride == 2 and c < 256):
        return False
    wide = min(ceil_div(p, rows) * ceil_div(q, 256 // rows) for rows in (8, 16)) * 256
    return p % 4 == q % 4 == 0 and n % 16 == 0 and p * q < 0.8 * wide and min(p, q) > 16


def grouped_config(p: int, q: int, stride: int, element_size: int) -> TmaHaloConfig:
    """For several groups. Where all of the weight stays in shared memory, it is loaded once.

    Measured on an H200, 64 images in bfloat16, us, in brackets by pointers and cuDNN's on an H100: 4 channels a group,
    128 of 56x56 52 (398, 94); 8, 256 of 28x28 32 (108, 56), stride 2 45 (144, 56); 32, 1,024 of 7x7 12 (33, 18).
    """
    several = p <= 8 and q <= 8
    pixels = (2, 8, 8) if several else (1, 8, 16)
    if element_size == 4:
        return tile(pixels, 64, 4, slots=(2, 4), store="registers", num_warps=4, programs=2)
    if stride == 1:
        return tile(pixels, 64, 2, slots=(2, 9), store="slot", num_warps=4, programs=2)
    slots, programs = ((2, 4), 2) if several else ((3, 9), 1)
    return tile(pixels, 64, 2, slots=slots, store="slot", num_warps=4, programs=programs)


LEAST_BUSY_64, LEAST_BUSY_128, LEAST_INSIDE, LEAST_INSIDE_64 = 0.12, 0.72, 0.6, 0.85
"""From there on `config_by_rule` has a tile of 64, and of 128 channels: other forms waste more on the first.

And the part of a tile of 128 channels that is to lie inside the images, and of one of 64 of more channels in TF32.
"""
CANDIDATES = {
    (2, 1): [
        tile((1, 8, 32), 64, 2, slots=(2, 4), store="slot", num_warps=4, programs=2),
        tile((1, 16, 16), 128, 2, slots=(3, 3), store="stage", num_warps=8, programs=1),
        tile((1, 16, 16), 64, 2, slots=(2, 4), store="slot", num_warps=4, programs=2),
        tile((1, 16, 32), 64, 2, slots=(2, 9), store="slot", num_warps=8, programs=1),
        tile((1, 4, 32), 128, 2, slots=(2, 2), store="stage", num_warps=4, programs=2),
        tile((1, 8, 32), 128, 2, slots=(2, 5), store="stage", num_warps=8, programs=1),
        tile((1, 16, 16), 128, 2, slots=(2, 5), store="stage", num_warps=8, programs=1),
        tile((4, 8, 8), 128, 2, slots=(2, 5), store="stage", num_warps=8, programs=1),
        tile((2, 8, 8), 128, 2, slots=(2, 2), store="stage", num_warps=4, programs=2),
        tile((4, 8, 8), 64, 2, slots=(2, 4), store="slot", num_warps=4, programs=2),
        tile((16, 4, 4), 128, 2, slots=(2, 4), store="stage", num_warps=8, programs=1),
        tile((8, 4, 4), 128, 2, slots=(2, 2), store="stage", num_warps=4, programs=2),
        tile((8, 4, 4), 64, 2, slots=(3, 4), store="slot", num_warps=4, programs=2),
    ],
    (4, 1): [
        tile((1, 8, 32), 64, 4, slots=(2, 4), store="registers", num_warps=4, programs=2),
        tile((1, 16, 16), 128, 4, slots=(3, 6), store="registers", num_warps=8, programs=1),
        tile((1, 16, 16), 64, 4, slots=(2, 4), store="registers", num_warps=4, programs=2),
        tile((1, 16, 32), 64, 4, slots=(2, 8), store="registers", num_warps=8, programs=1),
        tile((1, 4, 32), 128, 4, slots=(2, 4), store="registers", num_warps=4, programs=2),
        tile((1, 8, 32), 128, 4, slots=(3, 6), store="registers", num_warps=8, programs=1),
        tile((4, 8, 8), 128, 4, slots=(3, 6), store="registers", num_warps=8, programs=1),
        tile((2, 8, 8), 128, 4, slots=(3, 3), store="registers", num_warps=4, programs=2),
        tile((2, 8, 8), 256, 4, slots=(3, 5), store="registers", num_warps=8, programs=1),
        tile((16, 4, 4), 128, 4, slots=(3, 4), store="registers", num_warps=8, programs=1),
        tile((8, 4, 4), 128, 4, slots=(2, 4), store="registers", num_warps=4, programs=2),
        tile((8, 4, 4), 256, 4, slots=(3, 4), store="registers", num_warps=8, programs=1),
        tile((8, 4, 4), 64, 4, slots=(3, 4), store="registers", num_warps=4, programs=2),
    ],
    (2, 2): [
        tile((1, 8, 16), 128, 2, slots=(3, 7), store="slot", num_warps=8, programs=1),
        tile((1, 16, 16), 128, 2, slots=(2, 5), store="slot", num_warps=8, programs=1),
        tile((1, 8, 16), 64, 2, slots=(2, 4), store="slot", num_warps=4, programs=2),
        tile((2, 8, 8), 128, 2, slots=(3, 7), store="slot", num_warps=8, programs=1),
        tile((4, 8, 8), 128, 2, slots=(2, 5), store="slot", num_warps=8, programs=1),
        tile((2, 8, 8), 64, 2, slots=(2, 4), store="slot", num_warps=4, programs=2),
        tile((8, 4, 4), 128, 2, slots=(3, 7), store="slot", num_warps=8, programs=1),
        tile((16, 4, 4), 128, 2, slots=(2, 5), store="slot", num_warps=8, programs=1),
        tile((8, 4, 4), 64, 2, slots=(2, 4), store="slot", num_warps=4, programs=2),
    ],
    (4, 2): [
        tile((1, 8, 16), 128, 4, slots=(3, 7), store="registers", num_warps=8, programs=1),
        tile((1, 16, 16), 128, 4, slots=(2, 5), store="registers", num_warps=8, programs=1),
        tile((1, 8, 16), 64, 4, slots=(2, 4), store="registers", num_warps=4, programs=2),
        tile((1, 4, 32), 128, 4, slots=(3, 7), store="registers", num_warps=8, programs=1),
        tile((1, 8, 16), 256, 4, slots=(2, 4), store="registers", num_warps=8, programs=1),
        tile((2, 8, 8), 128, 4, slots=(3, 7), store="registers", num_warps=8, programs=1),
        tile((4, 8, 8), 128, 4, slots=(2, 5), store="registers", num_warps=8, programs=1),
        tile((2, 8, 8), 256, 4, slots=(2, 4), store="registers", num_warps=8, programs=1),
        tile((2, 8, 8), 64, 4, slots=(2, 4), store="registers", num_warps=4, programs=2),
        tile((8, 4, 4), 128, 4, slots=(3, 7), store="registers", num_warps=8, programs=1),
        tile((16, 4, 4), 128, 4, slots=(2, 5), store="registers", num_warps=8, programs=1),
        tile((8, 4, 4), 256, 4, slots=(2, 4), store="registers", num_warps=8, programs=1),
        tile((8, 4, 4), 64, 4, slots=(2, 4), store="registers", num_warps=4, programs=2),
    ],
}
"""That tuning tries, by the bytes of an element and the stride."""
