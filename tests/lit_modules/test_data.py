"""The data modules: their splits, their batches, and one clear line for wrong data."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from lit_modules.augmentation import MEAN, STD
from lit_modules.batches import Batches
from lit_modules.command_line import UserError
from lit_modules.data import CIFAR10, Digits, ImageFolder, data_module_from_checkpoint, read_image


@pytest.fixture
def folder(tmp_path):
    """Two classes; 8 training and 3 test images each, every one of a colour of its own."""
    for split, count in (("train", 8), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            path = tmp_path / "pets" / split / name
            path.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 50), (10 * i, 100 * label, 200 if split == "test" else 0)).save(path / f"{i}.png")
    return tmp_path / "pets"


def colours(loader: Batches) -> list[tuple[int, ...]]:
    """A data set of images that are one colour each."""
    pixels = torch.cat([images[:, :, 0, 0] for images, _ in loader])
    return [tuple(pixel) for pixel in ((pixels * torch.tensor(STD) + torch.tensor(MEAN)) * 255).round().int().tolist()]


@pytest.mark.parametrize("in_memory, num_workers", [(True, 0), (False, 0), (None, 1)])
def test_image_folder_gives_every_image_once_resized_and_normalised(folder, in_memory, num_workers):
    data = ImageFolder(str(folder), 4, 32, val_fraction=0.25, num_workers=num_workers, in_memory=in_memory)
    data.setup()
    train, val, test = (
        colours(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    )
    assert data.num_classes == 2 and data.name == "pets"
    assert len(val) == 4 and len(train) == 12
    assert sorted(train + val) == [(10 * i, 100 * label, 0) for i in range(8) for label in range(2)]
    assert sorted(test) == [(10 * i, 100 * label, 200) for i in range(3) for label in range(2)]
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 0, 1]


def test_validation_split_is_the_same_each_time_and_not_augmented():
    first, second = Digits(), Digits()
    first.setup("fit"), torch.manual_seed(1), second.setup("fit")
    for (images, labels), (images_again, labels_again) in zip(first.val_dataloader(), second.val_dataloader()):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    assert len(first.val_set) == 29 and len(first.train_set) == 1408


def test_digits_are_split_into_train_and_test_without_overlap():
    data = Digits(batch_size=32, num_workers=0)
    train, test = data.load(train=True), data.load(train=False)
    assert (len(train), len(test)) == (1437, 360)
    assert not {image.numpy().tobytes() for image, _ in train} & {image.numpy().tobytes() for image, _ in test}
    assert set(torch.bincount(test.tensors[1]).tolist()) <= {34, 35, 36, 37}
    assert train[0][0].dtype == torch.uint8 and train[0][0].max() > 200


def test_cifar10_is_read_from_the_unpacked_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "__init__", lambda self, *args, **kwargs: calls.append((args, kwargs)))
    calls = []
    data = CIFAR10(str(tmp_path))
    data.prepare_data()
    data.load(train=False)
    assert calls == [((str(tmp_path),), {"download": True}), ((str(tmp_path), False), {"transform": data.decode})]


def test_cifar10_absent_and_no_network(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz.*--config configs/digits.yaml"):
        CIFAR10(str(tmp_path)).prepare_data()


def test_corrupt_archive_is_named_and_left_alone(tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is corrupt: its md5"):
        CIFAR10(str(tmp_path)).prepare_data()
    assert archive.read_bytes() == b"half a download"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled(folder, suffix):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    path = folder / f"grey.{suffix}"
    Image.fromarray(grey).save(path)
    assert Image.open(path).mode == "I;16"
    assert np.array_equal(np.asarray(read_image(path)), np.repeat((grey // 256)[..., None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused_by_name(folder, dtype):
    path = folder / "deep.tif"
    Image.fromarray(np.full((8, 8), 70000, dtype)).save(path)
    with pytest.raises(UserError, match=r"deep.tif: its pixels have 32 bits"):
        read_image(path)


def test_image_folder_with_one_class(folder):
    for split in ("train", "test"):
        shutil.rmtree(folder / split / "dog")
    with pytest.raises(UserError, match="has one class, cat"):
        ImageFolder(str(folder))


@pytest.mark.parametrize("split", ["train", "test"])
def test_image_folder_without_a_split(folder, split):
    (folder / split).rename(folder / "elsewhere")
    with pytest.raises(UserError, match=f"has no folder {split}/"):
        ImageFolder(str(folder))


def test_image_folder_with_an_empty_class(folder):
    (folder / "train" / "cow").mkdir()
    (folder / "test" / "cow").mkdir()
    with pytest.raises(UserError, match="train: .*cow"):
        ImageFolder(str(folder)).setup("fit")


def test_image_folder_whose_test_set_has_other_classes(folder):
    (folder / "test" / "dog").rename(folder / "test" / "cow")
    with pytest.raises(UserError, match="must have the class folders of .*train: cat, dog"):
        ImageFolder(str(folder))


@pytest.mark.parametrize("in_memory, num_workers", [(True, 0), (True, 1), (False, 1)])
def test_unreadable_image_is_named(folder, in_memory, num_workers):
    broken = folder / "test" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    data = ImageFolder(str(folder), in_memory=in_memory, num_workers=num_workers)
    with pytest.raises(UserError) as raised:
        data.setup("test")
        list(data.test_dataloader())
    assert str(raised.value).startswith(f"cannot read the image {broken}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1, got 1.0"),
        ({"num_workers": -1}, "num_workers must not be negative, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_argument_out_of_range(arguments, message):
    with pytest.raises(UserError, match=message):
        Digits(**arguments)


@pytest.mark.parametrize(
    "data", [Digits(8, num_workers=0), CIFAR10("elsewhere", image_size=224)], ids=["Digits", "CIFAR10"]
)
def test_data_module_comes_back_from_a_checkpoint(data):
    again = data_module_from_checkpoint({"datamodule_hyper_parameters": dict(data.hparams)}, num_workers=2)
    assert type(again) is type(data)
    assert again.hparams == data.hparams | {"num_workers": 2}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "must be one of CIFAR10, ImageFolder, Digits, got None"),
        ({"data": "Popen"}, "must be one of CIFAR10, ImageFolder, Digits, got Popen"),
        ({"data": "Digits", "colour": 1}, "do not fit Digits"),
    ],
)
def test_checkpoint_of_other_data_is_an_error(arguments, message):
    with pytest.raises(UserError, match=message):
        data_module_from_checkpoint({"datamodule_hyper_parameters": arguments})


class TestDecodedOnce:
    @pytest.fixture(autouse=True)
    def counted(self, tmp_path, monkeypatch):
        """The files that were decoded."""
        monkeypatch.setenv("TRITONNN_CACHE_DIR", str(tmp_path / "cache"))
        decoded = []
        monkeypatch.setattr("lit_modules.data.read_image", lambda path: decoded.append(path) or read_image(path))
        return decoded

    @staticmethod
    def labels_and_images(folder, size=32):
        data = ImageFolder(str(folder), 100, size, num_workers=0)
        data.prepare_data()
        data.setup("test")
        ((images, labels),) = data.test_dataloader()
        return images, labels

    def test_and_found_again(self, folder, counted):
        first = self.labels_and_images(folder)
        data = ImageFolder(str(folder), num_workers=0)
        data.setup("test")
        assert len([path for path in counted if "/test/" in path]) == 6
        assert all(map(torch.equal, first, self.labels_and_images(folder)))
        assert not list(folder.parent.rglob("*.part"))

    @pytest.mark.parametrize(
        "change",
        [
            lambda file: Image.new("RGB", (40, 50), (1, 2, 3)).save(file),
            lambda file: file.unlink(),
            lambda file: file.rename(file.with_name("z.png")),
            lambda file: shutil.copy(file, file.with_name("new.png")),
            lambda file: file.rename(file.parents[1] / "cat" / "new.png"),
        ],
        ids=["other pixels", "removed", "renamed", "added", "another class"],
    )
    def test_and_again_where_a_file_has_changed(self, folder, counted, change):
        self.labels_and_images(folder)
        change(folder / "test" / "dog" / "1.png")
        again = self.labels_and_images(folder)
        shutil.rmtree(folder.parent / "cache")
        assert all(map(torch.equal, again, self.labels_and_images(folder)))

    def test_another_size_is_another_file(self, folder, counted):
        self.labels_and_images(folder), self.labels_and_images(folder, size=16)
        before = len(counted)
        self.labels_and_images(folder), self.labels_and_images(folder, size=16)
        assert len(counted) == before

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", None])
    def test_a_file_that_cannot_be_read_is_made_anew(self, folder, counted, content):
        images, _ = self.labels_and_images(folder)
        for path in (folder.parent / "cache").rglob("*.pt"):
            path.write_bytes(path.read_bytes()[:900] if content is None else content)
        before = len(counted)
        assert torch.equal(self.labels_and_images(folder)[0], images) and len(counted) > before
        before = len(counted)
        assert torch.equal(self.labels_and_images(folder)[0], images) and len(counted) == before

    def test_without_a_folder_to_write_to_nothing_is_kept(self, folder, monkeypatch):
        (folder.parent / "file").write_text("no folder")
        monkeypatch.setenv("TRITONNN_CACHE_DIR", str(folder.parent / "file"))
        assert len(self.labels_and_images(folder)[0]) == 6


@pytest.mark.parametrize("world, batch_size, message", [(2, 5, "5 cannot be shared out among 2 devices")])
def test_a_batch_is_shared_out_evenly(world, batch_size, message, monkeypatch):
    data = Digits(batch_size, num_workers=0)
    data.setup("fit")
    monkeypatch.setattr(data, "_world_size", lambda: world)
    with pytest.raises(UserError, match=message):
        data.train_dataloader()
