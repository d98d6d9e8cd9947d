"""Times the first call of networks, from the untouched network to the first right result, with nothing compiled.

    python benchmarks/first_call.py
    python benchmarks/first_call.py --networks resnet50 --ways fuse compile --beside
    python benchmarks/first_call.py --count --networks convnext_tiny

Each way to run a network is a process of its own with empty caches, and then another process that finds them filled.
With --beside the ways of a network run at the same time, each on its share of the cores. --count needs no GPU: it poses
as an H100, and compiles one after the other what the first call of the fused network would compile there, in seconds
of a core. Ends with 0, 1 if a way failed, 2 on wrong use.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository's root

import argparse
import json
import logging
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from triton.runtime import driver

import tritonnn
from benchmarks.pose import H100, Pose
from tritonnn.command.networks import build, calibrate, random_images
from tritonnn.compile_ahead import kernels_of
from tritonnn.compiler import backend
from tritonnn.runtime import hardware, operator

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITONNN_CACHE_DIR")
NETWORKS = ("resnet18", "resnet50", "efficientnet_b0", "convnext_tiny")
LIMIT = {"bf16": 0.15, "default": 0.05}
"""The largest relative root-mean-square difference to PyTorch's eager network, of a right result."""


def fused(model: nn.Module, x: Tensor) -> nn.Module:
    return tritonnn.fuse(model, cuda_graph=True)


def swapped(model: nn.Module, x: Tensor, ahead: bool) -> nn.Module:
    tritonnn.swap(model)
    if ahead:
        tritonnn.compile_swapped(model, x)
    return model


def compiled(model: nn.Module, x: Tensor, **options: object) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, dynamic=False, **options)


WAYS: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]] = {
    "fuse": fused,
    "swap": partial(swapped, ahead=True),
    "swap-one-by-one": partial(swapped, ahead=False),
    "backend": partial(compiled, backend=backend),
    "compile": partial(compiled, mode="reduce-overhead"),
}


def child(network: str, way: str, dtype: str, batch: int) -> None:
    """Prints the seconds of the first call, of the second, and since the process began."""
    logged: list[str] = []
    log = logging.getLogger("tritonnn.compile_ahead")
    log.setLevel(logging.INFO)
    log.addFilter(lambda record: logged.append(record.getMessage()))
    model = build(f"torchvision:{network}").cuda()
    calibrate(model, random_images(model, 16, 224).cuda())
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = model.to(kind, memory_format=torch.channels_last).requires_grad_(False)
    x = random_images(model, batch, 224).to("cuda", kind, memory_format=torch.channels_last)
    with torch.no_grad():
        reference = model(x).float()
        torch.cuda.synchronize()
        ready, times = time.perf_counter(), []
        call = WAYS[way](model, x)
        for _ in range(2):
            y = call(x).float()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - ready)
            ready = time.perf_counter()
            error = ((y - reference).square().mean() / reference.square().mean()).sqrt().item()
            if not error < LIMIT[dtype]:
                sys.exit(f"{network}, {way}: wrong, it differs from PyTorch's by {error:.2f}")
    print(json.dumps({"first_s": times[0], "second_s": times[1], "error": error, "log": logged}))


def counted(network: str, dtype: str, batch: int) -> None:
    """Prints the seconds that each kernel takes to compile, by its function's name."""
    driver.set_active(Pose())
    hardware.gpu = lambda device: H100
    # What launches is asked on CPU tensors, as the interpreter would be, and launches nothing.
    operator.triton = SimpleNamespace(knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=True)))
    model = build(f"torchvision:{network}")
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = model.to(kind, memory_format=torch.channels_last).requires_grad_(False)
    fused, x = tritonnn.fuse(model), torch.empty(batch, 3, 224, 224, dtype=kind, memory_format=torch.channels_last)
    failed: list[Exception] = []

    def call() -> None:
        try:
            fused(x)
        except Exception as error:  # which going through it would not tell
            failed.append(error)

    with torch.no_grad():
        kernels = kernels_of(call, every_kernel=True)
    if failed:
        raise failed[0]
    seconds = defaultdict(list)
    for kernel in kernels:
        start = sum(os.times()[:4])  # the assembler is a process of its own
        kernel.function.preload(kernel.specialization)
        seconds[kernel.function.__name__].append(sum(os.times()[:4]) - start)
    print(json.dumps(seconds))


def count(args: argparse.Namespace) -> list[dict[str, object]]:
    """Of each network, in a process with empty caches."""
    found = []
    for network in args.networks:
        with tempfile.TemporaryDirectory() as caches:
            took = measured(args, network, args.ways[0], caches, sorted(os.sched_getaffinity(0)), "--count")
        found.append({"network": network} | took)
        if "failed" in took:
            print(f"{network}: FAILED {took['failed']}", flush=True)
            continue
        seconds = {name: took[name] for name in took if name != "process_s"}
        every = sum(seconds.values(), [])
        print(f"{network}: {len(every)} kernels, {sum(every):.1f} s, the longest {max(every):.1f} s")
        for name, each in sorted(seconds.items(), key=lambda item: -sum(item[1])):
            print(f"  {len(each):3} {name} {sum(each):.1f} s", flush=True)
    return found


def measured(
    args: argparse.Namespace, network: str, way: str, caches: str, cores: Sequence[int], *more: str
) -> dict[str, object]:
    """What a new process says, and the seconds that all of it took."""
    start = time.perf_counter()
    options = ["--networks", network, "--ways", way, "--dtype", args.dtype, "--batch-size", str(args.batch_size)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", *options, *more],
        env=os.environ | {"TRITON_INTERPRET": "0"} | {name: f"{caches}/{name.lower()}" for name in CACHES},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        capture_output=True,
        text=True,
    )
    whole = {"process_s": time.perf_counter() - start}
    if done.returncode:
        return whole | {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    return whole | json.loads(done.stdout.splitlines()[-1])


def both(args: argparse.Namespace, network: str, way: str, cores: Sequence[int]) -> dict[str, object]:
    """A process with empty caches, then one with filled ones."""
    found: dict[str, object] = {"network": network, "way": way, "cores": len(cores)}
    with tempfile.TemporaryDirectory() as caches:
        for name in ("cold", "warm"):
            found[name] = measured(args, network, way, caches, cores)
            print(line(found, name), flush=True)
    return found


def line(found: dict, name: str) -> str:
    times = found[name]
    if "failed" in times:
        return f"{found['network']} {found['way']} {name}: FAILED {times['failed']}"
    first, process = times["first_s"], times["process_s"]
    seconds = f"first result after {first:.1f} s, second {times['second_s']:.1f} s, whole process {process:.1f} s"
    return f"{found['network']} {found['way']} {name}: {'; '.join([seconds, *times['log']])}"


def run(args: argparse.Namespace) -> list[dict[str, object]]:
    cores, found = sorted(os.sched_getaffinity(0)), []
    share = len(cores) // len(args.ways) if args.beside else len(cores)
    for network in args.networks:
        with ThreadPoolExecutor(len(args.ways) if args.beside else 1) as pool:
            slices = [cores[i * share * args.beside :][:share] for i in range(len(args.ways))]
            found += pool.map(partial(both, args, network), args.ways, slices)
        if args.output:
            args.output.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "found": found}, indent=1) + "\n")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of torchvision")
    add("--ways", nargs="+", choices=tuple(WAYS), default=("fuse", "compile"))
    add("--dtype", choices=tuple(LIMIT), default="bf16")
    add("--batch-size", type=int, default=64, metavar="N")
    add("--beside", action="store_true", help="the ways of a network at the same time, each on its share of the cores")
    add("--count", action="store_true", help="only the kernels that the fused network compiles, posing as an H100")
    add("--output", type=Path, metavar="FILE", help="JSON of all that was found")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.count and args.child:
        counted(args.networks[0], args.dtype, args.batch_size)
        return
    if args.count:
        found = count(args)
        if args.output:
            args.output.write_text(json.dumps({"gpu": "posing as an H100", "found": found}, indent=1) + "\n")
        sys.exit(int(any("failed" in of_network for of_network in found)))
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU: there is nothing to compile for")
    if args.child:
        child(args.networks[0], args.ways[0], args.dtype, args.batch_size)
        return
    failed = any("failed" in found[name] for found in run(args) for name in ("cold", "warm"))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
