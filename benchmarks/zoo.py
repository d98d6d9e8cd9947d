"""Times networks of torchvision and timm: PyTorch's ways to run them and ours, side by side on a GPU.

    python benchmarks/zoo.py
    python benchmarks/zoo.py --networks resnet50 timm/resnext50_32x4d --batch-sizes 64 --dtypes bf16
    python benchmarks/zoo.py --layers

Each network, type and batch size is a process of its own, and one at a time is timed on a GPU. A run that was
interrupted goes on where it stopped: the peers of a case that its folder has are not measured again, unless others are
missing and card or versions have changed. Ends with 0, 1 if a case failed, 2 on wrong use, 130 if it was interrupted or
its time was up.

How we stand, in ten minutes of one GPU, with as many processes that compile as there are cores:

    python benchmarks/zoo.py --peers graph compile-reduce-overhead fused-graph --dtypes bf16 \\
        --ahead 16 --compile-only --within 350
    python benchmarks/zoo.py --peers graph compile-reduce-overhead fused-graph --dtypes bf16 \\
        --together 16 --only-compiled --within 200

The first command compiles `fused-graph` of all cases, then `compile-reduce-overhead`, the strongest of PyTorch's; with
all peers these two come first, too. In the second one the cases get ready beside each other, and just before its end
those that are ready are timed with the peers that are. It prints, by type and batch size, the geometric mean and the
worst of our times against the best of PyTorch's, and of how many networks that is known. Both go on when called again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository's root

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from rich.console import Console

from benchmarks.cases import flags
from benchmarks.compare import RESULTS, Parser, count, positive, settings, slug
from benchmarks.measure import Say
from benchmarks.networks import cudnn_benchmark
from benchmarks.zoo_case import (
    BUDGET_S,
    PEERS,
    SHARED_BUDGET_S,
    Contest,
    ZooCase,
    ZooResult,
    compile_only,
    kernels_of,
    measure_layers,
)
from benchmarks.zoo_processes import INTERRUPTED, TIMED, Run, command_line, interrupted_after, turn
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
        help="processes that compile before anything is timed, what tells the most first, in at most half of --within: "
        "faster, but no first calls are measured (default: 0)",
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
    add(
        "--budget",
        type=positive_seconds,
        metavar="SECONDS",
        help=f"for the turns of a case (default: {BUDGET_S:g}; with --together {SHARED_BUDGET_S:g})",
    )
    add(
        "--within",
        type=positive_seconds,
        metavar="SECONDS",
        help="then it stops, and just before times what is ready; the same command goes on",
    )
    add("--again", action="store_true", help="measure these peers also where the folder has them")
    add("--report", action="store_true", help="only write page and picture of what the folder has")
    add("--child", choices=("measure", "compile"), help=argparse.SUPPRESS)
    for name in ("--shared", "--warm"):
        add(name, action="store_true", help=argparse.SUPPRESS)
    add("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.budget = args.budget or (SHARED_BUDGET_S if args.together > 1 else BUDGET_S)
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
    path = args.output / case.file
    with torch.no_grad(), flags(case.dtype), cudnn_benchmark(True):
        result = ZooResult.begun(path, case, environment(device) | settings(device))
        if args.layers:
            result.layers = measure_layers(case, device, say)
        else:
            contest = measured(args, case, device, say, result)
    result.save(path)
    say(TIMED)
    if args.kernels and not args.layers:
        with torch.no_grad(), flags(case.dtype):
            found = {name: kernels_of(call) for name, call in contest.calls.items()}
        (args.output / "kernels").mkdir(exist_ok=True)
        (args.output / "kernels" / case.file).write_text(json.dumps(found))


def measured(args: argparse.Namespace, case: ZooCase, device: torch.device, say: Say, result: ZooResult) -> Contest:
    """Adds to the result the peers that it lacks, those that are ready in time. Ends the process if none is."""
    contest = Contest(case, device, say)
    with suppress(KeyboardInterrupt), interrupted_after(args.until - time.time()):
        contest.get_ready([name for name in args.peers if args.again or name not in result.peers], args.until)
    if not contest.ready:
        say("none of its peers was ready in time")
        sys.exit(INTERRUPTED)
    with turn(device) as budget_s:
        peers = contest.timed(budget_s)
    short = [name for name, peer in peers.items() if args.shared and OUT_OF_MEMORY in peer.measured.note]
    if short:
        say(f"{', '.join(short)}: no memory left beside the others; the same command tries again")
    for name in short:
        del peers[name]
    if not peers:
        sys.exit(1)
    result.add({name: replace(peer, first_call_s=None) if args.warm else peer for name, peer in peers.items()})
    return contest


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
        status = INTERRUPTED
    found = write(folder, args.cases, args.peers, command_line())
    for table in rich_tables(found, args.cases, args.peers):
        console.print(table)
    console.print(f"written: {folder}")
    if status == INTERRUPTED:
        print(f"interrupted: {folder} has what was done; the same command goes on there", file=sys.stderr)
    return status


def main(arguments: Sequence[str] | None = None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    with user_errors_in_one_line():
        status = zoo(parse(arguments), console)
    sys.exit(status)


if __name__ == "__main__":
    main()
