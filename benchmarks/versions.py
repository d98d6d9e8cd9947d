"""ResNet18's times with several versions of Triton, in turns, on one GPU, which does nothing else meanwhile.

    python benchmarks/versions.py 3.6.0 again= 3.9.0=/path/of/a/folder/with/triton --output times.json
    python docs/versions.py --times times.json

The first version is that of this Python; of the others a folder is given that holds the package `triton`. Without a
folder, a name is that of a second process of the first version: what differs between those two is noise. Kernels in
Gluon run with all of them. Each version has a process, whose children first compile each kernel once, beside each other
(`--compile` ends there, `--compiled` begins after that: Triton keeps kernels on disk). Then it forks a child for each
case. Those of a type of numbers capture their graphs beside each other, and are timed one at a time, the versions in
turns, of which the median counts; where two versions differ by more than 2 %, twice as often. From Triton 3.7 on TF32
is also timed with x rounded by the descriptors that load it, and its convolutions alone beside PyTorch's.
"""

import argparse
import ctypes
import datetime
import functools
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Case = tuple[str, int, str]
TYPES = ["bf16", "tf32", "fp32"]
NETWORKS: list[Case] = [(dtype, n, what) for dtype in TYPES for n in (1024, 128, 1) for what in ("fused", "swapped")]
NETWORKS += [("bf16", 1024, "swapped, contiguous")]
CONVOLUTIONS: list[Case] = [("bf16", 1024, "convolutions alone"), ("tf32", 1024, "convolutions alone")]
LOADS: list[Case] = [
    *(("tf32", n, f"{what}, rounded on load") for n in (1024, 128, 1) for what in ("fused", "swapped")),
    ("tf32", 1024, "convolutions alone, rounded on load"),
    ("tf32", 1024, "convolutions alone, PyTorch's"),
]
"""Cases for versions whose descriptors can round."""
Kernel = tuple[str, str, str]
"""What a process needs to compile one: module, name and specialization."""


def capture(call: Callable[[], object]) -> Callable[[], None]:
    import torch

    from tritonnn.runtime.dependent_launch import launches_as_in_graphs

    with launches_as_in_graphs():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def network(dtype: str, n: int, what: str) -> tuple:
    """PyTorch's, and images for it; the flags are set as `what` needs them."""
    import torch

    from lit_modules.resnet import ResNet18
    from tritonnn.ops.conv2d import tables
    from tritonnn.runtime import capabilities, hardware

    hardware.GLUON_VERSIONS = ("",)
    capabilities.ROUNDS_ON_LOAD = ("",) if "rounded on load" in what else ()
    tables.forget()  # choices depend on it
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    number = torch.bfloat16 if dtype == "bf16" else torch.float32
    memory_format = torch.contiguous_format if "contiguous" in what else torch.channels_last
    model = ResNet18().cuda().eval().to(number).to(memory_format=memory_format)
    return model, torch.randn(n, 3, 32, 32, dtype=number).cuda().contiguous(memory_format=memory_format)


def convolutions(model: Callable, x: object, what: str) -> dict[str, Callable[[], object]]:
    """Calls of the network's convolutions, each once, by its sizes."""
    import torch

    import tritonnn

    inputs: dict[str, tuple[torch.nn.Conv2d, torch.Tensor]] = {}

    def note(module: torch.nn.Conv2d, args: tuple, y: torch.Tensor) -> None:
        sizes, window = ["x".join(map(str, image.shape[1:])) for image in (args[0], y)], module.kernel_size
        inputs.setdefault(f", {' to '.join(sizes)}, {window[0]}x{window[1]}", (module, args[0].clone()))

    found = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [module.register_forward_hook(note) for module in found]
    model(x)
    for hook in hooks:
        hook.remove()
    if "PyTorch's" not in what:
        tritonnn.swap(model, layers="conv2d")
    return {name: functools.partial(*one) for name, one in inputs.items()}


def kernels(dtype: str, n: int, what: str) -> list[Kernel]:
    """The kernels that are launched in CUDA graphs."""
    import tritonnn
    from tritonnn.compile_ahead import kernels_of
    from tritonnn.runtime.dependent_launch import launches_as_in_graphs

    model, x = network(dtype, n, what)
    calls = [functools.partial(model, x)]
    if what.startswith("fused"):
        calls = [functools.partial(tritonnn.fuse(model), x)]
    elif "alone" in what:
        calls = list(convolutions(model, x, what).values())
    else:
        tritonnn.swap(model)
    with launches_as_in_graphs():
        found = [kernel for call in calls for kernel in kernels_of(call, every_kernel=True)]
    return [(kernel.function.fn.__module__, kernel.function.fn.__name__, kernel.specialization) for kernel in found]


def prepare(dtype: str, n: int, what: str) -> dict[str, Callable[[], object]]:
    """What is to be timed: the whole, whose name is empty, and of the convolutions alone each."""
    import tritonnn

    model, x = network(dtype, n, what)
    if what.startswith("fused"):
        fused = tritonnn.fuse(model)
        return {"": capture(lambda: fused(x))}
    if what.startswith("swapped"):
        tritonnn.swap(model)
        return {"": capture(lambda: model(x))}
    calls = convolutions(model, x, what)
    return {"": capture(lambda: [call() for call in calls.values()])} | {
        name: capture(call) for name, call in calls.items()
    }


def clock(call: Callable[[], object]) -> float:
    """Microseconds of a call, by the GPU's clock."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample(times: int) -> float:
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    return round(1e3 * settled(sample), 2)


def settled(sample: Callable[[int], float]) -> float:
    """The median of five samples of 25 ms, after 150 ms of the same calls; `sample(times)`: ms of each of so many.

    After a pause a GPU runs faster for its first 100 ms: samples of one graph took 1,836, 1,937, 1,928 us (H200).
    """
    first = sample(3)
    times = max(3, int(25 / sample(max(3, math.ceil(150 / first)))))
    return statistics.median(sample(times) for _ in range(5))


def follow_parent() -> None:
    """Ends with the process that started this one."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def child(case: Case, pipe: multiprocessing.connection.Connection) -> None:
    follow_parent()
    import torch

    with torch.no_grad():
        try:
            calls = prepare(*case)
        except Exception as error:  # of the compiler, or for want of memory
            pipe.send({"failed": f"{type(error).__name__}: {error}"[:300]})
            return
        pipe.send({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__.partition("+")[0]})
        while pipe.recv():
            pipe.send({"us": {name: clock(call) for name, call in calls.items()}})


def compiler(tasks: multiprocessing.Queue, done: multiprocessing.Queue) -> None:
    """Notes the kernels of cases, and compiles kernels, until there is None."""
    follow_parent()
    import torch

    for task in iter(tasks.get, None):
        found: list[Kernel] | str = []
        try:
            if isinstance(task[1], int):
                with torch.no_grad():
                    found = kernels(*task)
                torch.cuda.empty_cache()
            else:
                module, name, specialization = task
                getattr(importlib.import_module(module), name).preload(specialization)
        except Exception as error:  # of the compiler, or for want of memory; the timing meets it again
            found = f"{' '.join(map(str, task[:2]))}: {type(error).__name__}: {error}"[:300]
        done.put(found)


def compile_kernels(cases: list[Case], processes: int) -> dict:
    """Compiles what the cases launch, each kernel once, in processes beside each other."""
    start, tasks, done = time.perf_counter(), multiprocessing.Queue(), multiprocessing.Queue()
    workers = [multiprocessing.Process(target=compiler, args=(tasks, done), daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    open_tasks, seen, failed = len(cases), set(), []
    for case in cases:
        tasks.put(case)
    while open_tasks:
        found = done.get()
        open_tasks -= 1
        if isinstance(found, str):
            failed.append(found)
            continue
        for kernel in found:
            if kernel not in seen:
                seen.add(kernel)
                open_tasks += 1
                tasks.put(kernel)
    for worker in workers:
        worker.kill()
    return {"kernels": len(seen), "seconds": round(time.perf_counter() - start), "failed": failed}


def serve() -> None:
    """One version: {"compile": cases}, {"prepare": cases} and {"time": case}, a line each, are answered by lines."""
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
        if "compile" in order:
            cases = [tuple(case) for case in order["compile"]]
            cases = [case for case in cases if can_round_on_load() or case not in LOADS]
            print(json.dumps(compile_kernels(cases, order["processes"])), flush=True)
        elif "prepare" in order:
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
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--networks", action="store_true", help="leave out convolutions alone")
    parser.add_argument("--compile", action="store_true", help="compile, and time nothing")
    parser.add_argument("--compiled", action="store_true", help="all is compiled")
    parser.add_argument("--processes", type=int, default=12, help="that compile, of each version")
    parser.add_argument("--output", type=Path, default=Path("times.json"))
    options = parser.parse_args()
    servers, by_folder = {}, {}
    for version in options.versions:
        name, _, folder = version.partition("=")
        by_folder.setdefault(folder, name)
        path = os.pathsep.join(filter(None, [str(ROOT), folder, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", "from benchmarks.versions import serve; serve()"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        servers[name] = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, **pipes)

    def ask_all(names: Iterable[str], **order: object) -> dict:
        with ThreadPoolExecutor() as pool:
            return dict(zip(names, pool.map(lambda name: ask(servers[name], **order), names)))

    chosen = [case for case in NETWORKS + CONVOLUTIONS + LOADS if case[0] in options.types]
    if options.networks:
        chosen = [case for case in chosen if "alone" not in case[2]]
    if not options.compiled:
        ours = [case for case in chosen if "PyTorch's" not in case[2]]
        for name, compiled in ask_all(by_folder.values(), compile=ours, processes=options.processes).items():
            print(name, compiled, flush=True)
    us: dict[str, dict[str, float]] = {}
    for dtype in () if options.compile else options.types:
        cases = [case for case in chosen if case[0] == dtype]
        ready: dict[Case, list[str]] = {case: [] for case in cases}
        told: dict = {}
        for name, answers in ask_all(servers, prepare=cases).items():
            for case, answer in answers:
                told |= answer
                if "failed" in answer:
                    print(name, *case, answer["failed"], flush=True)
                else:
                    ready[tuple(case)].append(name)
        samples: dict[str, dict[str, list[float]]] = {}
        for turn in range(4):
            for case in cases:
                key = " ".join(map(str, case))
                if turn >= 2 and not differ(us.get(key, {})):
                    continue
                for name in ready[case][:: -1 if turn % 2 else 1]:
                    for part, sample in ask(servers[name], time=case).get("us", {}).items():
                        samples.setdefault(key + part, {}).setdefault(name, []).append(sample)
            us |= {key: medians(of) for key, of in samples.items()}
        for case, found in us.items():
            if case.startswith(dtype):
                print(case, found, flush=True)
        run = {"gpu": told.get("gpu"), "torch": told.get("torch"), "date": datetime.date.today().isoformat()}
        run |= {"command": f"python benchmarks/versions.py {' '.join(servers)}", "us": us}
        options.output.write_text(json.dumps(run, indent=1) + "\n")
    for server in servers.values():
        server.stdin.close()
        server.wait()


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(taken), 2) for name, taken in samples.items()}


def differ(us: dict[str, float]) -> bool:
    """Whether times of versions do by more than 2 %."""
    return len(us) > 1 and max(us.values()) > 1.02 * min(us.values())


if __name__ == "__main__":
    main()
