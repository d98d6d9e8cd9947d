"""The data modules: CIFAR-10, any folder of images, and scikit-learn's digits.

Batches are (images, labels), made on the device: normalised float32 [N, 3, S, S] and int64 [N]. Images that fit are
decoded once and live on the device as uint8. The validation split comes out of the training set, seeded; the test set
is for testing only.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torchvision import datasets
from torchvision.datasets.folder import find_classes
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

from lit_modules import decoded_images
from lit_modules.augmentation import Augmentation
from lit_modules.batches import Batches
from lit_modules.command_line import UserError
from lit_modules.decoded_images import Images

MEMORY_LIMIT = 2**30  # bytes of a split that is kept in memory unless told otherwise


class UnreadableImage(UserError):
    """An image file that cannot be decoded. The traceback that a DataLoader worker puts before the message is cut."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def read_image(path: str) -> Image.Image:
    """The image as RGB, of 16-bit grey the upper byte; raises UnreadableImage, naming the file."""
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):  # 32 bits, in any range: Pillow would clip at 255
                raise ValueError(f"its pixels have 32 bits (mode {image.mode}), expected 8 or 16")
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(f"cannot read the image {path}: {error}") from error


class ImageData(LightningDataModule, ABC):
    """What the data modules share. A subclass sets `num_classes` and writes `load`.

    Args:
        name: of the folders that training writes to.
        batch_size: images a step of training, shared out among the devices: the recipe is the same on any number.
        image_size: S; larger and smaller images are resized to it and cropped at the centre.
        val_fraction: part of the training set that is held out for validation, more than 0 and less than 1.
        num_workers: loader processes a device; None takes what the CPU has.
        in_memory: keep the decoded images, on the device; None does if a split takes no more than `MEMORY_LIMIT`.
        flip: mirror half of the training images, the other half in the next epoch.
        erase: share of the training images in which a random rectangle becomes the mean colour, from 0 to 1.

    Raises:
        UserError: an argument is out of its range.
    """

    in_channels = 3
    num_classes: int

    def __init__(
        self,
        name: str,
        batch_size: int,
        image_size: int,
        val_fraction: float,
        num_workers: int | None,
        in_memory: bool | None,
        flip: bool,
        erase: float,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if image_size < 1:
            raise UserError(f"image_size must be at least 1, got {image_size}")
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"num_workers must not be negative, got {num_workers}")
        if not 0 <= erase <= 1:
            raise UserError(f"erase must lie between 0 and 1, got {erase}")
        self.name = name
        self.batch_size = batch_size
        self.image_size = image_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.in_memory = in_memory
        self.decode = v2.Compose([v2.PILToTensor(), v2.Resize(image_size), v2.CenterCrop(image_size)])
        self.augmentation = Augmentation(image_size // 8, flip, erase)
        self.save_hyperparameters({"data": type(self).__name__})

    @abstractmethod
    def load(self, train: bool) -> Dataset:
        """The training or test set: (uint8 [3, S, S], label) pairs."""

    def decoded(self, train: bool) -> Images:
        """All images of the training or test set."""
        loader = DataLoader(self.load(train), batch_size=256, num_workers=self._workers())
        images, labels = zip(*loader, strict=True)
        return torch.cat(images), torch.cat(labels)

    def setup(self, stage: str | None = None) -> None:
        """Loads the training set for the stages "fit" and "validate", the test set for "test", both for None."""
        if stage in ("fit", "validate", None):
            dataset = self._images(train=True)
            count = len(dataset)  # type: ignore[arg-type]
            num_val = max(self._world_size(), round(self.val_fraction * count))
            if num_val >= count:
                raise UserError("the training set is too small: no image is left after the validation split")
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
            self.train_set = self._subset(dataset, order[: count - num_val])
            self.val_set = self._subset(dataset, order[count - num_val :])
        if stage in ("test", None):
            self.test_set = self._on_device(self._images(train=False))

    def train_dataloader(self) -> Batches:
        world, batch_size = self._world_size(), self._batch_size()
        drop_last = len(self.train_set) >= self.batch_size  # type: ignore[arg-type]
        rank = self.trainer.global_rank if self.trainer else 0
        seed = self._same_everywhere(torch.initial_seed() % 2**32)
        shuffle = not (self.trainer and self.trainer.overfit_batches)  # which are to be the same in every epoch
        sampler: DistributedSampler = DistributedSampler(self.train_set, world, rank, shuffle, seed, drop_last)
        return self._batches(self.train_set, sampler, batch_size, drop_last, self.augmentation, seed)

    def val_dataloader(self) -> Batches:
        return self._evaluation_batches(self.val_set)

    def test_dataloader(self) -> Batches:
        return self._evaluation_batches(self.test_set)

    def _images(self, train: bool) -> Dataset:
        """In memory if they fit there; otherwise decoded anew each time."""
        dataset = self.load(train)
        if isinstance(dataset, TensorDataset) or not self._fits(len(dataset)):  # type: ignore[arg-type]
            return dataset
        return TensorDataset(*self.decoded(train))

    def _fits(self, count: int) -> bool:
        return count * 3 * self.image_size**2 <= MEMORY_LIMIT if self.in_memory is None else self.in_memory

    def _subset(self, dataset: Dataset, indices: torch.Tensor) -> Dataset:
        if isinstance(dataset, TensorDataset):
            return self._on_device(TensorDataset(*(tensor[indices] for tensor in dataset.tensors)))
        return Subset(dataset, indices.tolist())

    def _on_device(self, dataset: Dataset) -> Dataset:
        if isinstance(dataset, TensorDataset):
            return TensorDataset(*(tensor.to(self._device()) for tensor in dataset.tensors))
        return dataset

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _same_everywhere(self, value: int) -> int:
        return self.trainer.strategy.broadcast(value) if self.trainer else value

    def _batch_size(self) -> int:
        """The batch size of one device."""
        if self.batch_size % self._world_size():
            raise UserError(
                f"batch_size is for all devices together: {self.batch_size} cannot be shared out among "
                f"{self._world_size()} devices"
            )
        return self.batch_size // self._world_size()

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return suggested_max_num_workers(self.trainer.num_devices if self.trainer else 1)

    def _evaluation_batches(self, dataset: Dataset) -> Batches:
        """Every image once: Lightning's own choice under DDP would repeat some to make the ranks even."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        sampler = UnrepeatedDistributedSampler(dataset, shuffle=False) if distributed else None
        return self._batches(dataset, sampler or SequentialSampler(dataset), self._batch_size())  # type: ignore[arg-type]

    def _batches(
        self,
        dataset: Dataset,
        sampler: Any,
        batch_size: int,
        drop_last: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> Batches:
        return Batches(dataset, sampler, batch_size, drop_last, self._device(), augmentation, seed, self._workers())


class CIFAR10(ImageData):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32, 10 classes. Downloads it if absent.

    Args:
        root: folder of the archive `cifar-10-python.tar.gz` and of what is unpacked from it.
        batch_size, image_size, val_fraction, num_workers, in_memory: see `ImageData`.

    Raises:
        UserError: the archive is absent and cannot be downloaded, or its md5 is wrong.
    """

    num_classes = 10

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 512,
        image_size: int = 32,
        val_fraction: float = 0.02,
        num_workers: int | None = None,
        in_memory: bool | None = None,
    ) -> None:
        name = "cifar10" if image_size == 32 else f"cifar10_{image_size}"
        super().__init__(name, batch_size, image_size, val_fraction, num_workers, in_memory, flip=True, erase=0.5)
        self.save_hyperparameters()
        self.root = root

    def prepare_data(self) -> None:
        archive = Path(self.root, datasets.CIFAR10.filename)
        unpacked = Path(self.root, datasets.CIFAR10.base_folder)
        if not unpacked.exists() and archive.exists() and not check_integrity(archive, datasets.CIFAR10.tgz_md5):
            raise UserError(
                f"{archive} is corrupt: its md5 is not {datasets.CIFAR10.tgz_md5}. Delete it to download it again, "
                f"or replace it with the file from {datasets.CIFAR10.url}"
            )
        try:
            datasets.CIFAR10(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"CIFAR-10 is not in {self.root} and cannot be downloaded ({error}). Place {datasets.CIFAR10.url} at "
                f"{archive}, or train on the embedded digits: --config configs/digits.yaml"
            ) from error

    def load(self, train: bool) -> Dataset:
        return datasets.CIFAR10(self.root, train, transform=self.decode)

    def decoded(self, train: bool) -> Images:
        if self.image_size != 32:
            return super().decoded(train)
        dataset = datasets.CIFAR10(self.root, train)  # decoded already: [N, 32, 32, 3]
        return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


class ImageFolder(ImageData):
    """A tree `train/<class>/*` and `test/<class>/*` of image files, as torchvision's ImageFolder reads it.

    Args:
        root: folder that holds `train/` and `test/`.
        batch_size, image_size, val_fraction, num_workers, in_memory, flip, erase: see `ImageData`.

    Raises:
        UserError: a folder is absent, there is one class only or one without images, the classes of `test/` are not
            those of `train/`, or an image cannot be read or has pixels of 32 bits.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 512,
        image_size: int = 32,
        val_fraction: float = 0.02,
        num_workers: int | None = None,
        in_memory: bool | None = None,
        flip: bool = True,
        erase: float = 0.5,
    ) -> None:
        name = Path(root).resolve().name
        super().__init__(name, batch_size, image_size, val_fraction, num_workers, in_memory, flip, erase)
        self.save_hyperparameters()
        self.root = root
        self.classes = self._classes("train")
        self.num_classes = len(self.classes)
        if self.num_classes < 2:
            raise UserError(f"{root}/train has one class, {self.classes[0]}: to tell classes apart takes two")
        if self._classes("test") != self.classes:
            raise UserError(f"{root}/test must have the class folders of {root}/train: {', '.join(self.classes)}")

    def _classes(self, split: str) -> list[str]:
        folder = Path(self.root, split)
        if not folder.is_dir():
            raise UserError(f"{self.root} has no folder {split}/: expected {folder}/<class>/<image>")
        try:
            return find_classes(folder)[0]
        except FileNotFoundError:
            raise UserError(f"{folder} has no class folders: expected {folder}/<class>/<image>") from None

    def prepare_data(self) -> None:
        """Has one process of a machine decode the images, for all."""
        train = self.trainer is None or self.trainer.state.fn != TrainerFn.TESTING
        if self._fits(len(self.load(train))):
            self.decoded(train)

    def load(self, train: bool) -> datasets.ImageFolder:
        folder = Path(self.root, "train" if train else "test")
        try:
            return datasets.ImageFolder(folder, transform=self.decode, loader=read_image)
        except FileNotFoundError as error:
            raise UserError(f"{folder}: {error}") from None

    def decoded(self, train: bool) -> Images:
        dataset, decode = self.load(train), super().decoded
        files = [file for file, _ in dataset.samples]
        return decoded_images.kept(Path(dataset.root), files, self.image_size, lambda: decode(train))


class Digits(ImageData):
    """scikit-learn's handwritten digits: 1,797 real images inside the package, scaled from 8x8 to 32x32, grey as RGB.

    A fixed, stratified fifth (360 images) is the test set. There is nothing to download.

    Args:
        batch_size, val_fraction, num_workers: see `ImageData`.
    """

    num_classes = 10

    def __init__(self, batch_size: int = 512, val_fraction: float = 0.02, num_workers: int | None = None) -> None:
        super().__init__("digits", batch_size, 32, val_fraction, num_workers, in_memory=True, flip=False, erase=0.0)
        self.save_hyperparameters()

    def load(self, train: bool) -> Dataset:
        from sklearn.datasets import load_digits  # half a second, which other data need not wait for
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        indices = train_test_split(range(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
        chosen = indices[0 if train else 1]
        images = torch.from_numpy(digits.images[chosen]).unsqueeze(1)  # [N, 1, 8, 8], 0 to 16
        images = v2.functional.resize((images * (255 / 16)).to(torch.uint8), [self.image_size, self.image_size])
        return TensorDataset(images.expand(-1, 3, -1, -1), torch.from_numpy(digits.target[chosen]))


def data_module_from_checkpoint(checkpoint: dict[str, Any], **overrides: Any) -> ImageData:
    """The data module that a checkpoint was trained with.

    Args:
        checkpoint: as loaded with `weights_only=True`.
        overrides: constructor arguments to replace, such as `batch_size`.

    Raises:
        UserError: the checkpoint names none of the data modules here, or arguments that the module does not have.
    """
    arguments = dict(checkpoint.get(ImageData.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    known = {cls.__name__: cls for cls in (CIFAR10, ImageFolder, Digits)}
    name = arguments.pop("data", None)
    if name not in known:
        raise UserError(f"the checkpoint's data module must be one of {', '.join(known)}, got {name}")
    try:
        return known[name](**arguments | overrides)
    except TypeError as error:
        raise UserError(f"the checkpoint's arguments do not fit {name}: {error}") from error
