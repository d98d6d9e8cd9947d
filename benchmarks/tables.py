"""Writes the tuned convolutions that the package ships for this GPU: `python benchmarks/tables.py --minutes 9`.

ResNet18 at 32x32 and, at 128 images, 224x224; fused and swapped. A second run goes on where the time ran out.
"""

import argparse
import os
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import tritonnn
from benchmarks.cases import IMAGENET_BATCH_SIZE, Case, flags
from benchmarks.networks import Setup
from tritonnn.ops.conv2d.tables import SHIPPED, file_name

DTYPES = ("bf16", "tf32", "fp32")
CASES = [Case("cifar", dtype, n) for n in (1024, 128, 1, 8) for dtype in DTYPES]
CASES += [Case("imagenet", dtype, IMAGENET_BATCH_SIZE) for dtype in DTYPES]
CASES += [Case("cifar", "default", n) for n in (1024, 128)]
"""By importance; "default", PyTorch's flags at its start, is in NCHW."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--cases", nargs="+", default=["*"], help="shell patterns of names: cifar-bf16-1024 'imagenet-*'"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins that would take longer")
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="where the table is, or is to be")
    parser.add_argument("--again", action="store_true", help="tune also what the tables know")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA GPU, and convolutions are tuned on one")
    os.environ["TRITONNN_CACHE_DIR"] = str(options.folder)
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{options.folder / file_name(torch.cuda.get_device_name(device))}\n", flush=True)
    start, longest = time.perf_counter(), 0.0
    for case in CASES:
        if not any(fnmatchcase(case.name, pattern) for pattern in options.cases):
            continue
        for fused in (True, False):
            begin = time.perf_counter()
            name = f"{case.name}, {'fused' if fused else 'swapped'}"
            if begin - start + longest > 60 * options.minutes:
                print(f"{name}: no time left")
                continue
            with flags(case.dtype):
                model, images = Setup(case, device).in_layout(case.layout)
                network = tritonnn.fuse(model) if fused else model
                print(f"{name}\n{tritonnn.tune(network, images, again=options.again)}\n", flush=True)
            del model, images, network
            torch.cuda.empty_cache()
            longest = max(longest, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
