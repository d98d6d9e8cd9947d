"""Augmentation in batches: torchvision's in distribution, own numbers for each image, the same for the same seed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from lit_modules.augmentation import MEAN, STD, Augmentation, Draws, normalise

SIZE = 32
TORCHVISION = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def augmented(augmentation: Augmentation, source: Tensor, epoch: int = 0, seed: int = 0) -> Tensor:
    draws = augmentation.draw(len(source), SIZE, epoch, seed)
    return augmentation.apply(source, torch.arange(len(source)), draws)


def test_normalising_is_torchvisions():
    torch.testing.assert_close(normalise(images(4)), TORCHVISION(images(4)), rtol=0, atol=1e-6)


def test_each_image_is_cropped_and_mirrored_as_its_draws_say():
    source, augmentation = images(64), Augmentation(4)
    table = augmentation.draw(64, SIZE, 0, 0)
    draws = Draws.of(table)
    padded = v2.functional.pad(source, [4], padding_mode="reflect")
    batch = augmentation.apply(source, torch.arange(64), table)
    for i, image in enumerate(batch):
        top, left = 4 + draws.down[i], 4 + draws.right[i]
        crop = padded[i, :, top : top + SIZE, left : left + SIZE]
        torch.testing.assert_close(image, normalise(crop.flip(2) if draws.flip[i] else crop))
    assert len(set(zip(draws.down.tolist(), draws.right.tolist(), draws.flip.tolist()))) > 40


def test_a_batch_is_of_the_images_that_are_chosen():
    source, augmentation = images(16), Augmentation(4, erase=0.5)
    draws, chosen = augmentation.draw(16, SIZE, 0, 0), torch.tensor([11, 3, 3])
    whole = augmentation.apply(source, torch.arange(16), draws)
    assert torch.equal(augmentation.apply(source, chosen, draws[chosen]), whole[chosen])


def test_a_seed_and_an_epoch_give_the_same_images_again_and_another_seed_or_epoch_others():
    source, augmentation = images(8), Augmentation(4, erase=0.5)
    first = augmented(augmentation, source, epoch=2, seed=3)
    assert torch.equal(augmented(augmentation, source, epoch=2, seed=3), first)
    for epoch, seed in ((1, 3), (2, 4)):
        assert not any(map(torch.equal, augmented(augmentation, source, epoch, seed), first))


def test_every_image_is_mirrored_in_every_other_epoch():
    flips = torch.stack([Draws.of(Augmentation(4).draw(1000, SIZE, epoch, 0)).flip for epoch in range(4)])
    assert torch.equal(flips[0], flips[2]) and torch.equal(flips[1], flips[3]) and torch.equal(flips[0], 1 - flips[1])
    assert 450 < flips[0].sum() < 550
    assert not Draws.of(Augmentation(4, flip=False).draw(1000, SIZE, 0, 0)).flip.any()


def erased(batch: Tensor) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of each image's rectangle of zeros; zeros where there is none."""
    found = []
    for zero in (batch == 0).all(1):
        rows, columns = zero.any(1).nonzero().flatten(), zero.any(0).nonzero().flatten()
        if not len(rows):
            found.append((0, 0, 0, 0))
            continue
        assert zero.sum() == len(rows) * len(columns)  # one rectangle
        found.append((int(rows[0]), int(columns[0]), len(rows), len(columns)))
    return found


def quantiles(values: list[int]) -> Tensor:
    return torch.tensor(values).double().quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64))


@pytest.mark.parametrize(
    "measure, tolerance",
    [
        pytest.param(lambda top, left, height, width: height * width, 12, id="area"),
        pytest.param(lambda top, left, height, width: height, 1, id="height"),
        pytest.param(lambda top, left, height, width: width, 1, id="width"),
        pytest.param(lambda top, left, height, width: top, 1, id="top"),
        pytest.param(lambda top, left, height, width: left, 1, id="left"),
    ],
)
def test_erased_rectangles_are_torchvisions_in_distribution(measure: Callable[..., int], tolerance: int):
    count = 4000
    ours = erased(
        augmented(Augmentation(0, flip=False, erase=1.0), torch.ones(count, 3, SIZE, SIZE, dtype=torch.uint8))
    )
    erasing = v2.RandomErasing(1.0)
    theirs = erased(torch.stack([erasing(torch.ones(3, SIZE, SIZE)) for _ in range(count)]))
    difference = quantiles([measure(*box) for box in ours]) - quantiles([measure(*box) for box in theirs])
    assert difference.abs().max() <= tolerance


def test_a_share_of_the_images_is_erased():
    boxes = erased(
        augmented(Augmentation(0, flip=False, erase=0.3), torch.ones(2000, 3, SIZE, SIZE, dtype=torch.uint8))
    )
    assert 0.25 < sum(height > 0 for _, _, height, _ in boxes) / 2000 < 0.35


def test_crops_move_in_every_direction_alike():
    draws = Draws.of(Augmentation(4).draw(9000, SIZE, 0, 0))
    for offsets in (draws.down, draws.right):
        values, counts = offsets.unique(return_counts=True)
        assert values.tolist() == list(range(-4, 5)) and 880 < counts.min() and counts.max() < 1120
    assert abs(torch.corrcoef(torch.stack([draws.down, draws.right]).double())[0, 1]) < 0.05
