"""The figures of an evaluation: the answer, the layers in network order, and what each variant wins or loses."""

import math
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lit_modules.answer import SAME, answer, faster, milliseconds, variant_label
from lit_modules.dashboard.style import HEIGHT, LARGE, MEDIUM, SMALL, TINY, WIDTH, Theme, bare, new_figure
from lit_modules.evaluation_result import EvaluationResult, KernelRow, LatencyResult, LayerRow, Variant, timing

LABELS = {"pytorch": "PyTorch", "triton": "Triton, layer by layer", "fused": "Triton, fused"}
MARGIN = 0.035
LETTER = 0.85
"""The width of a letter in pixels, by its size in points."""
MOST_LABELS = 60
"""Names below a chart of layers; of more, some are left out."""
LONGEST = 12
"""Letters of such a name; the rest of a longer one is left out."""


@dataclass(frozen=True)
class Bar:
    """A version of the network: how long its bar is, what is written beside it, and whether it is one to run."""

    label: str
    side: str
    length: float
    value: str
    note: str
    main: bool


def answer_figure(result: EvaluationResult, theme: Theme) -> Figure:
    """What was found: the headline, the proof, the network's times as bars, the errors, and on what that was.

    What one would run comes first, then single kinds of layers. Where Triton's times say nothing, the bars are the
    errors.
    """
    said, figure = answer(result), new_figure(theme)
    proved = result.passed and bool(result.proof.variants)
    colour = theme.good if proved else theme.faint if result.passed else theme.bad
    _write(figure, 0.925, said.headline, LARGE, theme.ink, weight="bold")
    _write(figure, 0.83, ("\N{CHECK MARK} " if proved else "") + said.proof, MEDIUM, colour, weight="bold")
    latency = result.latency
    if latency and latency.comparable and result.proof.variants:
        _draw_bars(figure, _time_bars(result, latency), theme)
        for height, line in zip((0.185, 0.12), said.errors.split(": ", 1), strict=False):
            _write(figure, height, line, SMALL, theme.ink)
    else:
        if bars := _error_bars(result):
            _write(figure, 0.74, "Mean error of the outputs against float64", SMALL, theme.ink)
            _draw_bars(figure, bars, theme, top=0.7)
        if latency:
            ms = milliseconds(timing(latency.network_timings["pytorch"], latency.clock).median)
            elsewhere = "" if latency.comparable else ". `make dashboard` shows times of Triton on a GPU"
            _write(figure, 0.12, f"PyTorch takes {ms} ms a batch{elsewhere}", SMALL, theme.ink)
    _write(figure, 0.045, said.conditions, TINY, theme.faint)
    return figure


def layers_figure(result: EvaluationResult, theme: Theme) -> Figure:
    """A group of bars for each layer, or for the layers that share a fused kernel, in network order."""
    latency = result.latency
    clock, blocks = latency.clock, list(latency.blocks())
    sides = [side for side in ("pytorch", "triton", "fused") if _has(result, side)]
    figure = new_figure(theme, max(WIDTH, 0.32 * len(blocks)), HEIGHT)
    axes = figure.add_axes((0.07, 0.3, 0.92, 0.52))
    bare(axes, theme)
    width = 0.84 / len(sides)
    for place, side in enumerate(sides):
        times = [block_ms(layers, kernel, side, clock) for layers, kernel in blocks]
        at = [index + (place - (len(sides) - 1) / 2) * width for index in range(len(blocks))]
        axes.bar(at, times, 0.92 * width, color=theme.sides[side], zorder=2)
    bounds = [_bound(layers, kernel, "fused" in sides) for layers, kernel in blocks]
    for index, bound in enumerate(bounds):
        if bound:
            axes.hlines(bound, index - 0.47, index + 0.47, color=theme.ink, linewidth=2, zorder=3)
    _name_blocks(axes, _short([_name(layers) for layers, _ in blocks]), theme)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.grid(axis="y", color=theme.line, zorder=0)
    axes.set_ylabel("ms", color=theme.faint, size=SMALL)
    legend: list[Artist] = [Patch(color=theme.sides[side], label=LABELS[side]) for side in sides]
    if any(bounds):
        legend.append(Line2D([], [], color=theme.ink, linewidth=2, label="roofline"))
    title = "Every layer in network order" + (", grouped by fused kernel" if latency.kernels else "")
    _write(figure, 0.925, title, MEDIUM, theme.ink, weight="bold")
    figure.legend(
        handles=legend,
        loc="upper left",
        bbox_to_anchor=(0.022, 0.9),
        ncols=4,
        frameon=False,
        fontsize=SMALL,
        labelcolor=theme.ink,
        handlelength=1.1,
        columnspacing=1.2,
    )
    return figure


def won_and_lost_figure(result: EvaluationResult, theme: Theme) -> Figure:
    """Milliseconds that each version of the network saves a batch, the largest first, or, of one version, each kind."""
    latency = result.latency
    clock = latency.clock
    whole = timing(latency.network_timings["pytorch"], clock).median
    variants = {variant.name: variant for variant in result.proof.variants}
    pairs = {variant_label(variants[name]): pair[clock] for name, pair in latency.networks.items()}
    title = "What each version of the network saves"
    if sum(not variant.fused for variant in variants.values()) < 2:
        pairs |= {f"{kind} layers": pair for kind, pair in latency.breakdowns[clock].kinds.items()}
        title = "What each kind of layer saves"
    saved = {label: pair.pytorch - pair.triton for label, pair in pairs.items() if pair.triton is not None}
    order = sorted(saved, key=lambda label: -saved[label])
    fused = {variant_label(variant) for variant in variants.values() if variant.fused}
    figure = new_figure(theme)
    axes = figure.add_axes((0.27, 0.12, 0.70, 0.74))
    bare(axes, theme)
    colours = [theme.sides["fused" if label in fused else "triton"] for label in order]
    axes.barh(range(len(order)), [saved[label] for label in order], 0.7, color=colours)
    axes.axvline(0, color=theme.faint, linewidth=1)
    for index, label in enumerate(order):
        text, colour = f"{milliseconds(abs(saved[label]))} ms saved", theme.ink
        if abs(saved[label]) < SAME * whole:
            text, colour = "about as fast", theme.faint
        elif saved[label] < 0:
            text, colour = text.replace("saved", "lost"), theme.bad
        at = (max(saved[label], 0), index)
        axes.annotate(text, at, (8, 0), textcoords="offset points", va="center_baseline", size=SMALL, color=colour)
    most = max(map(abs, saved.values()), default=1.0)
    axes.set_xlim(1.05 * min(0, *saved.values()), 1.35 * max(0.3 * most, *saved.values()))
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_yticks(range(len(order)), order, size=SMALL, color=theme.ink, va="center_baseline")
    axes.set_xticks([])
    _write(figure, 0.925, title, MEDIUM, theme.ink, weight="bold")
    _write(figure, 0.045, f"Of PyTorch's {milliseconds(whole)} ms · {answer(result).conditions}", TINY, theme.faint)
    return figure


def block_ms(layers: list[LayerRow], kernel: KernelRow | None, side: str, clock: str) -> float | None:
    """The time of the layers that share a kernel; what was not swapped or fused counts as PyTorch's."""
    if side == "fused" and kernel is not None:
        return kernel.medians[clock]
    pairs = [layer.medians[clock] for layer in layers]
    if side == "triton":
        return sum(pair.pytorch if pair.triton is None else pair.triton for pair in pairs)
    return sum(pair.pytorch for pair in pairs)


def _time_bars(result: EvaluationResult, latency: LatencyResult) -> list[Bar]:
    ms = timing(latency.network_timings["pytorch"], latency.clock).median
    bars = [Bar("PyTorch", "pytorch", ms, f"{milliseconds(ms)} ms", "", True)]
    for variant in result.proof.variants:
        pair = latency.networks[variant.name][latency.clock]
        bars.append(_bar_of(result, variant, pair.triton, f"{milliseconds(pair.triton)} ms", faster(pair.speedup)))
    return bars


def _error_bars(result: EvaluationResult) -> list[Bar]:
    errors = result.proof.float64.errors if result.proof.float64 else {}
    if "pytorch" not in errors:
        return []
    mean = errors["pytorch"].mean
    bars = [Bar("PyTorch", "pytorch", _finite(mean), f"{mean:.1e}", "", True)]
    for variant in result.proof.variants:
        if variant.name in errors:
            mean = errors[variant.name].mean
            bars.append(_bar_of(result, variant, _finite(mean), f"{mean:.1e}", ""))
    return bars


def _finite(length: float) -> float:
    return length if math.isfinite(length) else 0.0


def _bar_of(result: EvaluationResult, variant: Variant, length: float, value: str, note: str) -> Bar:
    main = variant.fused or variant is result.proof.main
    return Bar(variant_label(variant), "fused" if variant.fused else "triton", length, value, note, main)


def _draw_bars(figure: Figure, bars: list[Bar], theme: Theme, top: float = 0.78) -> None:
    """The main ones first, each half as high again as one of the others."""
    left, width = 0.285, 0.695
    axes = figure.add_axes((left, 0.235, width, top - 0.235))
    bare(axes, theme)
    bars = sorted(bars, key=lambda bar: not bar.main)
    heights = [1.0 if bar.main else 0.66 for bar in bars]
    whole = max(sum(heights), 3.0)
    share = 1.0  # of the width that is left to the longest bar, beside what is written
    longest = max(bar.length for bar in bars) or 1.0
    for bar, height, end in zip(bars, heights, accumulate(heights), strict=True):
        at, size = end - height / 2, min(MEDIUM - 5, 190 * height / whole)
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center_baseline"}
        axes.barh(at, bar.length, 0.78 * height, color=theme.sides[bar.side], alpha=1.0 if bar.main else 0.55)
        fitting = min(size, left * figure.bbox.width / (LETTER * len(bar.label) + 1))
        axes.annotate(bar.label, (0, at), (-6, 0), color=theme.ink, ha="right", size=fitting, **beside)
        value = axes.annotate(bar.value, (bar.length, at), (8, 0), color=theme.ink, size=size, **beside)
        beside |= {"size": size, "weight": "bold" if bar.main else "normal"}
        colour = theme.bad if "slower" in bar.note else theme.ink
        axes.annotate(bar.note, (1, at), (12, 0), xycoords=(value, "data"), color=colour, **beside)
        written = LETTER * size * (len(bar.value) + len(bar.note) + 3) / (width * figure.bbox.width)
        share = min(share, (1 - written) * longest / (bar.length or longest))
    axes.set_xlim(0, longest / share)
    axes.set_ylim(whole, 0)
    axes.set_xticks([])
    axes.set_yticks([])


def _has(result: EvaluationResult, side: str) -> bool:
    latency = result.latency
    if side == "fused":
        return latency.comparable and bool(latency.kernels)
    return side == "pytorch" or (latency.comparable and any(row.triton for row in latency.layers))


def _bound(layers: list[LayerRow], kernel: KernelRow | None, fused: bool) -> float | None:
    """The bound of the kernel, or without one the sum of the layers' bounds."""
    if fused and kernel is not None:
        return kernel.bound_ms
    return sum(layer.bound_ms or 0.0 for layer in layers) or None


def _name_blocks(axes: Axes, names: list[str], theme: Theme) -> None:
    """Writes below each group the last part of its name and, once for all that share it, what stands before that."""
    step = -(-len(names) // MOST_LABELS)
    size = SMALL - 2.0
    parents, parts = zip(*[name.rpartition(".")[::2] for name in names], strict=True)
    shown = [part if len(part) <= LONGEST else part[: LONGEST - 1] + "…" for part in parts]
    axes.set_xticks(range(0, len(names), step), shown[::step], size=size)
    for label in axes.get_xticklabels():
        label.set(rotation=55, ha="right", rotation_mode="anchor")
    below: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    first = 0
    for parent, group in groupby(parents):
        last = first + len(list(group)) - 1
        if parent:
            axes.hlines(-0.31, first - 0.42, last + 0.42, color=theme.faint, linewidth=1.5, **below)
            room = axes.bbox.width / LETTER * (last - first + 1) / len(names)  # for letters of one point
            text = parent if room / len(parent) >= size else "\n".join(filter(None, parent.partition(".")[::2]))
            fitting = min(size, room / max(map(len, text.split("\n"))))
            middle = (first + last) / 2
            axes.text(middle, -0.33, text, size=fitting, color=theme.faint, ha="center", va="top", **below)
        first = last + 1


def _name(layers: list[LayerRow]) -> str:
    """The name of the layer that multiplies, or of the first."""
    return next((layer.name for layer in layers if layer.kind in ("conv2d", "linear")), layers[0].name)


def _short(names: list[str]) -> list[str]:
    """The names without the part that all of them begin with."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]


def _write(figure: Figure, height: float, text: str, size: float, colour: str, **style: Any) -> None:
    """A line at the left margin, smaller where it would not fit."""
    line = figure.text(MARGIN, height, text, size=size, color=colour, va="center_baseline", **style)
    room = (1 - 2 * MARGIN) * figure.bbox.width
    width = line.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width
    line.set_size(size * min(1.0, room / max(width, 1.0)))
