"""Times PyTorch's ways to run ResNet18, and its layers, against Triton's, side by side on a GPU.

    python benchmarks/compare.py

Ends with 0, 1 if the GPU was lost on the way, 2 on wrong use, 130 if it was interrupted.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository's root

import argparse
import os
import re
import shlex
import time
from collections.abc import Sequence

import torch
from rich.console import Console

from benchmarks import ahead, plots, report
from benchmarks.cases import BATCH_SIZES, DTYPES, Case, affordable, flags, select
from benchmarks.layers import LAYER_PEERS, layer_peers_of, layers_result, unavailable
from benchmarks.measure import Say, network_result, peers_of, release
from benchmarks.networks import cudnn_benchmark
from benchmarks.peers import PEERS
from benchmarks.results import Results, load, save
from benchmarks.timing import DeviceLost, ceilings, failure
from lit_modules.command_line import UserError, user_errors_in_one_line
from lit_modules.environment import environment
from lit_modules.tables import Table, rich_table

RESULTS = Path(__file__).resolve().parent / "results"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def minutes(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise ValueError
    return number


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="compare.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--cases", nargs="+", metavar="NAME", help="names of cases, shell wildcards allowed: cifar-bf16-1024 'layers-*'"
    )
    add("--batch-sizes", nargs="+", type=positive, metavar="N", help=f"of {', '.join(map(str, BATCH_SIZES))} or any")
    add("--dtypes", nargs="+", choices=tuple(DTYPES))
    add(
        "--peers",
        nargs="+",
        choices=(*PEERS, *LAYER_PEERS),
        metavar="PEER",
        help=f"networks: {', '.join(PEERS)}; layers: {', '.join(LAYER_PEERS)}",
    )
    add("--all", action="store_true", help="every case rather than the most important ones")
    add("--minutes", type=minutes, default=8.0, help="start no case that would last longer (default: %(default)s)")
    add(
        "--ahead",
        type=count,
        metavar="N",
        default=max(min((os.cpu_count() or 1) // 2, 8), 1),
        help="processes that compile before anything is timed; 0: none (default: %(default)s here)",
    )
    add("--output", type=Path, help="folder; default: benchmarks/results/<GPU>/compare")
    add(
        "--report", type=Path, metavar="JSON", help="only write page and pictures of an earlier run, beside its results"
    )
    add("--list", action="store_true", help="print the names of the cases, in order, and end")
    args = parser.parse_args(arguments)
    try:
        args.selected = select(args.cases, args.batch_sizes, args.dtypes, args.all)
    except ValueError as error:
        raise UserError(f"--cases: {error}") from error
    args.selected = [case for case in args.selected if names_of(case, args.peers)]
    if not args.selected:
        raise UserError(
            "no case is left that has one of --peers: see --help for which are networks and which are layers"
        )
    return args


def names_of(case: Case, wanted: Sequence[str] | None) -> list[str]:
    return layer_peers_of(wanted) if case.task == "layers" else peers_of(case, wanted)


def compare(args: argparse.Namespace, console: Console) -> int:
    """Returns the status to end with; what was measured is written in any case."""
    if not torch.cuda.is_available():
        raise UserError("no CUDA GPU: times on anything else say nothing about the kernels")
    device = torch.device("cuda", torch.cuda.current_device())
    folder = args.output or RESULTS / slug(torch.cuda.get_device_name(device)) / "compare"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {error}") from error
    start = time.perf_counter()

    def say(line: str) -> None:
        console.print(f"[{time.perf_counter() - start:5.0f} s] {line}", markup=False, highlight=False)

    from torch._inductor import config as inductor  # slow to import

    inductor.autotune_num_choices_displayed = 0  # max-autotune would print ten lines a layer
    with cudnn_benchmark(True):
        results = Results(described(device), settings(device), ceilings(device, flags))
        for name, value in results.ceilings.items():
            say(f"ceiling: {name.split()[0]} {value:,.0f} {name.split()[-1]}")
        for reason in unavailable(LAYER_PEERS).values():
            results.notes.append(reason)
            say(reason)
        try:
            run(args, device, results, folder, say, console)
        except DeviceLost as error:
            results.notes.append(f"The GPU was lost: {error}")
            print(f"error: the GPU was lost: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            results.notes.append("Interrupted: the case that ran then, and those after it, are missing.")
            print(f"interrupted: {folder} has the cases that were done", file=sys.stderr)
            return 130
        finally:
            write(results, folder, plots.save_plots(results, folder))
    if results.networks:
        console.print(rich_table(report.summary_table(results)))
    say(f"written: {folder}")
    return 0


def run(
    args: argparse.Namespace, device: torch.device, results: Results, folder: Path, say: Say, console: Console
) -> None:
    start = time.perf_counter()
    if args.ahead:
        todo = ahead.jobs((case, names_of(case, args.peers)) for case in args.selected)
        ahead.compile_ahead(todo, args.ahead, say)
    budget_s = args.minutes * 60 - (time.perf_counter() - start)
    for case, fits in affordable(args.selected, budget_s, time.perf_counter):
        if not fits:
            results.skipped.append(case.name)
            say(f"{case.name}: skipped, no time is left for it (--minutes {args.minutes:g})")
            continue
        say(case.name)
        try:
            with flags(case.dtype):
                table = measured(case, device, args.peers, results, say)
        except DeviceLost:
            raise
        except Exception as error:
            results.notes.append(f"{case.name} failed: {failure(error, device)}")
            say(results.notes[-1])
        else:
            console.print(rich_table(table))
            write(results, folder, [])
        release(device)


def measured(case: Case, device: torch.device, peers: Sequence[str] | None, results: Results, say: Say) -> Table:
    """Runs the case, adds what it found to `results` and returns what a terminal shows of it."""
    if case.task == "layers":
        results.layers.append(layers_result(case, device, peers, say))
        return report.totals_table(results.layers[-1])
    results.networks.append(network_result(case, device, peers, say))
    return report.network_table(results.networks[-1])


def write(results: Results, folder: Path, pictures: list[str]) -> None:
    save(results, folder / "results.json")
    (folder / "README.md").write_text(report.markdown(results, pictures))


def report_again(path: Path) -> None:
    try:
        results = load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--report: {path}: {error}") from error
    write(results, path.parent, plots.save_plots(results, path.parent))


def described(device: torch.device) -> dict[str, str]:
    return environment(device) | {"command": command(sys.argv[1:])}


def command(arguments: Sequence[str]) -> str:
    """The command line without the output folder, which has nothing to do with the measurement."""
    words, rest = [], iter(arguments)
    for word in rest:
        if word == "--output":
            next(rest, None)
        elif not word.startswith("--output="):
            words.append(word)
    return shlex.join(["python", "benchmarks/compare.py", *words])


def settings(device: torch.device) -> dict[str, str]:
    return {
        "gradients": "torch.no_grad() throughout",
        "cudnn.benchmark": "on",
        "L2": f"{torch.cuda.get_device_properties(device).L2_cache_size / 2**20:.0f} MiB",
    }


def slug(name: str) -> str:
    """ "NVIDIA H200" is "h200"."""
    words = re.findall("[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "amd")) or "gpu"


def main(arguments: Sequence[str] | None = None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    with user_errors_in_one_line():
        args = parse(arguments)
        if args.list:
            print("\n".join(case.name for case in args.selected))
            return
        if args.report:
            report_again(args.report)
            return
        status = compare(args, console)
    sys.exit(status)


if __name__ == "__main__":
    main()
