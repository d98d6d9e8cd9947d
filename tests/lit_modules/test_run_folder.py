"""Folders that runs claim: one each, also where several start at once, and none that is left empty."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lit_modules.run_folder import claimed


def test_the_next_number_is_free_in_all_folders(tmp_path):
    (tmp_path / "logs/version_3").mkdir(parents=True)
    (tmp_path / "checkpoints/version_1").mkdir(parents=True)
    (tmp_path / "logs/version_old").mkdir()
    with claimed(tmp_path / "checkpoints", "version_", tmp_path / "logs") as (folder, number):
        assert number == 4 and folder == tmp_path / "checkpoints/version_4" and folder.is_dir()


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path):
    with ExitStack() as stack, ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(lambda _: stack.enter_context(claimed(tmp_path, "version_")), range(16)))
        assert sorted(number for _, number in runs) == list(range(16))


def test_a_folder_that_stays_empty_goes_with_those_that_were_made_for_it(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "a/b", "version_"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_written_to_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "a", "version_") as (folder, _):
        (folder / "file").touch()
        raise ZeroDivisionError
    assert (tmp_path / "a/version_0/file").exists()


def test_other_processes_make_none(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with claimed(tmp_path, "version_") as (folder, _):
        assert not folder.exists()


def test_a_parent_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(OSError), claimed(tmp_path / "taken", "version_"):
        pass
