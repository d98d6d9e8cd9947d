"""What TensorBoard shows of an evaluation.

`pytorch`, `triton` and `fused` are three runs with the same tags, so that each card has all of them. The page reads
from top to bottom: the answer as a figure, the validations during training, curves over the layers in network order
(their steps are the layers' indices), and then single numbers as level lines. A fused kernel stands for the layers
whose work it does: its time counts where it multiplies, and the others take none. All has the evaluation's date, so
that TensorBoard does not show when each point was written; that of each run is a millisecond later, as TensorBoard
gives its colours in the order of their dates.
"""

import math
import shlex
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lit_modules.agreement import Agreement, Quality
from lit_modules.answer import precision
from lit_modules.dashboard.figures import answer_figure, layers_figure, won_and_lost_figure
from lit_modules.dashboard.style import LIGHT, Theme, png
from lit_modules.evaluation_result import Epoch, EvaluationResult, LatencyResult, LayerRow, Proof, timing
from lit_modules.report import answer_markdown
from lit_modules.report_tables import tables
from lit_modules.tables import table_preformatted
from tritonnn.latency import Latency

LOOK = "?smoothing=0#timeseries&_smoothingWeight=0"
"""The end of TensorBoard's address: it opens "Time series", and smooths no curve there or in "Custom scalars"."""
RUNS = ("pytorch", "triton", "fused")
UP_TO_LAYER, OF_LAYER = "3_layers/1 ms of all layers up to this one", "3_layers/2 ms of each layer"
QUANTILES = {
    "median": OF_LAYER,
    "p10": "7_percentiles/1 ms of each layer, 10th percentile",
    "p90": "7_percentiles/2 ms of each layer, 90th percentile",
}
"""By the quantile of a `Timing`, its tag."""
LEVEL = (0, 1)
"""The steps of a single number. Of three points TensorBoard takes the outer ones for outliers, and shows one."""


def write(result: EvaluationResult, log_dir: Path, theme: Theme = LIGHT) -> None:
    """Writes a run for each side that there is, of `RUNS`, below the empty folder `log_dir`.

    Raises:
        OSError: the folder cannot be written.
    """
    for run in runs_of(result):
        with SummaryWriter(str(log_dir / run)) as writer:
            date = datetime.fromisoformat(result.environment["date"]).timestamp() + RUNS.index(run) / 1000
            numbers = _numbers(result, run)
            for tag, value in numbers.items():
                for step in LEVEL:
                    writer.add_scalar(tag, value, step, date)
            write_epochs(writer, result.epochs, run, date)
            if result.latency and _is_timed(result, run):
                for tag, step, value in _curves(result.latency, run):
                    writer.add_scalar(tag, value, step, date)
            _write_hyperparameters(writer, result, run, numbers)
            if run == RUNS[0]:
                _write_page(writer, result, theme, date)


def remove(log_dir: Path) -> None:
    """What an earlier `write` left in a folder; anything else there stays."""
    for run in RUNS:
        for events in (log_dir / run).glob("events.out.tfevents.*"):
            events.unlink()
        if (log_dir / run).is_dir() and not any((log_dir / run).iterdir()):
            (log_dir / run).rmdir()


def runs_of(result: EvaluationResult) -> list[str]:
    variants = result.proof.variants
    present = True, any(not variant.fused for variant in variants), any(variant.fused for variant in variants)
    return [run for run, there in zip(RUNS, present, strict=True) if there]


def how_to_open(log_dir: Path, port: int = 6006) -> str:
    return (
        f"TensorBoard:  tensorboard --logdir {shlex.quote(str(log_dir))} --port {port}\n"
        f"then open     http://localhost:{port}/{LOOK}"
    )


def write_epochs(writer: SummaryWriter, epochs: list[Epoch], run: str, date: float | None = None) -> None:
    """Curves over training: what a side reached in each validation, the same tags for both.

    Args:
        date: seconds since 1970; None is now.
    """
    for epoch in epochs:
        for name, value in epoch.metrics.get(run, {}).items():
            writer.add_scalar(f"2_training/{name} after each epoch".replace("val/", ""), value, epoch.epoch, date)
        if run in epoch.batch_ms:
            writer.add_scalar("2_training/wall-clock ms a batch", epoch.batch_ms[run], epoch.epoch, date)


def _numbers(result: EvaluationResult, run: str) -> dict[str, float]:
    """Tag to value, the same tags for all runs, but for times that were not taken."""
    proof = result.proof
    variant = {"pytorch": None, "triton": proof.main, "fused": proof.fused}[run]
    name = variant.name if variant else "pytorch"
    quality: Quality | None = variant.quality if variant else proof.pytorch
    agreement: Agreement | None = variant.agreement if variant else proof.yardstick_agreement
    numbers: dict[str, float] = {}
    if result.latency and name in result.latency.network_timings:
        latency, first = result.latency.network_timings[name], result.latency.clock
        for clock in result.latency.breakdowns:
            numbers[f"{'' if clock == first else clock + ' '}ms a batch"] = timing(latency, clock).median
    if quality:
        numbers |= {"top-1": quality.top1, "top-5": quality.top5, "loss": quality.loss}
    if name in proof.sides:
        again = _logged_again(proof)
        numbers |= {metric: value for metric, value in proof.sides[name].metrics.items() if metric not in again}
    if agreement and proof.variants:  # PyTorch's are those of the yardstick: against itself in the other memory format
        numbers["predictions that differ from PyTorch's"] = agreement.differing
    if proof.float64 and name in proof.float64.errors:
        numbers["mean error against float64 x 1e6"] = proof.float64.errors[name].mean * 1e6
    return {f"4_network/{index} {name}": value for index, (name, value) in enumerate(numbers.items(), 1)}


def _logged_again(proof: Proof) -> set[str]:
    """Names of the metrics that the module logs and that the predictions have told already, as "test/top1"."""
    quality = proof.pytorch
    told = {"top1": quality.top1, "top5": quality.top5, "loss": quality.loss} if quality else {}
    logged = {metric: (value, metric.rpartition("/")[2]) for metric, value in proof.sides["pytorch"].metrics.items()}
    return {m for m, (value, name) in logged.items() if name in told and math.isclose(value, told[name], rel_tol=1e-4)}


def _is_timed(result: EvaluationResult, run: str) -> bool:
    if run == "fused":
        return bool(result.latency.kernels)
    return run == "pytorch" or any(row.triton for row in result.latency.layers)


def _curves(latency: LatencyResult, run: str) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value: over all layers, over those of each kind, and a point for each layer."""
    kinds: dict[str, float] = dict.fromkeys(latency.breakdowns[latency.clock].kinds, 0.0)
    calls = Counter(row.kind for row in latency.layers)
    total = 0.0
    for row, ms, measured in _layer_times(latency, run):
        total += ms
        kinds[row.kind] += ms
        yield UP_TO_LAYER, row.index, total
        for quantile, tag in QUANTILES.items():
            yield tag, row.index, getattr(timing(measured, latency.clock), quantile) if measured else 0.0
        for step in [row.index] if calls[row.kind] > 1 else LEVEL:  # of one there is no curve
            yield f"5_kinds_ms/{row.kind} up to this layer", step, kinds[row.kind]
        for step in LEVEL:
            yield f"6_layers_ms/{row.index:03d} {row.name}", step, ms


def _layer_times(latency: LatencyResult, run: str) -> list[tuple[LayerRow, float, Latency | None]]:
    """Each layer in network order, its milliseconds and what they were read from: None where another's kernel does it.

    A kernel stands where it multiplies, or at the first of its layers.
    """
    times: list[tuple[LayerRow, float, Latency | None]] = []
    for layers, kernel in latency.blocks():
        stands = next((row for row in layers if row.kind in ("conv2d", "linear")), layers[0])
        for row in layers:
            measured: Latency | None
            if run == "fused" and kernel is not None:
                measured = kernel.latency if row is stands else None
            else:
                measured = row.triton if run != "pytorch" and row.triton else row.pytorch
            times.append((row, timing(measured, latency.clock).median if measured else 0.0, measured))
    return sorted(times, key=lambda time: time[0].index)


def _write_hyperparameters(
    writer: SummaryWriter, result: EvaluationResult, run: str, numbers: dict[str, float]
) -> None:
    """One session a run. The table sorts by name and shows the first few: numbers put what was compared first.

    Counts are text: the table shows numbers with a decimal point.
    """
    checkpoint = result.checkpoint
    layers = {"pytorch": "none", "triton": result.proof.main and result.proof.main.name, "fused": "fused"}[run]
    compared = {
        "side": run,
        "Triton layers": layers or "none",
        "device": result.environment["device"],
        "precision": precision(result),
        "batch size": result.batch_size,
        "memory format": result.memory_format,
        "network": result.network,
        "checkpoint": checkpoint.path or "none",
        "epoch": "none" if checkpoint.epoch is None else checkpoint.epoch,
        "weights": checkpoint.weights,
    }
    settings = {f"{index:02d} {name}": value for index, (name, value) in enumerate(compared.items(), 1)}
    training = {f"training.{name}": value for name, value in result.parameters.items()}
    shown = {name: str(value) if isinstance(value, int) else value for name, value in (settings | training).items()}
    for summary in hparams(shown, numbers):
        writer.file_writer.add_summary(summary)


def _write_page(writer: SummaryWriter, result: EvaluationResult, theme: Theme, date: float) -> None:
    """The figures, the tables as text and the custom charts, which hold all sides and so are written once."""

    def add(tag: str, figure: Figure) -> None:
        width, height = map(int, figure.bbox.size)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png(figure))
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), 0, date)

    add("1_answer/1 the answer", answer_figure(result, theme))
    if result.latency and len(runs_of(result)) > 1 and result.latency.comparable:
        add("1_answer/2 every layer in network order", layers_figure(result, theme))
        add("1_answer/3 won and lost", won_and_lost_figure(result, theme))
    pages = {"The answer": answer_markdown(result)} | {t.title: table_preformatted(t) for t in tables(result)}
    for index, (title, page) in enumerate(pages.items(), 1):
        writer.file_writer.add_summary(text_pb(f"{index} {title}", page), 0, date)
    if result.latency:
        writer.add_custom_scalars(_layout(result.latency))


def _layout(latency: LatencyResult) -> dict[str, dict[str, list]]:
    """The few curves that matter, for the page "Custom scalars"."""
    quantiles = [QUANTILES["median"], QUANTILES["p10"], QUANTILES["p90"]]
    calls = Counter(row.kind for row in latency.layers)
    several = [kind for kind in latency.breakdowns[latency.clock].kinds if calls[kind] > 1]  # of one there is no curve
    layout = {
        "Layers, in network order": {
            "all layers up to this one, ms": ["Multiline", [UP_TO_LAYER]],
            "each layer, ms: median, 10th to 90th percentile": ["Margin", quantiles],
        },
    }
    if several:
        layout["Kinds of layers"] = {
            f"{kind}, all up to this one, ms": ["Multiline", [f"5_kinds_ms/{kind} up to this layer"]]
            for kind in several
        }
    return layout
