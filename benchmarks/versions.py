"""ResNet18's times with several versions of Triton, in turns, on one GPU, which does nothing else meanwhile.

    python benchmarks/versions.py 3.6.0 3.9.0=/path/of/a/folder/with/triton --output times.json
    python docs/versions.py --times times.json

The first version is that of this Python; of the others a folder is given that holds the package `triton`. Kernels in
Gluon run with all of them. Each version has a process, which forks a child for each case. The children of a type of
numbers compile and capture their graphs beside each other, and are then timed one at a time, the versions in turns.
From Triton 3.7 on TF32 is also timed with x rounded by the descriptors that load it, and its convolutions alone beside
PyTorch's.
"""

import argparse
import ctypes
import datetime
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Case = tuple[str, int, str]
NETWORKS: list[Case] = [
    (dtype, n, what) for dtype in ("bf16", "tf32", "fp32") for n in (1024, 128, 1) for what in ("fused", "swapped")
]
LOADS: list[Case] = [
    ("tf32", 1024, "swapped, rounded on load"),
    ("tf32", 128, "swapped, rounded on load"),
    ("tf32", 1024, "convolutions alone, PyTorch's"),
    ("tf32", 1024, "convolutions alone"),
    ("tf32", 1024, "convolutions alone, rounded on load"),
]
"""Of versions whose descriptors can round."""
THREADS = 4
"""Compilers of a child."""


def capture(call: Callable[[], object]) -> Callable[[], None]:
    import torch

    from tritonnn.compile_ahead import compile_ahead

    compile_ahead([call], lambda number: None)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def prepare(dtype: str, n: int, what: str) -> Callable[[], object]:
    """What is to be timed."""
    import torch

    import tritonnn
    from lit_modules.resnet import ResNet18
    from tritonnn import compile_ahead
    from tritonnn.runtime import capabilities, hardware

    compile_ahead.MOST_THREADS = THREADS
    hardware.GLUON_VERSIONS = ("",)
    capabilities.ROUNDS_ON_LOAD = "rounded on load" in what
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    number = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = ResNet18().cuda().eval().to(number).to(memory_format=torch.channels_last)
    x = torch.randn(n, 3, 32, 32, device="cuda", dtype=number).contiguous(memory_format=torch.channels_last)
    if what == "fused":
        plain = tritonnn.fuse(model)
        capture(lambda: plain(x))  # compiles ahead
        fused = tritonnn.fuse(model, cuda_graph=True)
        for _ in range(3):
            fused(x)
        return lambda: fused(x)
    if what.startswith("swapped"):
        tritonnn.swap(model)
        return capture(lambda: model(x))
    inputs: dict[tuple, tuple] = {}

    def note(module: torch.nn.Conv2d, args: tuple, y: torch.Tensor) -> None:
        inputs.setdefault((args[0].shape, module.weight.shape, module.stride), (module, args[0].clone()))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels > 3:
            module.register_forward_hook(note)
    model(x)
    for module in model.modules():
        module._forward_hooks.clear()
    if "PyTorch's" not in what:
        tritonnn.swap(model, layers="conv2d")
    return capture(lambda: [module(x) for module, x in inputs.values()])


def clock(call: Callable[[], object]) -> float:
    """Microseconds of a call, the median of five samples of 25 ms."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample(times: int) -> float:
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    sample(3)
    times = max(3, int(25 / sample(3)))
    return round(1e3 * statistics.median(sample(times) for _ in range(5)), 2)


def follow_parent() -> None:
    """Ends with the process that started this one."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def child(case: Case, pipe: multiprocessing.connection.Connection) -> None:
    follow_parent()
    import torch

    with torch.no_grad():
        try:
            call = prepare(*case)
        except Exception as error:  # of the compiler, or for want of memory
            pipe.send({"failed": f"{type(error).__name__}: {error}"[:300]})
            return
        pipe.send({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__.partition("+")[0]})
        while pipe.recv():
            pipe.send({"us": clock(call)})


def serve() -> None:
    """One version: {"prepare": cases} and {"time": case}, a line each, are answered by lines."""
    follow_parent()
    import lit_modules.resnet  # noqa: F401  # nothing of it touches the GPU, so children may be forked
    import tritonnn.compile_ahead  # noqa: F401
    from tritonnn.runtime.capabilities import can_round_on_load

    def receive(case: Case) -> dict:
        try:
            return pipes[case].recv()
        except (EOFError, KeyError):
            return {"failed": "it ended"}

    pipes, children = {}, []
    for line in sys.stdin:
        order = json.loads(line)
        if "prepare" in order:
            for process in children:
                process.kill()
                process.join()
            pipes, children = {}, []
            for case in map(tuple, order["prepare"]):
                if case in LOADS and not can_round_on_load():
                    continue
                pipes[case], there = multiprocessing.Pipe()
                children.append(multiprocessing.Process(target=child, args=(case, there), daemon=True))
                children[-1].start()
                there.close()
            print(json.dumps([[case, receive(case)] for case in list(pipes)]), flush=True)
        else:
            case = tuple(order["time"])
            pipes[case].send(True)
            print(json.dumps(receive(case)), flush=True)


def ask(server: subprocess.Popen, **order: object) -> object:
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline() or "null")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="NAME[=FOLDER]")
    parser.add_argument("--types", nargs="+", choices=("bf16", "tf32", "fp32"), default=["bf16", "tf32", "fp32"])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    servers = {}
    for version in options.versions:
        name, _, folder = version.partition("=")
        path = os.pathsep.join(filter(None, [str(ROOT), folder, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", "from benchmarks.versions import serve; serve()"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        servers[name] = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, **pipes)
    us: dict[str, dict[str, float]] = {}
    told: dict = {}
    for dtype in options.types:
        cases = [case for case in NETWORKS + LOADS if case[0] == dtype]
        with ThreadPoolExecutor() as pool:
            begin = functools.partial(ask, prepare=cases)
            answers = dict(zip(servers, pool.map(begin, servers.values())))
        ready = {
            name: [tuple(case) for case, answer in found if "failed" not in answer] for name, found in answers.items()
        }
        for name, found in answers.items():
            for case, answer in found:
                told.update(answer)
                if "failed" in answer:
                    print(name, *case, answer["failed"], flush=True)
        for turn in (1, -1):
            for case in cases:
                for name in list(servers)[::turn]:
                    if case in ready.get(name, ()):
                        found = us.setdefault(" ".join(map(str, case)), {})
                        sample = ask(servers[name], time=case).get("us", float("inf"))
                        found[name] = min(sample, found.get(name, float("inf")))
        for case, found in us.items():
            if case.startswith(dtype):
                print(case, found, flush=True)
        run = {"gpu": told.get("gpu"), "torch": told.get("torch"), "date": datetime.date.today().isoformat()}
        run |= {"command": f"python benchmarks/versions.py {' '.join(servers)}", "us": us}
        options.output.write_text(json.dumps(run, indent=1) + "\n")
    for server in servers.values():
        server.stdin.close()
        server.wait()


if __name__ == "__main__":
    main()
