"""Tiles with a halo: the defaults, and others that are timed by tuning or only tested."""

import dataclasses

from tritonnn.ops.conv2d.forms.tma_halo import TmaHaloConfig


def halo(*sizes: int | bool) -> TmaHaloConfig:
    """A configuration by its fields, in their order."""
    names = (field.name for field in dataclasses.fields(TmaHaloConfig))
    return TmaHaloConfig(**dict(zip(names, sizes, strict=True)))


HALF_64, HALF_128 = (
    halo(1, 8, 32, 64, 64, 2, 4, True, True, 4, 2),
    halo(1, 16, 16, 128, 64, 3, 3, True, False, 8, 1),
)
TF32_64, TF32_128 = (
    halo(1, 8, 32, 64, 32, 2, 4, False, False, 4, 2),
    halo(1, 16, 16, 128, 32, 3, 6, False, False, 8, 1),
)
HALF_8X8, HALF_4X4 = (
    halo(4, 8, 8, 128, 64, 2, 5, True, False, 8, 1),
    halo(16, 4, 4, 128, 64, 2, 4, True, False, 8, 1),
)
TF32_8X8, TF32_4X4 = (
    halo(4, 8, 8, 128, 32, 3, 6, False, False, 8, 1),
    halo(16, 4, 4, 128, 32, 3, 4, False, False, 8, 1),
)
HALF_BY_2, TF32_BY_2 = (
    halo(1, 8, 16, 128, 64, 3, 7, True, True, 8, 1),
    halo(1, 8, 16, 128, 32, 3, 7, False, False, 8, 1),
)
SEVERAL_IMAGES = {
    "8x8": HALF_8X8,
    "8x8, 128 pixels": halo(2, 8, 8, 128, 64, 2, 2, True, False, 4, 2),
    "8x8, in a slot": halo(4, 8, 8, 64, 64, 2, 4, True, True, 4, 2),
    "4x4": HALF_4X4,
    "4x4, 128 pixels": halo(8, 4, 4, 128, 64, 2, 2, True, False, 4, 2),
    "4x4, 64 channels": halo(8, 4, 4, 64, 64, 3, 4, True, True, 4, 2),
    "TF32, 8x8": TF32_8X8,
    "TF32, 8x8, 128 pixels": halo(2, 8, 8, 128, 32, 3, 3, False, False, 4, 2),
    "TF32, 8x8, 256 channels": halo(2, 8, 8, 256, 32, 3, 5, False, False, 8, 1),
    "TF32, 4x4": TF32_4X4,
    "TF32, 4x4, 128 pixels": halo(8, 4, 4, 128, 32, 2, 4, False, False, 4, 2),
    "TF32, 4x4, 256 channels": halo(8, 4, 4, 256, 32, 3, 4, False, False, 8, 1),
    "TF32, 4x4, 64 channels": halo(8, 4, 4, 64, 32, 3, 4, False, False, 4, 2),
    "TF32, 8x4": halo(8, 8, 4, 64, 32, 2, 4, False, False, 4, 1),
    "TF32, 2x4": halo(16, 2, 4, 64, 32, 3, 9, False, False, 4, 1),
}
"""By the type and the size of the images."""
