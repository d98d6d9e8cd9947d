"""Random crops, flips and erased rectangles of whole batches, on the device that holds them.

Every image of an epoch has random numbers of its own, drawn for the whole set at once: which they are depends on the
seed, the epoch and the image alone, not on the order, the batch size or the number of devices.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

ERASED_AREA = (0.02, 0.33)
ERASED_RATIO = (0.3, 3.3)
ERASING_TRIES = 10
"""How often torchvision's RandomErasing tries to place a rectangle."""


class Draws(NamedTuple):
    """What happens to each of N images, integers [N]; in memory one table [N, 7], of which a batch is one look-up."""

    down: Tensor
    right: Tensor
    flip: Tensor
    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor

    @classmethod
    def of(cls, table: Tensor) -> "Draws":
        return cls(*table.unbind(1))


class Augmentation(NamedTuple):
    """Crops out of reflected edges, mirrors, and erases a rectangle to the mean colour.

    In distribution this is torchvision's `RandomCrop(S, padding, padding_mode="reflect")`, `RandomHorizontalFlip()`,
    normalising and `RandomErasing(erase)`. One difference: flips alternate. Half of the images are mirrored in even
    epochs, the others in odd ones, so that two epochs show both sides of every image (airbench,
    https://arxiv.org/abs/2404.00498).

    Args:
        padding: pixels by which a crop moves at most, in each direction, less than the image's size.
        flip: whether to mirror.
        erase: share of the images of which a rectangle is erased, from 0 to 1.
    """

    padding: int
    flip: bool = True
    erase: float = 0.0

    def draw(self, count: int, size: int, epoch: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
        """The table of draws for `count` images [3, size, size] in this epoch; always the same on a kind of device."""
        generator = torch.Generator(device).manual_seed(seed)
        first = torch.randint(2, (count,), generator=generator, device=device, dtype=torch.bool)
        flip = first ^ bool(epoch % 2) if self.flip else torch.zeros_like(first)
        generator.manual_seed((seed * 1_000_003 + epoch + 1) % 2**63)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        offsets = torch.randint(-self.padding, self.padding + 1, (2, count), generator=generator, device=device)
        down, right = offsets.unbind()
        if not self.erase:
            nothing = torch.zeros_like(down)
            return torch.stack(Draws(down, right, flip, nothing, nothing, nothing, nothing), 1)
        area = size**2 * (ERASED_AREA[0] + uniform(count, ERASING_TRIES) * (ERASED_AREA[1] - ERASED_AREA[0]))
        low, high = (math.log(ratio) for ratio in ERASED_RATIO)
        ratio = (low + uniform(count, ERASING_TRIES) * (high - low)).exp()
        height, width = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (height < size) & (width < size)
        chosen = fits.byte().argmax(1, keepdim=True)  # the first; none where none fits
        erased = fits.any(1) & (uniform(count) < self.erase)
        height, width = (sizes.gather(1, chosen).squeeze(1) * erased for sizes in (height, width))
        top, left = ((uniform(count) * (size - extent + 1)).long() for extent in (height, width))
        return torch.stack(Draws(down, right, flip, top, left, height, width), 1)

    def apply(self, images: Tensor, chosen: Tensor, table: Tensor) -> Tensor:
        """Normalised float32 [B, 3, S, S] of the `chosen` [B] of uint8 images [N, 3, S, S], by their draws [B, 7]."""
        draws = Draws.of(table)
        size = images.shape[-1]
        pixels = torch.arange(size, device=images.device)
        columns = torch.where(draws.flip[:, None] > 0, pixels.flip(0), pixels)
        source_rows = _reflected(pixels + draws.down[:, None], size)  # [B, S]
        source_columns = _reflected(columns + draws.right[:, None], size)
        channels = torch.arange(images.shape[1], device=images.device)
        batch = normalise(
            images[
                chosen[:, None, None, None],
                channels[:, None, None],
                source_rows[:, None, :, None],
                source_columns[:, None, None, :],
            ]
        )
        if self.erase:
            rows = _within(pixels, draws.top, draws.height)
            columns = _within(pixels, draws.left, draws.width)
            batch.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
        return batch


def normalise(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] as float32 with ImageNet's mean and deviation taken out, as torchvision does it."""
    mean, std = (_constant(values, images.device) for values in (MEAN, STD))
    return images.float().mul_(1 / 255).sub_(mean).div_(std)


_constants: dict[tuple, Tensor] = {}


def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1] on the device, copied there once: a copy in every batch would wait for the GPU."""
    if (values, device) not in _constants:
        _constants[values, device] = torch.tensor(values, device=device)[:, None, None]
    return _constants[values, device]


def _reflected(index: Tensor, size: int) -> Tensor:
    """-1 is 1, `size` is `size` - 2."""
    return size - 1 - (size - 1 - index.abs()).abs()


def _within(pixels: Tensor, start: Tensor, extent: Tensor) -> Tensor:
    """[B, S]: which pixels lie in each image's [start, start + extent)."""
    return (pixels >= start[:, None]) & (pixels < (start + extent)[:, None])
