"""The zoo's results as tables, a page and a picture."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table as RichTable

from benchmarks.results import OK
from benchmarks.zoo_case import OURS, PEERS, PYTORCH, Layer, ZooCase, ZooResult
from lit_modules.tables import Table, rich_table, table_markdown

Key = tuple[str, int]
"""Type and batch size."""
A_TENTH_SLOWER = 1 / 1.1
STRONGEST = "compile-reduce-overhead"
"""Where others have it, a network without it has no best of PyTorch's to be compared with."""
NOTES = {
    "*": "*: taken in another run than the others of the row; times drift by a few per cent from run to run.",
    ")": f"In brackets, and not counted: {STRONGEST} is missing.",
}
"""By the character in which a cell ends."""


def rich_tables(results: Sequence[ZooResult], cases: Sequence[ZooCase], peers: Sequence[str]) -> list[RichTable]:
    """For a terminal, with what matters most at the end."""
    found = []
    for table in [*tables(results), *summary(results, cases, peers)]:
        found.append(rich_table(table))
        found[-1].caption, found[-1].caption_justify = table.note or None, "left"
    return found


def in_a_line(result: ZooResult) -> str:
    times = ", ".join(f"{name} {_cell(result, name)}" for name in result.peers)
    ratios = [(name, ratio) for name in OURS for ratio in speeds([result], name, PYTORCH)]
    against = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios)
    return f"{times} ms" + (f"; times as fast as the best of PyTorch's: {against}" if against else "")


def write(folder: Path, cases: Sequence[ZooCase], peers: Sequence[str], command: str) -> list[ZooResult]:
    """README.md, results.json and pictures of what the folder has of these cases, whose `peers` count; the results."""
    found = [ZooResult.load(folder / case.file) for case in cases if (folder / case.file).exists()]
    if not found:
        return []
    pictures = []
    if any(result.peers for result in found):
        networks_figure(found).savefig(folder / "zoo.png", dpi=120)
        pictures.append("zoo.png")
    (folder / "results.json").write_text(json.dumps([asdict(result) for result in found], indent=1) + "\n")
    lines = ["# Networks of many kinds, PyTorch's ways to run them and ours", "", f"    {command}", ""]
    lines += [f"- {name}: {value}" for name, value in found[0].environment.items() if name != "command"]
    lines += [
        "",
        "Medians of runs in turns, milliseconds a batch; errors are root-mean-square against float64, in units of its",
        "root mean square. First calls start from an untouched network and empty caches, if they were measured.",
        "",
    ]
    lines += [f"![{name}]({name})\n" for name in pictures]
    tables_ = [*summary(found, cases, peers), *tables(found)]
    lines += [line for table in tables_ for line in (table_markdown(table), "")]
    lines += [line for missing in _missing(found, cases, peers) for line in (missing, "")]
    (folder / "README.md").write_text("\n".join(lines))
    return found


def _missing(results: Sequence[ZooResult], cases: Sequence[ZooCase], peers: Sequence[str]) -> list[str]:
    """Sentences that name the cases without a result, and for each peer the others that are without it."""
    by_case = {(result.network, result.dtype, result.batch_size): result for result in results}
    have = {case: by_case.get((case.task, case.dtype, case.batch_size)) for case in cases}
    lacking = {"": [case for case, result in have.items() if not result]}
    for name in peers if any(result.peers for result in results) else ():
        lacking[f" of {name}"] = [case for case, result in have.items() if result and name not in result.peers]
    return [f"Missing{of}: {', '.join(case.name for case in found)}." for of, found in lacking.items() if found]


def summary(results: Sequence[ZooResult], cases: Sequence[ZooCase], peers: Sequence[str]) -> list[Table]:
    """How the peers of ours stand, by type and batch size, and of how many cases that is known."""
    if not any(result.peers for result in results):
        return []
    rows = []
    for (dtype, n), asked in Counter((case.dtype, case.batch_size) for case in cases).items():
        here = _comparable([result for result in results if (result.dtype, result.batch_size) == (dtype, n)])
        for name in OURS:
            ratios = {result.network: ratio for result in here for ratio in speeds([result], name, PYTORCH)}
            if ratios or name in peers:
                rows.append([_title(dtype, n), name, *_standing(ratios), f"{len(ratios)} of {asked}"])
    columns = ["", "", "geometric mean", "worst", "where", "slower", "networks"]
    note = f"Over the networks of which both have a time, {STRONGEST} among them if any has it."
    return [Table("Times as fast as the best of PyTorch's", columns, rows, [], names=2, note=note)] if rows else []


def _standing(ratios: Mapping[str, float]) -> list[str]:
    if not ratios:
        return [""] * 4
    worst = min(ratios, key=ratios.__getitem__)
    slower = sum(ratio < 1 for ratio in ratios.values())
    return [f"{geometric_mean(list(ratios.values())):.2f}", f"{ratios[worst]:.2f}", worst, str(slower)]


def _comparable(results: Sequence[ZooResult]) -> list[ZooResult]:
    """Those that have the strongest of PyTorch's, timed or failed, if any has it."""
    return [result for result in results if STRONGEST in result.peers] or list(results)


def _title(dtype: str, n: int) -> str:
    return f"{dtype}, {n} image{'s' * (n > 1)}"


def tables(results: Iterable[ZooResult]) -> list[Table]:
    results = list(results)
    found = []
    for dtype, n in dict.fromkeys((result.dtype, result.batch_size) for result in results):
        here = [result for result in results if (result.dtype, result.batch_size) == (dtype, n)]
        if any(result.peers for result in here):
            title = _title(dtype, n)
            found += [_times(here, title), _per_peer(here, f"Errors, {title}", _error), _first_calls(here, title)]
        layers = [layer for result in here for layer in result.layers]
        if layers:
            found += [_kinds(layers, f"Layers alone, {dtype}, {n}"), _slowest(layers, f"Slowest, {dtype}, {n}")]
    return [table for table in found if table is not None]


def _names(results: Sequence[ZooResult]) -> list[str]:
    return [name for name in PEERS if any(name in result.peers for result in results)]


def speeds(results: Iterable[ZooResult], name: str, against: Sequence[str]) -> list[float]:
    """How many times as fast a peer is as the best of the others, of each network where both have a time."""
    pairs = [(result.best_ms(against), result.ms(name)) for result in results]
    return [theirs / ours for theirs, ours in pairs if theirs and ours]


def _times(results: Sequence[ZooResult], title: str) -> Table:
    names, comparable = _names(results), _comparable(results)
    compared = {f"{name} / best of PyTorch": (name, PYTORCH) for name in OURS if name in names}
    if {"compile-tritonnn", STRONGEST} <= set(names):
        compared[f"compile-tritonnn / {STRONGEST}"] = "compile-tritonnn", (STRONGEST,)
    rows, totals = [], []
    for result in results:
        ratios = [f"{ratio[0]:.2f}" if (ratio := speeds([result], *pair)) else "" for pair in compared.values()]
        if result not in comparable:
            ratios = [f"({ratio})" if ratio else "" for ratio in ratios]
        rows.append([result.network, *[_cell(result, name) for name in names], *ratios])
    for label, reduce in (("worst", min), ("geometric mean", geometric_mean)) if compared else ():
        found = [speeds(comparable, *pair) for pair in compared.values()]
        totals.append([label, *[""] * len(names), *[f"{reduce(ratios):.2f}" if ratios else "" for ratios in found]])
    marks = {cell[-1:] for row in rows for cell in row}
    notes = [note for mark, note in NOTES.items() if mark in marks]
    return Table(f"Milliseconds, {title}", ["", *names, *compared], rows, totals, note="\n".join(notes))


def _cell(result: ZooResult, name: str) -> str:
    if name not in result.peers:
        return ""
    measured = result.peers[name].measured
    if not measured.timing:
        return measured.status.upper()
    runs = Counter(peer.taken for peer in result.peers.values() if peer.measured.timing)
    return f"{measured.timing.median:.3f}{'*' * (result.peers[name].taken != runs.most_common(1)[0][0])}"


def _per_peer(
    results: Sequence[ZooResult], title: str, cell: Callable[[ZooResult, str], str], note: str = ""
) -> Table | None:
    names = _names(results)
    rows = [[result.network, *[cell(result, name) for name in names]] for result in results]
    return Table(title, ["", *names], rows, [], note=note) if any(any(row[1:]) for row in rows) else None


def _error(result: ZooResult, name: str) -> str:
    if name not in result.peers:
        return ""
    measured = result.peers[name].measured
    if measured.rms_error is None:
        return measured.note
    return f"{measured.rms_error:.1e}{'' if measured.status == OK else ' ' + measured.note}"


def _first_calls(results: Sequence[ZooResult], title: str) -> Table | None:
    def cell(result: ZooResult, name: str) -> str:
        seconds = result.peers[name].first_call_s if name in result.peers else None
        return "" if seconds is None else f"{seconds:.1f}"

    return _per_peer(results, f"Seconds to the first result, {title}", cell)


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _kinds(layers: Sequence[Layer], title: str) -> Table:
    """A row for each kind of layer; a layer that several networks have counts once."""
    layers = list({layer.label: layer for layer in reversed(layers)}.values())
    rows = []
    for kind in sorted({layer.kind for layer in layers}):
        here = [layer for layer in layers if layer.kind == kind]
        rows.append([kind, *_kind_cells(here)])
    columns = ["", "layers", "speed", "worst", "a tenth slower", "error of PyTorch", "error of ours", "fell back"]
    note = "Speed is PyTorch's time over ours, the geometric mean over distinct layers; errors are the largest."
    return Table(title, columns, rows, [["all", *_kind_cells(layers)]], note=note)


def _kind_cells(layers: Sequence[Layer]) -> list[str]:
    ratios = [layer.speed for layer in layers]
    slower = sum(ratio < A_TENTH_SLOWER for ratio in ratios)
    return [
        str(len(layers)),
        f"{geometric_mean(ratios):.2f}",
        f"{min(ratios):.2f}",
        f"{slower} ({slower / len(layers):.0%})",
        f"{max(layer.pytorch_error for layer in layers):.1e}",
        f"{max(layer.ours_error for layer in layers):.1e}",
        str(sum(bool(layer.note) for layer in layers)),
    ]


def _slowest(layers: Sequence[Layer], title: str, most: int = 20) -> Table:
    rows = [
        [layer.label, layer.kind, f"{layer.speed:.2f}", f"{layer.pytorch_us:.1f}", f"{layer.ours_us:.1f}", layer.note]
        for layer in sorted(layers, key=lambda layer: layer.speed)[:most]
    ]
    return Table(title, ["layer", "kind", "speed", "PyTorch us", "ours us", ""], rows, [], names=2)


def networks_figure(results: Sequence[ZooResult]) -> Figure:
    """How many times as fast as the best of PyTorch: a panel a type and batch size, a bar a peer of ours."""
    panels = list(dict.fromkeys((r.dtype, r.batch_size) for r in results if r.peers))
    networks = list(dict.fromkeys(result.network for result in results))
    figure = Figure(figsize=(4 * len(panels) + 2, 0.45 * len(networks) + 1.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (dtype, n) in zip(axes, panels):
        here = _comparable([r for r in results if (r.dtype, r.batch_size) == (dtype, n)])
        here = {result.network: result for result in here}
        for index, name in enumerate(OURS):
            ratios = [next(iter(speeds([here[net]], name, PYTORCH)), 0.0) if net in here else 0.0 for net in networks]
            positions = [i - 0.3 + 0.3 * index for i in range(len(networks))]
            axis.barh(positions, ratios, 0.3, color=f"C{index}", label=name)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=_title(dtype, n), xlabel="times as fast as the best of PyTorch")
        axis.set_yticks(range(len(networks)), networks)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(OURS), fontsize=8)
    return figure
