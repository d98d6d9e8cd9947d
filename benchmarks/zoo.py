"""Times networks of torchvision and timm: PyTorch's ways to run them and ours, side by side on a GPU.

    python benchmarks/zoo.py
    python benchmarks/zoo.py --networks resnet50 timm/resnext50_32x4d --batch-sizes 64 --dtypes bf16
    python benchmarks/zoo.py --layers

Each network, type and batch size is a process of its own, and one at a time is timed on a GPU. A run that was
interrupted goes on where it stopped: what its folder has is not measured again. Ends with 0, 1 if a case failed, 2 on
wrong use, 130 if it was interrupted.

Where minutes count, all of it compiled by many processes, then measured by processes that get ready beside each other:

    python benchmarks/zoo.py --compile-only --ahead 24 --within 150
    python benchmarks/zoo.py --only-compiled --together 16 --within 100
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository's root

import argparse
import json
import logging
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from rich.console import Console

from benchmarks.cases import flags
from benchmarks.compare import RESULTS, Parser, command, count, positive, settings, slug
from benchmarks.networks import cudnn_benchmark
from benchmarks.peers import Call
from benchmarks.zoo_case import (
    BUDGET_S,
    PEERS,
    ZooCase,
    ZooResult,
    compile_only,
    kernels_of,
    measure_layers,
    measure_network,
)
from benchmarks.zoo_report import rich_tables, write
from lit_modules.command_line import UserError, user_errors_in_one_line
from lit_modules.environment import environment
from tritonnn.command.networks import UserError as UnknownNetwork
from tritonnn.command.networks import maker
from tritonnn.compiler.measured import measuring_alone

NETWORKS = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "vgg16_bn",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "convnext_tiny",
)
DTYPES = ("bf16", "default")
SCRIPT = __file__
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITONNN_CACHE_DIR")
INTERRUPTED = 130
READY, TIMED = "ready to be timed", "timed"
"""What a process says of itself; after the first it waits for a line."""
FEW_ALGORITHMS = 5
"""Of cuDNN's for a convolution, the first by its own ranking, are timed where others wait for it; else ten."""
OUT_OF_MEMORY = "OutOfMemoryError"
DRAIN_S = 0.1
"""After which a GPU has done what a process that was stopped has launched."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="zoo.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="torchvision's names, timm/NAME, package:NAME")
    add("--batch-sizes", nargs="+", type=positive, default=(1, 64), metavar="N", help="(default: 1 64)")
    add("--dtypes", nargs="+", choices=("bf16", "fp16", "tf32", "fp32", "default"), default=DTYPES)
    add("--peers", nargs="+", choices=tuple(PEERS), default=tuple(PEERS), metavar="PEER", help=", ".join(PEERS))
    add("--layers", action="store_true", help="each distinct layer alone, PyTorch's beside ours, in place of networks")
    add("--output", type=Path, help="folder; default: benchmarks/results/<GPU>/zoo")
    add(
        "--ahead",
        type=count,
        metavar="N",
        default=0,
        help="processes that compile before anything is timed: faster, but no first calls are measured (default: 0)",
    )
    add("--compile-only", action="store_true", help="what --ahead compiles, and nothing is timed")
    add("--only-compiled", action="store_true", help="leave out what --ahead has not compiled, for this folder")
    add(
        "--together",
        type=positive,
        metavar="N",
        default=1,
        help="cases that get ready beside each other on a GPU; they are timed one at a time, while the others are "
        "stopped. Faster, but first calls say nothing (default: 1)",
    )
    add("--kernels", action="store_true", help="also which kernels a call of each peer launches, and their times")
    add("--budget", type=positive_seconds, metavar="SECONDS", default=BUDGET_S, help=f"a case (default: {BUDGET_S:g})")
    add("--within", type=positive_seconds, metavar="SECONDS", help="then it stops; the same command goes on")
    add("--again", action="store_true", help="measure also what the folder has")
    add("--report", action="store_true", help="only write page and picture of what the folder has")
    add("--child", choices=("measure", "compile"), help=argparse.SUPPRESS)
    add("--shared", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.cases = [ZooCase(name, dtype, n) for name in args.networks for n in args.batch_sizes for dtype in args.dtypes]
    for case in args.cases:
        try:
            maker(case.network)
        except UnknownNetwork as error:
            raise UserError(f"--networks: {error}") from error
    return args


def positive_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def child(args: argparse.Namespace) -> None:
    """Measures or compiles the one case of the arguments, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0)
    [case] = args.cases

    def say(line: str) -> None:
        print(line, flush=True)

    from torch._inductor import config as inductor  # slow to import

    inductor.autotune_num_choices_displayed = 0  # max-autotune would print ten lines a layer
    log = logging.getLogger("tritonnn")
    log.setLevel(logging.INFO)
    log.addHandler(logging.FileHandler(args.output / case.file.replace(".json", ".log"), "w"))
    log.propagate = False
    if args.child == "compile":
        with torch.no_grad(), flags(case.dtype):
            compile_only(case, device, args.peers[0])
        return
    if args.shared:
        torch.backends.cudnn.benchmark_limit = FEW_ALGORITHMS
    with torch.no_grad(), flags(case.dtype), cudnn_benchmark(True):
        result = ZooResult(case.task, case.dtype, case.batch_size, environment(device) | settings(device))
        if args.layers:
            result.layers = measure_layers(case, device, say)
        else:
            calls: dict[str, Call] = {}
            result.peers = measure_network(case, device, args.peers, say, args.budget, partial(turn, device), calls)
    short = [name for name, peer in result.peers.items() if OUT_OF_MEMORY in peer.measured.note]
    if short and args.shared:
        sys.exit(f"{', '.join(short)}: no memory left beside the others")
    result.save(args.output / case.file)
    say(TIMED)
    if args.kernels:
        with torch.no_grad(), flags(case.dtype):
            found = {name: kernels_of(call) for name, call in calls.items()}
        (args.output / "kernels").mkdir(exist_ok=True)
        (args.output / "kernels" / case.file).write_text(json.dumps(found))


@contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """While nobody else measures: waits until the parent has stopped the others."""
    with measuring_alone(device):
        print(READY, flush=True)
        if not sys.stdin.readline():  # the parent is gone
            sys.exit(INTERRUPTED)
        yield


class Run:
    """Hands the cases to processes, one at a time a GPU."""

    def __init__(self, args: argparse.Namespace, folder: Path, console: Console) -> None:
        self.args, self.folder, self.console = args, folder, console
        self.start = time.perf_counter()
        self.failed: list[str] = []
        self.processes: dict[subprocess.Popen, str] = {}
        """Those that run, and their GPUs."""
        self.stopped = False
        self.lock = threading.Lock()

    def say(self, line: str) -> None:
        with self.lock:
            self.console.print(f"[{time.perf_counter() - self.start:5.0f} s] {line}", markup=False, highlight=False)

    def run(self) -> int:
        todo = [case for case in self.args.cases if self._lacks(case, self.args.peers)]
        done = len(self.args.cases) - len(todo)
        self.say(f"{len(todo)} cases on {len(devices())} GPU{'s' * (len(devices()) > 1)}, {done} done before")
        try:
            if self.args.ahead and not self.args.layers:
                self._compile_ahead(todo)
            if not self.args.compile_only:
                self._measure([case for case in todo if self._lacks(case, self._peers(case))])
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            write(self.folder, self.args.cases, command_line())
        return 1 if self.failed else 0

    def _lacks(self, case: ZooCase, peers: Sequence[str]) -> bool:
        """Whether the folder has no result of the case with all these peers."""
        path = self.folder / case.file
        if self.args.again or not path.exists():
            return True
        return not self.args.layers and not set(peers) <= set(ZooResult.load(path).peers)

    def _peers(self, case: ZooCase) -> list[str]:
        """Those that are to be measured."""
        ready = [peer for peer in self.args.peers if not _compiles(peer) or self._mark(case, peer).exists()]
        return ready if self.args.only_compiled else list(self.args.peers)

    def _mark(self, case: ZooCase, peer: str) -> Path:
        """The file that says that a peer was compiled."""
        return self.folder / "compiled" / case.file.replace(".json", f"-{peer}")

    def _stop(self) -> None:
        self.stopped = True
        for process in list(self.processes):
            process.kill()

    def _compile_ahead(self, todo: list[ZooCase]) -> None:
        jobs = [(case, peer) for peer in self.args.peers if _compiles(peer) for case in todo]
        jobs = [job for job in jobs if not self._mark(*job).exists()]
        gpus = devices()

        def job(index: int) -> None:
            if self.stopped:
                return
            case, peer = jobs[index]
            status = self._child(case, "compile", [peer], gpus[index % len(gpus)], {}, quiet=True)
            if not status:
                self._mark(case, peer).parent.mkdir(exist_ok=True)
                self._mark(case, peer).touch()
            self.say(f"compiled ahead: {case.name} {peer}{' failed' if status else ''}")

        with ThreadPoolExecutor(self.args.ahead) as pool:
            try:
                list(pool.map(job, range(len(jobs))))
            except KeyboardInterrupt:
                self._stop()  # else the pool would wait for all of them
                raise

    def _measure(self, todo: list[ZooCase]) -> None:
        cases: queue.SimpleQueue[ZooCase] = queue.SimpleQueue()
        for case in todo:
            cases.put(case)

        def work(gpu: str) -> None:
            while not self.stopped:
                try:
                    case = cases.get_nowait()
                except queue.Empty:
                    return
                self._measure_one(case, gpu, len(todo) - cases.qsize(), len(todo))

        workers = devices() * (1 if self.args.layers else self.args.together)
        threads = [threading.Thread(target=work, args=(gpu,), daemon=True) for gpu in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that Ctrl-C is heard

    def _measure_one(self, case: ZooCase, gpu: str, number: int, of: int) -> None:
        self.say(f"{number} of {of}: {case.name} on GPU {gpu}")
        with tempfile.TemporaryDirectory() as caches:
            warm = self.args.ahead or self.args.together > 1
            cold = {} if warm else {name: f"{caches}/{name.lower()}" for name in CACHES}
            status = self._child(case, "measure", self._peers(case), gpu, cold)
        if status and not self.stopped:
            self.failed.append(case.name)
            self.say(f"{case.name}: failed, its process ended with {status}")
        elif not status:
            times, *_ = rich_tables([ZooResult.load(self.folder / case.file)])
            with self.lock:
                self.console.print(times)

    def _child(
        self, case: ZooCase, what: str, peers: Sequence[str], gpu: str, environment: dict[str, str], quiet: bool = False
    ) -> int:
        options = ["--networks", case.task, "--batch-sizes", str(case.batch_size), "--dtypes", case.dtype]
        options += ["--peers", *peers, "--output", str(self.folder), *["--layers"] * self.args.layers]
        options += ["--budget", str(self.args.budget), *["--shared"] * (self.args.together > 1)]
        options += ["--kernels"] * self.args.kernels
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "--child", what, *options],
            env=os.environ | environment | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.processes[process] = gpu
        if self.stopped:
            process.kill()
        last, alone = "", ExitStack()
        with alone:
            for line in process.stdout:
                last = line.strip() or last
                if last == READY:
                    alone.enter_context(self._others_stopped(process))
                    with suppress(BrokenPipeError):
                        process.stdin.write("go\n")
                        process.stdin.flush()
                elif last == TIMED:
                    alone.close()
                elif not quiet and line.strip():
                    self.say(f"  {case.name}: {line.rstrip()[:300]}")
        status = process.wait()
        del self.processes[process]
        if status and quiet and not self.stopped:
            self.say(f"  {case.name}: {last[:300]}")
        return status

    @contextmanager
    def _others_stopped(self, process: subprocess.Popen) -> Iterator[None]:
        """The other processes on its GPU; `turn` sees to it that none of them is measuring."""
        others = [other for other, gpu in list(self.processes.items()) if gpu == self.processes[process]]
        others.remove(process)
        for other in others:
            other.send_signal(signal.SIGSTOP)
        try:
            time.sleep(DRAIN_S if others else 0)
            yield
        finally:
            for other in others:
                other.send_signal(signal.SIGCONT)


def _compiles(peer: str) -> bool:
    return peer.startswith(("compile", "swap", "fus"))


def devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU; one without a name where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]) or [""]


def command_line() -> str:
    return command(sys.argv[1:]).replace("compare.py", "zoo.py")


@contextmanager
def interrupted_after(seconds: float | None) -> Iterator[None]:
    """KeyboardInterrupt after so many seconds, and where the process is asked to end."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def zoo(args: argparse.Namespace, console: Console) -> int:
    """Returns the status to end with; what was measured is written in any case."""
    if args.child:
        child(args)
        return 0
    if not torch.cuda.is_available() and not args.report:
        raise UserError("no CUDA GPU: times on anything else say nothing about the kernels")
    if args.output is None and not torch.cuda.is_available():
        raise UserError("--report without a GPU needs --output, the folder of a run")
    folder = args.output or RESULTS / slug(torch.cuda.get_device_name()) / ("zoo-layers" if args.layers else "zoo")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {error}") from error
    try:
        with interrupted_after(args.within):
            status = 0 if args.report else Run(args, folder, console).run()
    except KeyboardInterrupt:
        print(f"interrupted: {folder} has the cases that were done; the same command goes on there", file=sys.stderr)
        return INTERRUPTED
    for table in rich_tables(write(folder, args.cases, command_line())):
        console.print(table)
    console.print(f"written: {folder}")
    return status


def main(arguments: Sequence[str] | None = None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    with user_errors_in_one_line():
        status = zoo(parse(arguments), console)
    sys.exit(status)


if __name__ == "__main__":
    main()
