"""Tables of tuned choices: where they are kept, what of them can be used, and that launches follow them."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import triton
from helpers.compare import image
from helpers.problems import COPIED, HALF, POINTERS, SPLIT, problem
from torch import nn
from tritonnn.kernels import conv2d, tuned_blocks
from tritonnn.kernels.block_sizes import DescriptorBlocks, GemmBlocks, HaloBlocks, RowBlocks, SplitBlocks
from tritonnn.kernels.product import FORMS, Choice
from tritonnn.kernels.tuned_blocks import Entry
from tritonnn.trial import operands

import tritonnn
from tritonnn.tuning import find_problems

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("tables")
in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


def test_blocks_of_two_forms_are_never_equal():
    """Choices are keys, and equal tuples the same one."""
    assert len({len(blocks._fields) for blocks in FORMS.values()}) == len(FORMS)


def test_a_choice_in_words():
    tiles = HaloBlocks(1, 8, 32, 64, 64, 2, 4, True, True, 4, 2)
    words = "halo 1x8x32x64x64, 4 warps, 2 + 4 slots, 2 a multiprocessor, staged in a slot, x copied"
    assert str(Choice(tiles, True)) == words
    assert str(SPLIT) == "split 1x4x16x16x32, 4 warps, 1 stages"
    assert str(Choice(RowBlocks(128, 64, 4, 3), False)) == "rows 128x64, 4 warps, 3 stages"


SHIPPED = Path(tritonnn.__file__).parent / "tables"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_can_be_used(path):
    entries = tuned_blocks.read(path)
    assert len(entries) == len(json.loads(path.read_text())["choices"]) > 0
    assert all(entry.us <= entry.default_us for entry in entries.values())


SPLIT_ENTRY, POINTERS_ENTRY = Entry(SPLIT, 5.0, 9.0), Entry(COPIED, 7.25, 8.0)
OTHER = problem(**HALF, n=4, epilogue=("bias", "relu"))


class TestTables:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "new folder" / "table.json"
        swapped = Entry(Choice(DescriptorBlocks(1, 4, 16, 128, 64, True, 8, 3), False), 1.0, 2.0)
        halo = Entry(Choice(HaloBlocks(4, 8, 8, 128, 64, 2, 5, True, False, 8, 1), True), 1.0, 2.0)
        rows = Entry(Choice(RowBlocks(128, 64, 4, 3), False), 1.0, 2.0)
        entries = {problem(): SPLIT_ENTRY, OTHER: POINTERS_ENTRY, problem(n=7): swapped, problem(n=8): halo}
        entries[problem(c=3, taps=7)] = rows
        tuned_blocks.add(path, entries)
        assert tuned_blocks.read(path) == entries
        assert [file.name for file in path.parent.iterdir()] == ["table.json"]

    def test_what_is_there_stays(self, tmp_path):
        path = tmp_path / "table.json"
        tuned_blocks.add(path, {problem(): SPLIT_ENTRY, OTHER: SPLIT_ENTRY})
        tuned_blocks.add(path, {OTHER: POINTERS_ENTRY})
        assert tuned_blocks.read(path) == {problem(): SPLIT_ENTRY, OTHER: POINTERS_ENTRY}

    def test_a_write_that_fails_leaves_the_table(self, tmp_path, monkeypatch):
        path = tmp_path / "table.json"
        tuned_blocks.add(path, {problem(): SPLIT_ENTRY})

        def full(*_):
            raise OSError("no space left")

        monkeypatch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space"):
            tuned_blocks.add(path, {OTHER: POINTERS_ENTRY})
        assert tuned_blocks.read(path) == {problem(): SPLIT_ENTRY}
        assert [file.name for file in tmp_path.iterdir()] == ["table.json"]

    @pytest.mark.parametrize(
        "change",
        {
            "unknown form": lambda row: row.update(form="spiral"),
            "form of other blocks": lambda row: row.update(form="halo"),
            "missing block size": lambda row: row["blocks"].pop("BLOCK_K"),
            "block size of another version": lambda row: row["blocks"].update(BLOCK_X=4),
            "no power of 2": lambda row: row["blocks"].update(BLOCK_M=24),
            "no number": lambda row: row["blocks"].update(BLOCK_M="16"),
            "no stages": lambda row: row["blocks"].update(num_stages=0),
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
        tuned_blocks.add(path, {problem(): SPLIT_ENTRY, OTHER: POINTERS_ENTRY})
        table = json.loads(path.read_text())
        change[1](table["choices"][0])
        path.write_text(json.dumps(table))
        assert tuned_blocks.read(path) == {OTHER: POINTERS_ENTRY}

    @pytest.mark.parametrize("change", [dict(TILE_P=12), dict(STAGED=1), dict(W_SLOTS=99), dict(PROGRAMS=0)], ids=str)
    def test_tiles_with_a_halo_that_are_ignored(self, change, tmp_path):
        path, blocks = tmp_path / "table.json", HaloBlocks(1, 16, 16, 128, 64, 3, 3, True, False, 8, 1)
        tuned_blocks.add(path, {problem(): Entry(Choice(blocks._replace(**change), False), 1.0, 2.0)})
        assert tuned_blocks.read(path) == {}

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"choices": 3}', '{"choices": {}, "a'], ids=repr)
    def test_a_corrupt_file_is_ignored_with_one_warning(self, text, tmp_path):
        path = tmp_path / "table.json"
        path.write_text(text)
        with pytest.warns(UserWarning, match="table.json is ignored") as caught:
            assert tuned_blocks.read(path) == {}
        assert len(caught) == 1 and "\n" not in str(caught[0].message)

    def test_no_file_is_no_news(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tuned_blocks.read(tmp_path / "table.json") == {}

    def test_a_file_for_each_gpu_and_triton_version(self, monkeypatch):
        monkeypatch.setattr(triton, "__version__", "3.6.0")
        assert tuned_blocks.file_name("NVIDIA H200") == "nvidia-h200-triton-3.6.0.json"
        assert tuned_blocks.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3-triton-3.6.0.json"
        monkeypatch.setattr(triton, "__version__", "3.7.1")
        assert tuned_blocks.file_name("NVIDIA H200") == "nvidia-h200-triton-3.7.1.json"

    def test_folder(self, monkeypatch):
        assert tuned_blocks.cache_folder().name == "cache"
        monkeypatch.delenv("TRITONNN_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
        assert tuned_blocks.cache_folder() == Path("/elsewhere/tritonnn")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert tuned_blocks.cache_folder() == Path.home() / ".cache/tritonnn"

    def test_the_table_of_a_gpu_with_the_same_chip_comes_last(self, tables, monkeypatch):
        (ours, theirs), *_ = tuned_blocks.SAME_CHIP.items()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: [ours, theirs][device])
        folder = tuned_blocks.SHIPPED
        tuned_blocks.add(folder / tuned_blocks.file_name(ours), {OTHER: SPLIT_ENTRY})
        tuned_blocks.add(folder / tuned_blocks.file_name(theirs), {problem(): SPLIT_ENTRY, OTHER: POINTERS_ENTRY})
        tuned_blocks.add(tables / tuned_blocks.file_name(theirs), {problem(n=7): SPLIT_ENTRY})  # the user's
        assert tuned_blocks.tuned_choices(0) == {problem(): SPLIT, OTHER: SPLIT}
        assert tuned_blocks.tuned_choices(0).maps[0] == {OTHER: SPLIT}
        assert tuned_blocks.tuned_choices(1) == {problem(): SPLIT, OTHER: COPIED, problem(n=7): SPLIT}

    def test_the_users_table_precedes_the_shipped_one(self, tables, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
        name = tuned_blocks.file_name("GPU 0")
        tuned_blocks.add(tuned_blocks.SHIPPED / name, {problem(): SPLIT_ENTRY, OTHER: SPLIT_ENTRY})
        tuned_blocks.add(tables / name, {OTHER: POINTERS_ENTRY})
        assert tuned_blocks.tuned_choices(0) == {problem(): SPLIT, OTHER: COPIED}
        assert tuned_blocks.tuned_choices(1) == {} == tuned_blocks.tuned_choices(-1)

    def test_choices_change_with_the_generation_only(self, tables, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        generation = tuned_blocks.generation
        assert tuned_blocks.tuned_choices(0) == {}
        tuned_blocks.add(tables / tuned_blocks.file_name("GPU"), {problem(): SPLIT_ENTRY})
        assert tuned_blocks.tuned_choices(0) == {} and tuned_blocks.generation == generation
        tuned_blocks.forget()
        assert tuned_blocks.tuned_choices(0) == {problem(): SPLIT} and tuned_blocks.generation > generation


@in_the_interpreter
class TestLaunches:
    """A table for CPU tensors stands for a GPU's."""

    @pytest.fixture
    def ran(self, monkeypatch) -> list[Choice]:
        ran = []

        def run(product, choice):
            ran.append(choice)
            right(product, choice)

        right = conv2d.run_gemm
        monkeypatch.setattr(conv2d, "run_gemm", run)
        return ran

    @pytest.mark.parametrize("choice", [SPLIT, POINTERS, COPIED], ids=str)
    @pytest.mark.parametrize("fused", [False, True], ids=["swapped", "fused"])
    def test_they_follow_the_table(self, choice, fused, ran):
        layer, x = nn.Conv2d(64, 32, 3, padding=1).eval(), image(2, 64, 8, 8, channels_last=True)
        network = tritonnn.fuse(layer) if fused else layer
        (found,) = find_problems(network, (x,))
        assert found == problem(epilogue=("bias",))
        tuned_blocks._tables[-1] = {found: choice}
        with torch.no_grad(), tritonnn.swapped(layer):
            y = network(x)
        assert ran[-1] == choice
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "choice",
        {
            "descriptors without a GPU": Choice(DescriptorBlocks(1, 4, 16, 32, 32, True, 4, 3), False),
            "blocks that do not divide C": Choice(SplitBlocks(1, 4, 16, 16, 128, 4, 3), False),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_they_ignore_what_cannot_run(self, choice, ran):
        tuned_blocks._tables[-1] = {problem(epilogue=("bias",)): choice[1]}
        layer, x = nn.Conv2d(64, 32, 3, padding=1), image(2, 64, 8, 8, channels_last=True)
        with torch.no_grad(), tritonnn.swapped(layer):
            layer(x)
        assert len(ran) == 1 and ran[0] != choice[1] and isinstance(ran[0].blocks, GemmBlocks)

    def test_descriptors_want_aligned_channels_last_operands(self, monkeypatch):
        monkeypatch.setattr(conv2d, "fits_descriptors", lambda *_: True)
        product, _ = operands(problem(**HALF, epilogue=("residual",)), CPU)
        direct = Choice(DescriptorBlocks(1, 4, 16, 32, 64, True, 4, 3), False)
        copied = direct._replace(copies_x=True)
        assert conv2d.can_run(product, direct) and conv2d.can_run(product, copied)
        nchw = product._replace(x=product.x.contiguous())
        assert not conv2d.can_run(nchw, direct) and conv2d.can_run(nchw, copied)
        residual = torch.empty(product.y.numel() + 1, dtype=torch.bfloat16)[1:].view_as(product.y)
        assert not conv2d.can_run(product._replace(epilogue=product.epilogue._replace(residual=residual)), direct)
        assert not conv2d.can_run(product, direct._replace(blocks=direct.blocks._replace(SWAPPED=False)))

    def test_a_problem_is_the_whole_key(self, ran):
        tuned_blocks._tables[-1] = {problem(n=3, epilogue=("bias",)): SPLIT}
        layer, x = nn.Conv2d(64, 32, 3, padding=1), image(2, 64, 8, 8, channels_last=True)
        with torch.no_grad(), tritonnn.swapped(layer):
            layer(x)
        assert ran[0] != SPLIT
