"""Batches that are made on the device."""

import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lit_modules.augmentation import Augmentation, normalise
from lit_modules.batches import Batches

IMAGES = torch.randint(0, 256, (22, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(22)
RESIDENT = TensorDataset(IMAGES, LABELS)


class Decoded(Dataset):
    """The same images, one by one."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return IMAGES[index], index


def shuffled(dataset: Dataset, world: int = 1, rank: int = 0, epoch: int = 0, **options) -> Batches:
    sampler = DistributedSampler(dataset, world, rank, seed=3, drop_last=True)
    sampler.set_epoch(epoch)
    return Batches(dataset, sampler, 5, augmentation=Augmentation(2, erase=0.5), seed=3, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_the_same_batches_as_images_in_memory(num_workers):
    resident, loaded = (list(shuffled(data, num_workers=num_workers)) for data in (RESIDENT, Decoded()))
    assert len(resident) == len(loaded) == 5
    for (images, labels), (images_again, labels_again) in zip(resident, loaded):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)


def test_how_many_are_augmented_at_once_changes_nothing(monkeypatch):
    all_at_once = list(shuffled(RESIDENT))
    monkeypatch.setattr("lit_modules.batches.AT_ONCE", 2 * 5 * IMAGES[0].numel() * 4)
    two_by_two = list(shuffled(RESIDENT))
    assert [len(labels) for _, labels in two_by_two] == [5, 5, 5, 5, 2]
    for batch, again in zip(all_at_once, two_by_two, strict=True):
        assert all(torch.equal(*both) for both in zip(batch, again))


@pytest.mark.parametrize("dataset", [RESIDENT, Decoded()], ids=["in memory", "loaded"])
@pytest.mark.parametrize("drop_last, sizes", [(True, [5, 5, 5, 5]), (False, [5, 5, 5, 5, 2])])
def test_every_image_comes_once(dataset, drop_last, sizes):
    batches = shuffled(dataset, drop_last=drop_last)
    labels = [labels for _, labels in batches]
    assert [len(each) for each in labels] == sizes and len(batches) == len(sizes)
    assert len(set(torch.cat(labels).tolist())) == sum(sizes)


def test_another_epoch_has_another_order_and_other_crops():
    batches = shuffled(RESIDENT)
    first, again = list(batches), list(batches)
    batches.batch_sampler.sampler.set_epoch(1)
    second = list(batches)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again))
    assert not torch.equal(torch.cat([labels for _, labels in first]), torch.cat([labels for _, labels in second]))


def test_processes_share_the_images_and_augment_them_as_one_would():
    alone = dict((int(label), image) for images, labels in shuffled(RESIDENT) for image, label in zip(images, labels))
    for rank in range(2):
        for images, labels in shuffled(RESIDENT, world=2, rank=rank):
            for image, label in zip(images, labels):
                assert torch.equal(image, alone.pop(int(label)))
    assert not alone


@pytest.mark.parametrize("dataset", [RESIDENT, Decoded()], ids=["in memory", "loaded"])
def test_without_augmentation_images_are_normalised(dataset):
    ((images, labels),) = Batches(dataset, SequentialSampler(dataset), 22)
    assert torch.equal(images, normalise(IMAGES)) and torch.equal(labels, LABELS)
