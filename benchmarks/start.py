"""How long a new process takes to its first results: with no compiled kernels, with kept ones, and with carried ones.

    python benchmarks/start.py torchvision:resnet50 --dtype bfloat16 --batch 1 64

"cold" finds empty folders for compiled kernels and tuned tables (TRITON_CACHE_DIR, TRITONNN_CACHE_DIR), "warm" those
that "cold" left, and "baked" a copy of them at another path, as an image for containers has it. With --keep DIR the
folders stay: that is how to bake them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
SIDES = ("PyTorch", "fused")
STAGES = ("imports", "network", "fuse", "first results", "second results", "third results")
FOLDERS = {"TRITON_CACHE_DIR": "triton", "TRITONNN_CACHE_DIR": "tritonnn"}


def child(args: argparse.Namespace) -> None:
    """Prints the seconds of each stage as JSON.

    The second call of a fused network captures a CUDA graph, the third one replays it.
    """
    sys.path[:1] = [str(ROOT), os.getcwd()]  # for networks of your own
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    import tritonnn
    from tritonnn.command.networks import build, random_images

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, seconds = STARTED, {}

    def lap(stage: str) -> None:
        nonlocal clock
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[stage], clock = now - clock, now

    lap("imports")
    model = build(args.network).to(device, getattr(torch, args.dtype), memory_format=torch.channels_last)
    images = [random_images(model, batch, args.size).to(device, getattr(torch, args.dtype)) for batch in args.batch]
    lap("network")
    network = model if args.child == "PyTorch" else tritonnn.fuse(model, cuda_graph=True)
    lap("fuse")
    with torch.inference_mode():
        for stage in STAGES[3:]:
            for x in images:
                network(x.contiguous(memory_format=torch.channels_last))
            lap(stage)
    print(json.dumps(seconds))


def measure(args: argparse.Namespace, side: str, folder: Path) -> dict[str, float]:
    """Seconds of each stage of a new process, and from its start to its end in "process"."""
    environment = os.environ | {name: str(folder / sub) for name, sub in FOLDERS.items()}
    options = [f"--size={args.size}", f"--dtype={args.dtype}", "--batch", *map(str, args.batch)]
    command = [sys.executable, __file__, args.network, "--child", side, *options]
    start = time.perf_counter()
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"error: the process of {side} failed, as it says above")
    return json.loads(run.stdout.splitlines()[-1]) | {"process": time.perf_counter() - start}


def row(name: str, seconds: dict[str, float]) -> str:
    return f"| {name} | {' | '.join(f'{seconds[stage]:.1f}' for stage in (*STAGES, 'process'))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("network", help="as `python -m tritonnn` names it")
    add("--size", type=int, default=224, help="rows and columns of the images; 224")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--batch", type=int, nargs="+", default=[1, 64], help="numbers of images, one call each; 1 64")
    add("--keep", type=Path, help="an empty folder in which the caches stay")
    add("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    if args.keep and args.keep.exists() and any(args.keep.iterdir()):
        parser.exit(2, f"error: {args.keep} is not empty\n")
    print(f"| seconds | {' | '.join(STAGES)} | process |\n|---{'|--:' * (len(STAGES) + 1)}|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary, "caches")
        print(row("PyTorch", measure(args, "PyTorch", Path(temporary, "pytorch"))), flush=True)
        for name in ("cold", "warm"):
            print(row(f"fused, {name}", measure(args, "fused", folder)), flush=True)
        folder.mkdir(exist_ok=True)  # the interpreter leaves nothing in it
        carried = shutil.copytree(folder, Path(temporary, "elsewhere", "caches"))
        print(row("fused, baked", measure(args, "fused", carried)), flush=True)


if __name__ == "__main__":
    main()
