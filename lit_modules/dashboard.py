"""What TensorBoard shows of an evaluation.

PyTorch and Triton are two runs with the same tags, so that each card has both. Layers carry their index, zero-padded,
so that the page reads in network order; the profile has the index as its step, and so is a curve over the network.
TensorBoard opens the first two groups: the overview and the profile.
"""

import shlex
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lit_modules import report
from lit_modules.evaluation_result import EvaluationResult, LatencyResult, Pair

SIDES = ("pytorch", "triton")
LABELS = {"pytorch": "PyTorch", "triton": "Triton"}
COLOURS = {"pytorch": "tab:orange", "triton": "tab:blue"}


def write(result: EvaluationResult, log_dir: Path) -> None:
    """Writes the runs `pytorch` and, where something was swapped, `triton` below the empty folder `log_dir`.

    Raises:
        OSError: the folder cannot be written.
    """
    for side in SIDES if result.proof.variants else SIDES[:1]:
        with SummaryWriter(str(log_dir / side)) as writer:
            metrics = _metrics(result, side)
            for tag, value in metrics.items():
                writer.add_scalar(tag, value, 0)
            if result.latency:
                _write_latency(writer, result.latency, side)
            _write_hyperparameters(writer, result, side, metrics)
            if side == SIDES[0]:
                _write_page(writer, result)


def how_to_open(log_dir: Path, port: int = 6006) -> str:
    return (
        f"TensorBoard:  tensorboard --logdir {shlex.quote(str(log_dir))} --port {port}\n"
        f"then open     http://localhost:{port}/?smoothing=0#timeseries"
    )


def _metrics(result: EvaluationResult, side: str) -> dict[str, float]:
    """Tag to value, the same tags for both sides, but for times that a network without swapped layers has not."""
    last = result.proof.main
    quality = last.quality if last and side == "triton" else result.proof.pytorch
    metrics = {"top-1": quality.top1, "top-5": quality.top5, "loss": quality.loss} if quality else {}
    logged = result.proof.sides.get(last.name if last and side == "triton" else "pytorch")
    if logged and not quality:
        metrics |= logged.metrics
    if last and last.agreement:  # PyTorch's are those of the yardstick: against itself in the other memory format
        agreement = last.agreement if side == "triton" else result.proof.yardstick_agreement
        metrics["differing predictions"] = agreement.differing
        metrics["largest logit difference x 1e6"] = agreement.largest_logit_difference * 1e6
        metrics["mean logit difference x 1e6"] = agreement.mean_logit_difference * 1e6
    if result.latency:
        for clock, breakdown in result.latency.breakdowns.items():
            metrics[f"{clock} ms, whole network"] = getattr(breakdown.network, side)
            metrics[f"{clock} ms, sum of the layers"] = getattr(breakdown.layers, side)
            metrics[f"{clock} ms, unattributed"] = getattr(breakdown.unattributed, side)
    named = enumerate(metrics.items())
    return {f"1_overview/{index:02d} {name}": value for index, (name, value) in named if value is not None}


def _write_latency(writer: SummaryWriter, latency: LatencyResult, side: str) -> None:
    def add(tag: str, pair: Pair, step: int = 0) -> None:
        value = getattr(pair, side)
        if value is not None:
            writer.add_scalar(tag, value, step)

    for clock, breakdown in latency.breakdowns.items():
        for kind, pair in breakdown.kinds.items():
            add(f"3_kinds_{clock}_ms/{kind}", pair)
        for name, pairs in latency.networks.items():
            add(f"4_network_{clock}_ms/{name}", pairs[clock])
        for row in latency.layers:
            add(f"2_profile/{clock} ms over the layers", row.medians[clock], row.index)
            add(f"5_layers_{clock}_ms/{row.index:03d} {row.name}", row.medians[clock])


def _write_hyperparameters(
    writer: SummaryWriter, result: EvaluationResult, side: str, metrics: dict[str, float]
) -> None:
    """One session a run. The table sorts by name and shows the first few."""
    settings = {
        "batch_size": result.batch_size,
        "checkpoint": result.checkpoint.path or "none",
        "device": result.environment["device"],
        "layers": result.triton_layers,
        "memory_format": result.memory_format,
        "precision": result.precision,
        "side": side,
        "weights": result.checkpoint.weights,
    }
    if result.checkpoint.epoch is not None:
        settings["epoch"] = result.checkpoint.epoch
    training = {f"training.{name}": value for name, value in result.parameters.items()}
    for summary in hparams(settings | training, metrics):
        writer.file_writer.add_summary(summary)


def _write_page(writer: SummaryWriter, result: EvaluationResult) -> None:
    """The tables as text and the charts, which hold both sides and so are written once."""
    for index, table in enumerate(reversed(report.tables(result))):
        writer.add_text(f"{index} {table.title}", report.table_markdown(table))
    if result.latency:
        for clock in result.latency.breakdowns:
            kinds = result.latency.breakdowns[clock].kinds
            writer.add_figure(f"6_charts/1 kinds, {clock} ms", _bars(f"Kinds of layers, {clock} ms", kinds))
            rows = {f"{row.index:03d} {row.name}": row.medians[clock] for row in result.latency.layers}
            writer.add_figure(f"6_charts/2 layers, {clock} ms", _bars(f"Layers, {clock} ms", rows))


def _bars(title: str, pairs: dict[str, Pair]) -> Figure:
    """Horizontal bars, PyTorch above Triton, in the order given from the top; narrow, as TensorBoard shrinks it."""
    figure = Figure(figsize=(5, 1.2 + 0.22 * max(len(pairs), 6)), layout="constrained", dpi=150)
    axes = figure.subplots()
    sides = [side for side in SIDES if any(getattr(pair, side) is not None for pair in pairs.values())]
    height = 0.8 / len(sides)
    for offset, side in enumerate(sides):
        values = [getattr(pair, side) or 0.0 for pair in pairs.values()]
        positions = [index + (offset - (len(sides) - 1) / 2) * height for index in range(len(pairs))]
        axes.barh(positions, values, height, label=LABELS[side], color=COLOURS[side])
    axes.set_yticks(range(len(pairs)), pairs, fontsize=8)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_xlabel("median ms")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure
