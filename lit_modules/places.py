"""Which samples of a data set a batch has."""

from collections import Counter
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler


class Places:
    """Counts through the batches of (several) loaders."""

    def __init__(self, dataloaders: Any) -> None:
        self._loaders = CombinedLoader(dataloaders, "sequential").flattened
        self._seen: Counter[int] = Counter()

    def of(self, size: int, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """A batch's places in the (concatenated) test sets; which of them are not padding of a DistributedSampler."""
        sampler = _sampler(self._loaders[dataloader_idx])
        places = torch.arange(size) + self._seen[dataloader_idx]
        self._seen[dataloader_idx] += size
        counted = torch.ones_like(places, dtype=torch.bool)
        if isinstance(sampler, DistributedSampler):  # rank r has the places r, r + R, r + 2R, ...
            places = places * sampler.num_replicas + sampler.rank
            counted = places < len(sampler.dataset)  # type: ignore[arg-type]
        before = (_samples(loader, self._seen[index]) for index, loader in enumerate(self._loaders[:dataloader_idx]))
        return places + sum(before), counted


def _samples(loader: Any, seen: int) -> int:
    """The number of samples of a loader's data set, or of those seen where it does not know its length."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return seen


def _sampler(loader: Any) -> Any:
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)
