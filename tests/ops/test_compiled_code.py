"""What the compiler makes of the kernels for a Hopper GPU, read from the PTX: no GPU is needed to compile.

Two things once went wrong here that the interpreter does not show. With the image's size a constexpr, LLVM computed the
coordinates of pixels in pairs of 16-bit integers, and masks were wrong on an H200. With annotated strides, Triton no
longer saw that one of them is 1, and every load took one element: ten times slower.
"""

import math
import re
import subprocess

import pytest
import triton
from helpers.hopper import assembled, disassembler, run
from helpers.kernels import KERNELS

from tritonnn.device.layouts import LANES_ALONG_LAST

OF_FEW_CHANNELS = [name for name in KERNELS if "conv2d, few channels" in name]
OF_3_CHANNELS = [name for name in KERNELS if "conv2d, 3 channels" in name]
ON_TENSOR_CORES = ["conv2d, bfloat16", "conv2d, TF32", "conv2d, float32", "conv2d, 3 channels", *OF_FEW_CHANNELS]
ON_TENSOR_CORES += ["gradient of the weight", "gradient of the weight, tiles of several taps"]
ON_TENSOR_CORES += ["gradient of the weight, float32"]
SPLIT_OPERANDS = [
    "conv2d, float32",
    "conv2d, few channels, float32",
    "conv2d, sliced-K, float32",
    "conv2d, TMA, float32",
]
SPLIT_OPERANDS += ["gradient of the weight, float32"]
BY_TAPS = [name for name in KERNELS if "conv2d, TMA" in name]
COMPUTED_OPERANDS = ["conv2d, TF32", "conv2d, float32", "conv2d, few channels, float32", *BY_TAPS[3:]]
COMPUTED_OPERANDS += ["conv2d, matrix product, float32", "conv2d, matrix product, float32, NCHW"]
COMPUTED_OPERANDS += ["conv2d, matrix product, gates", "conv2d, matrix product, batch norm before"]
COMPUTED_OPERANDS += ["gradient of the weight, halo", "gradient of the weight, halo, strided"]
COMPUTED_OPERANDS += ["gradient of the weight, float32"]
COMPUTED_OPERANDS += ["conv2d, split-K by boxes, TF32, rounded", "conv2d, split-K by boxes, float32"]
"""Kernels that compute or transpose x in registers, from which, or from one place of shared memory, tensor cores read
it."""
WITH_HALO = [name for name in KERNELS if "halo" in name and "gradient" not in name]
PRODUCTS = [name for name in KERNELS if "matrix product" in name]
FROM_SHARED_MEMORY = [name for name in PRODUCTS if not re.search("32|gates|norm", name)]
RESIDENT_KERNELS = [name for name in KERNELS if "in registers" in name]
GRADIENTS_BY_TMA = [name for name in KERNELS if "gradient" in name and "TMA" in name]
GRADIENTS_WITH_HALO = ["gradient of the weight, halo", "gradient of the weight, halo, strided"]
BY_TMA = BY_TAPS + WITH_HALO + PRODUCTS + GRADIENTS_BY_TMA + GRADIENTS_WITH_HALO
SPLIT_K = [name for name in KERNELS if "split-K by boxes" in name]
FEW_PIXELS = ["conv2d, sliced-K", "conv2d, sliced-K, float32", *RESIDENT_KERNELS]
ROUNDS = [
    *[name for name in WITH_HALO if "rounded" in name],
    *[name for name in PRODUCTS if "32" in name],
    "conv2d, TF32",
    "conv2d, float32",
    "conv2d, in registers, float32",
    "conv2d, few channels, float32",
    "conv2d, sliced-K, float32",
    "gradient of the weight, float32",
    "padded rows",
    *BY_TAPS[3:],
]
WIDE_FILTERS = {"conv2d, depthwise, 5x5": 168, "conv2d, depthwise, 5x5, strided": 232, "conv2d, depthwise, 7x7": 224}
"""Depthwise kernels whose threads take 8 bytes of channels, and the most registers of a thread that leave a
multiprocessor as many programs as when all columns were unrolled."""
GATHERS = [
    "conv2d, 1x1, stride 2, contiguous",
    *OF_3_CHANNELS,
    "max_pool2d, contiguous",
    "avg_pool2d, contiguous",
    "channels_last",
    "padded rows",
]
GATHERS += ["conv2d, depthwise, contiguous", "conv2d, direct, contiguous", *WIDE_FILTERS]
"""Kernels that read neighbouring pixels, one by one."""
REDUCTIONS = ["batch_norm2d, statistics", "batch_norm2d, statistics, contiguous", "gradient of batch_norm2d, sums"]
REDUCTIONS += ["gradient of batch_norm2d, sums, contiguous"]
FEW_OUTPUTS = [
    "conv2d, float32, one filter",
    "avg_pool2d, whole images",
    "avg_pool2d, whole images, contiguous",
    "conv2d, depthwise, contiguous",
    "conv2d, direct, contiguous",
    *REDUCTIONS,
    *WIDE_FILTERS,
]
"""Kernels of which a thread has one output, a column of them, or 8 bytes of a column's channels."""


@pytest.fixture(scope="module")
def code() -> dict[str, dict]:
    """By the name of the kernel, compiled in a process without the interpreter."""
    return run("tests/helpers/kernels.py")


@pytest.fixture(scope="module")
def ptx(code) -> dict[str, str]:
    return {name: of["ptx"] for name, of in code.items()}


@pytest.mark.parametrize("name", KERNELS)
def test_no_pairs_of_16_bit_integers(name, ptx):
    assert not re.search(r"\.[su]16x2", ptx[name])


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in BY_TMA + FEW_PIXELS + FEW_OUTPUTS])
def test_stores_take_16_bytes(name, ptx):
    assert re.search(r"st\.global\.v4\.b32", ptx[name])


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in GATHERS + BY_TMA])
def test_loads_take_16_bytes(name, ptx):
    assert re.search(r"ld\.global(\.cg)?\.v4\.b32|cp\.async\.cg\.shared\.global", ptx[name])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_lanes_add_up_their_pixels_alone(name, ptx):
    """In the loop no thread waits for another: what is exchanged there costs more than what is loaded."""
    code = ptx[name].partition("ld.global.v4")[2]
    loop = code[: re.search(r"bra\s+\$L__BB", code).start()]
    assert loop.count("ld.global.v4.b32") >= 3 and not re.search(r"shfl|bar\.sync|\.shared", loop)


@pytest.mark.parametrize("name", OF_FEW_CHANNELS)
def test_windows_are_loaded_16_bytes_at_a_time_and_all_fits_the_registers(name, ptx, tmp_path):
    """Both operands: ahead of time into shared memory or, with one stage, through registers. No bias is loaded here."""
    loads = re.findall(r"cp\.async\.c\w\.shared\.global [^;]*?, (0x\d+)|ld\.global[\w.:]*?\.(v\d|b\d+)\b", ptx[name])
    assert {size for pair in loads for size in pair if size} == {"v4" if "one stage" in name else "0x10"}
    assert "0 bytes spill stores" in assembled(ptx[name], tmp_path)


@pytest.mark.parametrize("name", GRADIENTS_BY_TMA)
def test_tensor_cores_read_gradients_from_where_tma_brought_them(name, ptx, tmp_path):
    """While the products of one step run, those of the step before may still be running."""
    assert "cp.async.bulk.tensor.4d.shared" in ptx[name]
    loop = ptx[name].partition("wgmma.mma_async")[2].partition("wgmma.wait_group.sync.aligned 0")[0]
    assert "ldmatrix" not in ptx[name] and "st.shared" not in loop
    assert re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx[name])[0] != "0"
    assert "0 bytes spill stores" in assembled(ptx[name], tmp_path)


@pytest.mark.parametrize("name", OF_3_CHANNELS)
def test_few_channels_fit_the_registers(name, ptx, tmp_path):
    """Where x is turned early, Triton 3.7 and newer hold all of it meanwhile, and spill 7.7 KB a thread in float32.

    ResNet18 in strict float32 took half as long again.
    """
    said = assembled(ptx[name], tmp_path)
    assert "0 bytes spill stores" in said and int(re.search(r"Used (\d+) registers", said)[1]) > 32


@pytest.mark.parametrize("name", WIDE_FILTERS)
def test_columns_of_wide_filters_are_a_loop_that_loads_the_next_one(name, ptx, tmp_path):
    """Of each column rows and weights are loaded once, 8 bytes at a time, before the column before is multiplied.

    Triton's time to compile grows with the cube of loads and products: a 7x7 filter took 6 times as long unrolled.
    """
    constants, code = KERNELS[name][3], re.sub(r"\t//.*", "", ptx[name])
    loop = code[: code.rindex("bra")].rpartition("$L__BB")[2].partition("\n")[2]
    rows = (constants["STRIP"] - 1) * constants["STRIDE_H"] + constants["R"]
    assert re.findall(r"ld\.global[\w.]*", loop) == ["ld.global.v2.b32"] * (rows + constants["R"])
    assert 0 < loop.count("fma.rn.f32") <= 4 * constants["STRIP"] * constants["R"]
    assert code.count("ld.global") == 2 * (rows + constants["R"]) and "shared" not in loop
    said = assembled(ptx[name], tmp_path)
    if triton.__version__.startswith("3.6."):  # the assembler of Triton 3.9 takes more for both
        assert "0 bytes spill stores" in said
        assert int(re.search(r"Used (\d+) registers", said)[1]) <= WIDE_FILTERS[name]


@pytest.mark.parametrize("name", GRADIENTS_WITH_HALO)
def test_gradients_are_transposed_on_their_way_to_registers_and_all_fits_there(name, ptx, tmp_path):
    """64 x 64 of a gradient in four loads; the sums of three products of it stay where they are."""
    assert ptx[name].count("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16") == 4
    assert "cp.async.bulk.tensor.5d.shared" in ptx[name] and not re.search(r"(ld|st)\.shared", ptx[name])
    assert ptx[name].count("wgmma.mma_async") == 12
    said = assembled(ptx[name], tmp_path)
    assert "0 bytes spill stores" in said and "serializ" not in said


@pytest.mark.parametrize("name", ["conv2d, TMA", "conv2d, TMA, 96 channels"])
def test_tensor_cores_read_both_operands_from_where_tma_brought_them(name, ptx):
    """A weight in registers would be overwritten while the products of the step before still read it."""
    loop = ptx[name].partition("wgmma.mma_async")[2].partition("wgmma.wait_group.sync.aligned 0")[0]
    assert not re.search(r"ldmatrix|(ld|st)\.shared", loop)
    assert re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx[name])[0] == "1"


@pytest.mark.parametrize("name", BY_TAPS + WITH_HALO + PRODUCTS)
def test_tma_brings_the_tiles(name, ptx):
    dimensions = 3 if name in PRODUCTS else 4
    assert f"cp.async.bulk.tensor.{5 if name in WITH_HALO else dimensions}d.shared" in ptx[name]
    staged = KERNELS[name][3].get("STAGED", True)
    assert (f"cp.async.bulk.tensor.{dimensions}d.global" in ptx[name]) == staged


@pytest.mark.parametrize("name", SPLIT_K)
def test_parts_of_a_tile_take_16_bytes_and_fit_the_registers(name, ptx, tmp_path):
    """They are stored behind the products, before the semaphore, and come back from L2, behind it."""
    products, _, after = ptx[name].rpartition("wgmma.mma_async")
    before, semaphore, behind = after.partition("atom.global.gpu.acq_rel.add")
    assert semaphore and "st.global" not in products and "bar.sync" in before.rpartition("st.global")[2]
    assert set(re.findall(r"(?:st|ld)\.global[\w.]*", before)) == {"st.global.v4.b32"}
    assert set(re.findall(r"ld\.global[\w.]*", behind)) == {"ld.global.cg.v4.b32"}
    said = assembled(ptx[name], tmp_path)
    assert "0 bytes spill stores" in said and "serializ" not in said


@pytest.mark.parametrize("name", COMPUTED_OPERANDS)
def test_a_product_of_computed_operands_is_awaited(name, ptx):
    """Otherwise the next step overwrites the registers that the tensor core still reads, as it did on an H200."""
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx[name])) == {"0"}


@pytest.mark.parametrize("name", SPLIT_OPERANDS)
def test_operands_are_split_where_products_read_them(name, ptx):
    """In registers, of which nothing goes back to shared memory, but for the right operand of a gradient.

    With Triton 3.8 the leading bits did, in every step, and half as many programs had room on a multiprocessor.
    """
    loaded, _, after = ptx[name].partition("ldmatrix")
    products = re.split(r"mma_async|mma\.sync", after)[:-1]
    assert loaded and products
    assert "gradient" in name or "st.shared" not in "".join(products)


@pytest.mark.parametrize("name", ON_TENSOR_CORES + SPLIT_K + BY_TMA)
def test_products_run_on_the_tensor_cores(name, ptx):
    assert "wgmma.mma_async" in ptx[name]


@pytest.mark.parametrize("name", [name for name in WITH_HALO if "NCHW" not in name] + FROM_SHARED_MEMORY)
def test_products_overlap_and_all_fits_the_registers(name, ptx, tmp_path):
    waits = {"0", "1", "3"} if "groups" in name else {"0", "1"}  # a weight that stays is not waited for
    if re.search(r"product, \d+ channels", name):  # two blocks of channels have two products a step
        waits = {"0", "2"}
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx[name])) == waits
    said = assembled(ptx[name], tmp_path)
    assert "0 bytes spill stores" in said and "serializ" not in said


@pytest.mark.parametrize("name", [name for name in WITH_HALO if "groups" not in name])
def test_all_threads_meet_before_what_products_read_is_overwritten_and_not_between_its_load_and_a_product(name, ptx):
    """There is a barrier in each step that overwrites, also where it belongs to what is said of the load.

    A barrier after the wait for a load would delay the product; with Triton 3.7 to 3.9 there was one.
    """
    first, *steps = re.split(r"wgmma\.wait_group\.sync\.aligned 1;", ptx[name])
    for step in steps:
        assert "bar.sync" in step.partition("expect_tx")[0]
    for step in [first, *steps[:-1]]:
        waited = step.rpartition("wgmma.fence")[0].rpartition("try_wait")[2]
        assert waited and ("bar.sync" not in waited or "rounded" in name)


@pytest.mark.parametrize("name", PRODUCTS + GRADIENTS_WITH_HALO)
def test_all_threads_meet_around_the_products_of_a_step_and_not_between_them(name, ptx):
    """As above, in loops of one step; with Triton 3.9 there was a barrier between the products of a gradient, too."""
    before, _, products = ptx[name].partition("wgmma.fence")
    assert "bar.sync" not in before.rpartition("try_wait")[2] + products.partition("wgmma.wait_group")[0]
    assert "bar.sync" in products.partition("expect_tx")[0].rpartition("wgmma.wait_group")[2]


@pytest.mark.parametrize("name", [name for name in WITH_HALO if not re.search("groups|NCHW|stride 2", name)])
def test_numbers_of_several_steps_are_not_computed_together(name, code):
    """With Triton 3.8 and 3.9 they were: addresses of products came back from the registers of each thread.

    Pairs are those of one step. Weights of groups, addresses of NCHW and of one box of stride 2 may be vectors.
    """
    assert set(code[name]["vectors"]) <= {"<2 x i32>"}


@pytest.mark.parametrize("name", ["channels_last", "conv2d, 1x1, stride 2, contiguous", "conv2d, 3 channels"])
def test_lanes_load_pixels_where_channels_are_apart(name, code):
    """Lanes read a line of pixels, one after the other; of channels each would read another line.

    Newer versions of Triton spread over the lanes what 3.6 did not, where nothing is contiguous.
    """
    sizes, lanes = code[name]["loads"][0]
    pixels = -1 if LANES_ALONG_LAST.value else 0
    assert sizes[pixels] == KERNELS[name][3]["BLOCK_M"] and lanes[pixels] >= 16


@pytest.mark.parametrize("name", [name for name in KERNELS if "sliced-K" in name])
def test_rows_of_a_slice_lie_in_different_banks(name, code):
    """Tensor cores read eight at once. With Triton 3.7 to 3.9 the slices of a row lay between them, and all waited."""
    orders = code[name]["orders"]
    assert orders and all(order[-1] == 0 for order in orders)


@pytest.mark.parametrize("name", RESIDENT_KERNELS)
def test_all_is_loaded_before_the_first_product(name, ptx, tmp_path):
    """16 bytes at a time, as operands of the tensor cores, and behind the wait; nothing of it leaves the registers."""
    assembled(ptx[name], tmp_path)
    machine_code = subprocess.run(
        [disassembler(), tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    steps = re.findall(r"ACQBULK|LDG\.E\.128|HMMA|STL|LDL", machine_code.stdout)
    order = [step for step, before in zip(steps, [None, *steps]) if step != before]
    assert order == ["ACQBULK", "LDG.E.128", "HMMA"]
    c = KERNELS[name][3]
    size = 4 if "float32" in name else 2
    reductions = c["R"] * c["S"] * c["C"], c["HAS_SHORTCUT"] * c["SHORTCUT_C"]
    blocks = sum(math.ceil(reduction / (c["BLOCK_K"] * c["num_warps"])) for reduction in reductions)
    vectors = blocks * c["BLOCK_K"] * (c["BLOCK_M"] + c["BLOCK_N"]) * size // 16
    assert steps.count("LDG.E.128") == vectors / 32


@pytest.mark.parametrize("name", [name for name, (*_, constants) in KERNELS.items() if constants.get("DEPENDENT")])
def test_dependent_launches_touch_no_tensor_before_they_waited(name, ptx):
    first = re.search(r"(ld|st)\.global|cp\.async|griddepcontrol\.wait", ptx[name])
    assert first[0] == "griddepcontrol.wait"
    assert "griddepcontrol.launch_dependents" in ptx[name]


@pytest.mark.parametrize("name", ROUNDS)
def test_rounding_to_tf32_is_one_instruction(name, ptx):
    assert "cvt.rn.tf32.f32" in ptx[name] and "cvt.rna" not in ptx[name]
