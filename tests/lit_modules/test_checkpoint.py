"""Finding and loading checkpoints: each thing that may be wrong gives one clear line and leaves the file alone."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from lit_modules.checkpoint import load, load_classifier, newest_best
from lit_modules.classifier import ImageClassifier
from lit_modules.command_line import UserError

HYPER_PARAMETERS = {"width": 2, "num_classes": 3}


def contents() -> dict:
    return {
        "state_dict": ImageClassifier(**HYPER_PARAMETERS).state_dict(),
        "hyper_parameters": HYPER_PARAMETERS,
        "pytorch-lightning_version": "2.6.0",
    }


class Intruder:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "best.ckpt"
    torch.save(contents(), path)
    return path


def test_the_newest_best_is_found_below_all_folders(tmp_path):
    for age, name in enumerate(["digits/best-07.ckpt", "cifar10/best.ckpt", "cifar10/deep/best-v1.ckpt"]):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "digits/last.ckpt").touch()
    assert newest_best(tmp_path) == tmp_path / "digits/best-07.ckpt"


@pytest.mark.parametrize("folder", ["", "absent"])
def test_no_checkpoint_yet_names_train_py(tmp_path, folder):
    with pytest.raises(UserError, match="no checkpoint below .* run train.py first"):
        newest_best(tmp_path / folder)


def test_a_classifier_comes_back_with_its_weights(path):
    classifier, checkpoint = load_classifier(path)
    assert classifier.hparams.width == 2
    for name, tensor in checkpoint["state_dict"].items():
        assert torch.equal(classifier.state_dict()[name], tensor)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_weight_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)


def other_keys(path: Path) -> None:
    torch.save(contents() | {"state_dict": torch.nn.Linear(2, 2).state_dict()}, path)


def other_width(path: Path) -> None:
    torch.save(contents() | {"hyper_parameters": HYPER_PARAMETERS | {"width": 4}}, path)


def other_hyper_parameters(path: Path) -> None:
    torch.save(contents() | {"hyper_parameters": HYPER_PARAMETERS | {"stem": "transformer"}}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(truncate, "damaged or truncated", id="truncated"),
        pytest.param(change_a_weight_byte, "damaged or truncated", id="damaged"),
        pytest.param(lambda path: path.write_bytes(b""), "is not a checkpoint", id="empty"),
        pytest.param(lambda path: path.write_text("epoch,top1\n"), "is not a checkpoint", id="text"),
        pytest.param(lambda path: torch.save(torch.ones(3), path), "not a checkpoint of train.py", id="tensor"),
        pytest.param(
            lambda path: torch.save(contents()["state_dict"], path), "not a checkpoint of train.py", id="weights"
        ),
        pytest.param(lambda path: torch.save({1: 2}, path), "not a checkpoint of train.py", id="dictionary"),
        pytest.param(other_keys, "of another architecture", id="other keys"),
        pytest.param(other_width, "of another architecture", id="other width"),
        pytest.param(other_hyper_parameters, "of another architecture", id="other hyperparameters"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), "there is no checkpoint", id="folder"),
        pytest.param(lambda path: path.unlink(), "there is no checkpoint", id="absent"),
    ],
)
def test_what_is_wrong_is_said(path, spoil, message):
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError, match=message) as error:
        load_classifier(path)
    assert str(path) in str(error.value)
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "plain pickle"])
def test_pickled_code_is_not_run(path, tmp_path, archive):
    marker = tmp_path / "intruded"
    if archive:
        torch.save(contents() | {"callbacks": Intruder(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Intruder(marker)))
    with pytest.raises(UserError, match="pickled code"):
        load(path)
    assert not marker.exists()


def test_objects_among_the_hyperparameters_are_not_loaded(path):
    torch.save(contents() | {"hyper_parameters": {"stem": Path("cifar")}}, path)
    with pytest.raises(UserError, match="pickled code or objects"):
        load(path)
