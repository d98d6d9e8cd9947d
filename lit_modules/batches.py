"""Batches that are made on the device: of images that live there, or that a DataLoader brings."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lit_modules.augmentation import Augmentation, normalise

AT_ONCE = 2**26
"""Bytes of images in memory that are augmented at once, as float32: the CPU launches kernels for several batches."""


class Batches:
    """Iterates over (images, labels) on a device: normalised float32 [B, 3, S, S] and int64 [B].

    A `TensorDataset` is taken as it lies on the device, so that no batch waits for the CPU. Of another data set of
    (uint8 [3, S, S], label), the processes of a DataLoader decode the images; all else happens on the device, too. The
    same images come out of both in the same order, augmented alike.

    Args:
        dataset: the images.
        sampler: their order, and which are this process's; with `set_epoch`, which Lightning calls, another each epoch.
        batch_size: images a batch, here.
        drop_last: leave out the last batch where it would be smaller.
        device: where the batches are made.
        augmentation: None only normalises.
        seed: of the augmentation.
        num_workers: processes that decode.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler[int],
        batch_size: int,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        augmentation: Augmentation | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        self.dataset, self.batch_sampler = dataset, BatchSampler(sampler, batch_size, drop_last)
        self.device, self.augmentation, self.seed = torch.device(device), augmentation, seed
        self._on_cuda = self.device.type == "cuda"
        if not isinstance(dataset, TensorDataset):
            self._loader = DataLoader(
                _Numbered(dataset),
                batch_sampler=self.batch_sampler,
                num_workers=num_workers,
                persistent_workers=num_workers > 0,
                pin_memory=self._on_cuda,
            )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws = None
        resident, size = isinstance(self.dataset, TensorDataset), self.batch_sampler.batch_size
        for images, labels, chosen, indices in self._resident() if resident else self._loaded():
            if self.augmentation:
                if draws is None:
                    draws = self._draw(images.shape[-1])
                images = self.augmentation.apply(images, chosen, draws[indices])
            else:
                images = normalise(images[chosen] if resident else images)
            yield from zip(images.split(size), labels.split(size))

    def _resident(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """All images, the labels of the next batches, which images of all are theirs, and their numbers."""
        images, labels = self.dataset.tensors
        size = self.batch_sampler.batch_size
        order = self._sent(torch.tensor(list(self.batch_sampler.sampler), dtype=torch.int64))[: len(self) * size]
        for chosen in order.split(size * max(AT_ONCE // (size * images[0].numel() * 4), 1)):
            yield images, labels[chosen], chosen, chosen

    def _loaded(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """A batch's images and labels, which of these images are its (all), and their numbers in the data set."""
        for images, labels, indices in self._loader:
            chosen = torch.arange(len(images), device=self.device)
            yield (
                *(tensor.to(self.device, non_blocking=True) for tensor in (images, labels)),
                chosen,
                self._sent(indices),
            )

    def _draw(self, size: int) -> Tensor:
        sampler = self.batch_sampler.sampler
        epoch = sampler.epoch if isinstance(sampler, DistributedSampler) else 0
        return self.augmentation.draw(len(self.dataset), size, epoch, self.seed, self.device)  # type: ignore[arg-type]

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, without waiting for what the device does."""
        if not self._on_cuda:
            return tensor
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self.device, non_blocking=True)


class _Numbered(Dataset):
    """(image, label, index) for each (image, label) of a data set."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return *self.dataset[index], index
