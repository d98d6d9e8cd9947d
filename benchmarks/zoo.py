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
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from rich.console import Console

from benchmarks.cases import flags
from benchmarks.compare import RESULTS, Parser, count, positive, settings, slug
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
from benchmarks.zoo_processes import INTERRUPTED, TIMED, Run, command_line, turn
from benchmarks.zoo_report import rich_tables, write
from lit_modules.command_line import UserError, user_errors_in_one_line
from lit_modules.environment import environment
from tritonnn.command.networks import UserError as UnknownNetwork
from tritonnn.command.networks import maker

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
FEW_ALGORITHMS = 5
"""So many of cuDNN's algorithms, the first by its own ranking, are timed where other cases wait; else ten."""
OUT_OF_MEMORY = "OutOfMemoryError"


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
