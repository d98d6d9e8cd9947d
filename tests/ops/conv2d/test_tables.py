"""Tables of tuned choices: where they are kept, what of them can be used, and that launches follow them."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
import triton
from helpers.compare import image
from helpers.halo_tiles import HALF_64, HALF_128
from helpers.problems import COPIED, HALF, POINTERS, SLICED, problem, sliced_k
from torch import nn

import tritonnn
from tritonnn.ops.conv2d import dispatch, op, tables
from tritonnn.ops.conv2d.forms.few_channels import FewChannelsConfig
from tritonnn.ops.conv2d.forms.in_registers import InRegistersConfig
from tritonnn.ops.conv2d.forms.tma_tiles import config_of
from tritonnn.ops.conv2d.problem import Choice
from tritonnn.ops.conv2d.tables import Entry
from tritonnn.tuning.tune import find_problems

pytestmark = pytest.mark.usefixtures("tables_folder")
in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


FEW_CHANNELS = FewChannelsConfig(BLOCK_M=128, BLOCK_N=64, num_warps=4, num_stages=3)
IN_REGISTERS = InRegistersConfig(BLOCK_N=16, BLOCK_K=64, num_warps=8)
TMA = config_of((1, 8, 16), 128, 64, swap_ab=True, num_warps=4, num_stages=4)
SPLIT_TMA = dataclasses.replace(TMA, SPLITS=3)


def test_a_choice_in_words():
    words = "tma_halo 1x8x32x64x64, 4 warps, 2 + 4 slots, 2 a multiprocessor, staged in a slot, x copied"
    assert str(Choice(HALF_64, True)) == words
    assert str(SLICED) == "sliced_k 1x4x16x16x32, 4 warps, 1 stages"
    assert str(Choice(FEW_CHANNELS)) == "few_channels 128x64, 4 warps, 3 stages"
    assert str(Choice(TMA)) == "tma 1x8x16x128x64, 4 warps, 4 stages, operands swapped"
    assert str(Choice(SPLIT_TMA)) == "tma 1x8x16x128x64, 4 warps, 4 stages, operands swapped, 3 splits"


SHIPPED = Path(tritonnn.__file__).parent / "tables"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_can_be_used(path):
    entries = tables.read(path)
    assert len(entries) == len(json.loads(path.read_text())["choices"]) > 0
    assert all(entry.us <= entry.default_us for entry in entries.values())


SLICED_ENTRY, COPIED_ENTRY = Entry(SLICED, 5.0, 9.0), Entry(COPIED, 7.25, 8.0)
OTHER = problem(**HALF, n=4, epilogue=("bias", "relu"))


class TestTables:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "new folder" / "table.json"
        choices = [
            SLICED,
            COPIED,
            Choice(TMA),
            Choice(SPLIT_TMA),
            Choice(HALF_64, True),
            Choice(FEW_CHANNELS),
            Choice(IN_REGISTERS),
        ]
        entries = {problem(n=n): Entry(choice, 1.0, 2.0) for n, choice in enumerate(choices)}
        tables.add(path, entries)
        assert tables.read(path) == entries
        assert [file.name for file in path.parent.iterdir()] == ["table.json"]

    def test_what_is_there_stays(self, tmp_path):
        path = tmp_path / "table.json"
        tables.add(path, {problem(): SLICED_ENTRY, OTHER: SLICED_ENTRY})
        tables.add(path, {OTHER: COPIED_ENTRY})
        assert tables.read(path) == {problem(): SLICED_ENTRY, OTHER: COPIED_ENTRY}

    def test_a_write_that_fails_leaves_the_table(self, tmp_path, monkeypatch):
        path = tmp_path / "table.json"
        tables.add(path, {problem(): SLICED_ENTRY})

        def full(*_):
            raise OSError("no space left")

        monkeypatch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space"):
            tables.add(path, {OTHER: COPIED_ENTRY})
        assert tables.read(path) == {problem(): SLICED_ENTRY}
        assert [file.name for file in tmp_path.iterdir()] == ["table.json"]

    @pytest.mark.parametrize(
        "change",
        {
            "unknown form": lambda row: row.update(form="spiral"),
            "form of another configuration": lambda row: row.update(form="tma_halo"),
            "missing block size": lambda row: row["config"].pop("BLOCK_K"),
            "block size of another version": lambda row: row["config"].update(BLOCK_X=4),
            "no power of 2": lambda row: row["config"].update(BLOCK_M=24),
            "no number": lambda row: row["config"].update(BLOCK_M="16"),
            "no stages": lambda row: row["config"].update(num_stages=0),
            "missing field": lambda row: row["problem"].pop("groups"),
            "field of another version": lambda row: row["problem"].update(halo=True),
            "unknown type": lambda row: row["problem"].update(dtype="bfloat15"),
            "no time": lambda row: row.update(us=None),
            "copies_x": lambda row: row.update(copies_x=None),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_stale_entries_are_ignored(self, change, tmp_path):
        path = tmp_path / "table.json"
        tables.add(path, {problem(): SLICED_ENTRY, OTHER: COPIED_ENTRY})
        table = json.loads(path.read_text())
        change[1](table["choices"][0])
        path.write_text(json.dumps(table))
        assert tables.read(path) == {OTHER: COPIED_ENTRY}

    @pytest.mark.parametrize("change", [dict(TILE_P=12), dict(STAGED=1), dict(W_SLOTS=99), dict(PROGRAMS=0)], ids=str)
    def test_tiles_with_a_halo_that_are_ignored(self, change, tmp_path):
        path, config = tmp_path / "table.json", dataclasses.replace(HALF_128, **change)
        tables.add(path, {problem(): Entry(Choice(config), 1.0, 2.0)})
        assert tables.read(path) == {}

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"choices": 3}', '{"choices": {}, "a'], ids=repr)
    def test_a_corrupt_file_is_ignored_with_one_warning(self, text, tmp_path):
        path = tmp_path / "table.json"
        path.write_text(text)
        with pytest.warns(UserWarning, match="table.json is ignored") as caught:
            assert tables.read(path) == {}
        assert len(caught) == 1 and "\n" not in str(caught[0].message)

    def test_no_file_is_no_news(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tables.read(tmp_path / "table.json") == {}

    def test_a_file_for_each_gpu_and_triton_version(self, monkeypatch):
        monkeypatch.setattr(triton, "__version__", "3.6.0")
        assert tables.file_name("NVIDIA H200") == "nvidia-h200-triton-3.6.0.json"
        assert tables.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3-triton-3.6.0.json"
        monkeypatch.setattr(triton, "__version__", "3.7.1")
        assert tables.file_name("NVIDIA H200") == "nvidia-h200-triton-3.7.1.json"

    def test_folder(self, monkeypatch):
        assert tables.cache_folder().name == "cache"
        monkeypatch.delenv("TRITONNN_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
        assert tables.cache_folder() == Path("/elsewhere/tritonnn")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert tables.cache_folder() == Path.home() / ".cache/tritonnn"

    def test_the_table_of_a_gpu_with_the_same_chip_comes_last(self, tables_folder, monkeypatch):
        (ours, theirs), *_ = tables.SAME_CHIP.items()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: [ours, theirs][device])
        folder = tables.SHIPPED
        tables.add(folder / tables.file_name(ours), {OTHER: SLICED_ENTRY})
        tables.add(folder / tables.file_name(theirs), {problem(): SLICED_ENTRY, OTHER: COPIED_ENTRY})
        tables.add(tables_folder / tables.file_name(theirs), {problem(n=7): SLICED_ENTRY})  # the user's
        assert tables.tuned_choices(0) == {problem(): SLICED, OTHER: SLICED}
        assert tables.tuned_choices(0).maps[0] == {OTHER: SLICED}
        assert tables.tuned_choices(1) == {problem(): SLICED, OTHER: COPIED, problem(n=7): SLICED}

    def test_a_table_of_another_version_of_triton_comes_last(self, tables_folder, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        shipped, users = tables.SHIPPED, tables_folder
        tables.add(shipped / tables.file_name("GPU", "3.0.0"), {problem(): SLICED_ENTRY, OTHER: SLICED_ENTRY})
        tables.add(users / tables.file_name("GPU"), {OTHER: COPIED_ENTRY})
        tables.add(users / tables.file_name("GPU", "3.0.0"), {problem(n=7): SLICED_ENTRY})  # the user can tune again
        assert tables.tuned_choices(0) == {problem(): SLICED, OTHER: COPIED}

    def test_the_users_table_precedes_the_shipped_one(self, tables_folder, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
        name = tables.file_name("GPU 0")
        tables.add(tables.SHIPPED / name, {problem(): SLICED_ENTRY, OTHER: SLICED_ENTRY})
        tables.add(tables_folder / name, {OTHER: COPIED_ENTRY})
        assert tables.tuned_choices(0) == {problem(): SLICED, OTHER: COPIED}
        assert tables.tuned_choices(1) == {} == tables.tuned_choices(-1)

    def test_choices_change_only_when_they_are_forgotten(self, tables_folder, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        assert tables.tuned_choices(0) == {}
        tables.add(tables_folder / tables.file_name("GPU"), {problem(): SLICED_ENTRY})
        assert tables.tuned_choices(0) == {}
        tables.forget()
        assert tables.tuned_choices(0) == {problem(): SLICED}

    def test_tables_of_earlier_versions_are_read(self):
        """Forms and sizes had other names in it."""
        path = Path(__file__).with_name("table_of_an_earlier_version.json")
        entries = tables.read(path)
        assert [entry.choice for entry in entries.values()] == [
            Choice(IN_REGISTERS),
            SLICED,
            Choice(FEW_CHANNELS),
            Choice(HALF_64, copies_x=True),
            Choice(TMA),
            COPIED,
        ]
        assert [p.n for p in entries] == [1, 2, 3, 4, 5, 6]

    def test_they_are_written_with_the_names_of_now(self, tmp_path):
        entries = tables.read(Path(__file__).with_name("table_of_an_earlier_version.json"))
        tables.add(tmp_path / "table.json", entries)
        assert tables.read(tmp_path / "table.json") == entries
        written = (tmp_path / "table.json").read_text()
        assert not [name for name in (*tables.FORMER_NAMES, "blocks") if f'"{name}"' in written]


@in_the_interpreter
class TestLaunches:
    """A table for CPU tensors stands for a GPU's."""

    @pytest.fixture
    def ran(self, monkeypatch) -> list[Choice]:
        ran = []

        def run(product, choice):
            ran.append(choice)
            right(product, choice)

        right = dispatch.run
        for caller in (dispatch, op):
            monkeypatch.setattr(caller, "run", run)
        return ran

    @pytest.mark.parametrize("choice", [SLICED, POINTERS, COPIED], ids=str)
    @pytest.mark.parametrize("fused", [False, True], ids=["swapped", "fused"])
    def test_they_follow_the_table(self, choice, fused, ran):
        layer, x = nn.Conv2d(64, 32, 3, padding=1).eval(), image(2, 64, 8, 8, channels_last=True)
        network = tritonnn.fuse(layer) if fused else layer
        (found,) = find_problems(network, (x,))
        assert found == problem(epilogue=("bias",))
        tables.tuned_choices(-1)[found] = choice
        with torch.no_grad(), tritonnn.swapped(layer):
            y = network(x)
        assert ran[-1] == choice
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "choice",
        {
            "TMA without a GPU": Choice(TMA),
            "blocks that do not divide C": Choice(sliced_k(1, 4, 16, 16, 128)),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_they_ignore_what_cannot_run(self, choice, ran):
        tables.tuned_choices(-1)[problem(epilogue=("bias",))] = choice[1]
        layer, x = nn.Conv2d(64, 32, 3, padding=1), image(2, 64, 8, 8, channels_last=True)
        with torch.no_grad(), tritonnn.swapped(layer):
            layer(x)
        assert len(ran) == 1 and ran[0] != choice[1] and ran[0].config.form == "pointers"

    def test_a_problem_is_the_whole_key(self, ran):
        tables.tuned_choices(-1)[problem(n=3, epilogue=("bias",))] = SLICED
        layer, x = nn.Conv2d(64, 32, 3, padding=1), image(2, 64, 8, 8, channels_last=True)
        with torch.no_grad(), tritonnn.swapped(layer):
            layer(x)
        assert ran[0] != SLICED
