"""Finding and loading checkpoints: each thing that may be wrong gives one clear line and leaves the file alone."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from lit_modules.checkpoint import best_of, load, load_classifier, newest_run, weights_digest
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


def write(path: Path, age: int = 0, best: str | None = None) -> Path:
    """A checkpoint so many seconds old, or an empty file unless it names the best."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"BestCheckpoint{'monitor': 'val/top1'}": {"best_model_path": best}}
    torch.save(contents() | {"callbacks": state}, path) if best else path.touch()
    os.utime(path, (1000 - age, 1000 - age))
    return path


def test_the_newest_run_is_the_one_that_was_written_to_last(tmp_path):
    write(tmp_path / "digits/version_0/last.ckpt", age=1)
    write(tmp_path / "digits/version_1/best-07.ckpt", age=2)
    write(tmp_path / "cifar10/version_4/best.ckpt", age=3)
    assert newest_run(tmp_path) == tmp_path / "digits/version_0"


@pytest.mark.parametrize("folder", ["", "absent"])
def test_no_checkpoint_yet_names_train_py(tmp_path, folder):
    with pytest.raises(UserError, match="no checkpoint below .* run train.py first"):
        newest_run(tmp_path / folder)


class TestBestOfARun:
    def test_the_only_scored_one_though_the_last_is_newer(self, tmp_path):
        best = write(tmp_path / "best-00-0.5.ckpt", age=9)
        write(tmp_path / "last.ckpt")
        assert best_of(tmp_path) == best

    def test_of_several_the_one_that_the_newest_names(self, tmp_path):
        for age, name in enumerate(["best-02-0.7.ckpt", "best-01-0.9.ckpt", "best-00-0.8.ckpt"]):
            write(tmp_path / name, age, best="/elsewhere/best-01-0.9.ckpt")  # the folder may have been moved
        assert best_of(tmp_path) == tmp_path / "best-01-0.9.ckpt"

    def test_of_several_the_newest_where_none_is_named(self, tmp_path):
        write(tmp_path / "a.ckpt", age=1)
        newest = write(tmp_path / "b.ckpt", best="deleted.ckpt")
        assert best_of(tmp_path) == newest

    def test_the_last_where_none_was_scored(self, tmp_path):
        last = write(tmp_path / "last.ckpt")
        assert best_of(tmp_path) == last

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match="has no checkpoint"):
            best_of(tmp_path)


class TestDigest:
    WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}

    def test_the_same_in_any_order_and_layout(self):
        again = {"b": torch.tensor(3), "a": torch.arange(6.0).reshape(2, 3).t().contiguous().t()}
        assert weights_digest(again) == weights_digest(self.WEIGHTS)
        assert len(weights_digest(self.WEIGHTS)) == 16

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param({"b": torch.tensor(4)}, id="value"),
            pytest.param({"b": torch.tensor(3, dtype=torch.int32)}, id="type"),
            pytest.param({"a": torch.arange(6.0).reshape(3, 2)}, id="shape"),
            pytest.param({"c": torch.tensor(3)}, id="name"),
        ],
    )
    def test_another_for_other_weights(self, change):
        assert weights_digest(self.WEIGHTS | change) != weights_digest(self.WEIGHTS)


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
