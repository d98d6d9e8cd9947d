"""A CPU that poses as a Hopper GPU: Triton compiles for it, in a process of its own without the interpreter.

The assembler and the disassembler come with Triton, and need no GPU either.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.pose import HOPPER


def run(file: str, *arguments: str) -> dict:
    """What a file prints in such a process."""
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, file, *arguments], env=environment, cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def compiled(path: str, dtype: str, memory_format: str, constants: dict) -> dict[str, object]:
    """The PTX of a kernel, its loads in TTGIR, orders of its swizzled tiles, and the vectors of integers of LLVM.

    For tensors of `dtype`, sizes and strides multiples of 16 but for the stride 1, and `odd`. Triton finds that out for
    itself when it launches, unless an argument's type is annotated.
    """
    import importlib

    import triton.language as tl
    from triton import compile
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    module, _, name = path.partition(":")
    kernel = getattr(importlib.import_module(f"tritonnn.{module}"), name)
    assert not [p.name for p in kernel.params if "stride" in p.name and p.annotation_type], "annotated strides"
    names, odd = kernel.arg_names, constants.get("odd", ())
    ones = ("stride_c", "stride_k") if memory_format == "channels_last" else ("stride_w", "stride_pixel")
    types_of_sums = dict(ACC=tl.float32, LANE=tl.float32, INDEX=tl.int32, OFFSET=tl.int32)
    defaults = {name: 1 for name in names if name.endswith(ones)} | types_of_sums
    if "W_SLOTS" in constants:
        c, k = constants["C"], constants["K"]
        defaults |= dict(CHANNELS_LAST=True, EXPAND=False, DEPTH=c, GROUP_C=c, GROUP_K=k)
    constants = defaults | constants
    types = {
        "eps": "fp64",
        "semaphores_ptr": "*i32",
        "indices_ptr": "*i64",
        "inverse_of_pixels": "fp32",
        "inverse_of_q": "fp32",
    } | {name: "*fp32" for name in ("mean_ptr", "var_ptr", "partial_ptr", "coefficients_ptr", "inverse_ptr")}
    types |= constants.get("types", {})
    types |= {name: type_of(box, dtype, kernel.is_gluon()) for name, box in boxes_of(constants).items()}
    types |= {name: f"*{dtype}" for name in names if name.endswith("_ptr") and name not in types}
    options = {"num_warps": 4} | {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if (signature[name] == "i32" and name not in odd) or signature[name].startswith("*")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source(kernel, signature, constexprs=values, attrs=attributes)
    asm = compile(source, target=HOPPER, options=options).asm
    vectors = sorted(set(re.findall(r"<\d+ x i32>", asm["llir"])))
    return {"ptx": asm["ptx"], "loads": loads_of(asm["ttgir"]), "orders": orders_of(asm["ttgir"]), "vectors": vectors}


def orders_of(ttgir: str) -> list[list[int]]:
    """Of each layout of tiles in shared memory that spreads lines over its banks, the dimensions, the fastest first."""
    found = re.findall(r"swizzled_shared<\{vec = \d+, perPhase = \d+, maxPhase = (\d+), order = \[([\d, ]+)\]", ttgir)
    return [[int(dimension) for dimension in order.split(",")] for phases, order in found if int(phases) > 1]


def loads_of(ttgir: str) -> list[tuple[list[int], list[int]]]:
    """Of each load of a tile in blocks its sizes, and how many lanes of a warp lie along each dimension."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<.*?threadsPerWarp = \[([\d, ]+)\]", ttgir, re.MULTILINE))
    found = re.findall(r"= tt\.load .*?: tensor<([\dx]+)x!tt\.ptr<\w+>, (#\w+)>", ttgir)
    return [
        ([int(size) for size in sizes.split("x")], [int(lanes) for lanes in layouts[layout].split(",")])
        for sizes, layout in found
        if layout in layouts
    ]


def type_of(box: list[int] | None, dtype: str, in_gluon: bool) -> str:
    """The type of a descriptor or, without a box, of a pointer."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    if box is None:
        return f"*{dtype}"
    bits = 32 if dtype == "fp32" else 16
    layout = f",{NVMMASharedLayout(min(box[-1] * bits // 8, 128), bits, len(box))!r}" if in_gluon else ""
    return f"tensordesc<{dtype}{box}{layout}>"


def boxes_of(c: dict) -> dict[str, list[int] | None]:
    """The boxes of a kernel's descriptors, which its constants tell apart; None for what is a pointer this time."""
    if "descriptors" in c:
        return c["descriptors"]
    if "RESIDENT" in c:  # the matrix product
        m, n, k = (c[f"BLOCK_{name}"] for name in "MNK")
        x = [1, m, k] if c["CHANNELS_LAST_X"] else [1, k, m]
        y = [1, m, n] if c["CHANNELS_LAST_Y"] else [1, n, m]
        boxes = {"x_desc": x, "weight_desc": [n, k], "y_desc": y, "residual_desc": y}
        if rest := c["REST_N"]:
            rest_y = [1, m, rest] if c["CHANNELS_LAST_Y"] else [1, rest, m]
            boxes |= {"rest_desc": [rest, k], "rest_y_desc": rest_y, "rest_residual_desc": rest_y}
        return boxes
    if "TILE_N" not in c:
        return {}
    images, rows, columns = (c[f"TILE_{name}"] for name in "NPQ")
    if "SLOTS" in c:  # a filter's gradient from tiles with a halo
        rest = [images, columns, 64]
        return {"g_desc": [rows, *rest], "x_desc": [rows, 1, *rest], "edge_desc": [3 - c["STRIDE"], 1, *rest]}
    n, k = c["BLOCK_N"], c["BLOCK_K"]
    if "W_SLOTS" in c:  # tiles with a halo
        x, edge = [rows, 1, images, columns, k], [3 - c["STRIDE"], 1, images, columns, k]
        weight = None if c["EXPAND"] else [n, 1, k]
        y = [rows, images, columns, n] if c["STAGED"] else None
        return {"x_desc": x, "edge_desc": edge, "weight_desc": weight, "y_desc": y, "residual_desc": y}
    tile = [images, rows, columns]
    return {"x_desc": [*tile, k], "weight_desc": [n, k], "residual_desc": [*tile, n], "y_desc": [*tile, n]}


def assembled(ptx: str, folder: Path) -> str:
    """What the assembler says of a kernel: registers, spills, warnings."""
    (folder / "kernel.ptx").write_text(ptx)
    command = ptxas(), "-arch=sm_90a", "-v", folder / "kernel.ptx", "-o", folder / "kernel.cubin"
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def ptxas() -> Path:
    """The assembler that Triton takes for Hopper."""
    from triton.backends.nvidia.compiler import get_ptxas

    return Path(get_ptxas(90).path)


def disassembler() -> Path:
    return ptxas().with_name("nvdisasm")
