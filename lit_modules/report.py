"""An evaluation as tables, for the terminal and as Markdown."""

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from lit_modules.agreement import Agreement, Quality
from lit_modules.evaluation_result import EvaluationResult, LatencyResult, LayerRow, Pair, Proof, SideResult, timing
from tritonnn.latency import Latency

EXAMPLES_SHOWN = 10


@dataclass(frozen=True)
class Table:
    """Cells as text; `totals` are rows that stand apart below.

    The first `names` columns are left-aligned; the last `details` are for a page, being too many for a terminal.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    totals: list[list[str]]
    names: int = 1
    details: int = 0
    note: str = ""


def tables(result: EvaluationResult) -> list[Table]:
    """Details first, so that a terminal ends with what matters."""
    latency = result.latency
    timed = [layers_table(result), *([swaps_table(result)] if latency.networks else [])] if latency else []
    proof = result.proof
    details = [*disagreements_tables(proof), *outputs_tables(proof), *metrics_tables(proof)]
    return [settings_table(result), *timed, *details, proof_table(result)]


def settings_table(result: EvaluationResult) -> Table:
    checkpoint = result.checkpoint
    rows = {
        "checkpoint": checkpoint.path or "none: the network as it was given",
        "epoch": "" if checkpoint.epoch is None else str(checkpoint.epoch),
        "weights": f"{checkpoint.weights} (SHA-256, shortened)",
        "Triton layers": result.triton_layers,
        "precision": f"{result.precision}{', strict fp32' if result.proof.exact else ''}",
        "memory format": result.memory_format,
        "batch size": str(result.batch_size),
        "samples": str(result.proof.samples),
        "processes": str(result.processes),
    }
    return Table(
        "Settings", ["", ""], [[*row] for row in (rows | result.flags | result.environment).items()], [], names=2
    )


def proof_table(result: EvaluationResult) -> Table:
    """The verdicts, with the predictions where an output is classified."""
    proof = result.proof
    rows = [
        ["PyTorch", *_quality(proof.pytorch), "", "", "", ""],
        [f"PyTorch, {proof.yardstick_format}", *_quality(proof.yardstick), *_agreement(proof.yardstick_agreement), ""],
    ]
    if proof.float32:
        rows.append(["PyTorch, strict float32", *_quality(proof.float32), *_agreement(proof.float32_agreement), ""])
    for variant in proof.variants:
        verdict = "PASS" if variant.verdict.passed else "FAIL"
        rows.append([f"Triton {variant.name}", *_quality(variant.quality), *_agreement(variant.agreement), verdict])
    columns = ["layers", "top-1", "top-5", "loss", "differ", "largest |Δ logit|", "mean |Δ logit|", ""]
    title = f"Predictions on {proof.samples} test samples"
    if proof.pytorch is None:
        columns, rows = [columns[0], columns[-1]], [[row[0], row[-1]] for row in rows if row[-1]]
        title = f"Outputs and metrics on {proof.samples} samples"
    notes = [
        f"{'PASS' if variant.verdict.passed else 'FAIL'} {variant.name}: {variant.verdict.reason}"
        for variant in proof.variants
    ]
    compared = [f"Predictions are those of {proof.predictions}."] if proof.predictions else []
    return Table(title, columns, rows, [], note="\n".join([*compared, *proof.notes, *notes]))


def metrics_tables(proof: Proof) -> list[Table]:
    """A row a metric that the module logs, a column a side."""
    sides = {_side(proof, name): side for name, side in proof.sides.items() if side.metrics}
    if not sides:
        return []
    names = list(dict.fromkeys(name for side in sides.values() for name in side.metrics))
    rows = [[name, *(_logged(side, name) for side in sides.values())] for name in names]
    return [Table("What the module logs", ["metric", *sides], rows, [])]


def outputs_tables(proof: Proof) -> list[Table]:
    """A row an output and side, but for logits that are compared as predictions."""
    rows = []
    for name, side in proof.sides.items():
        for output, numbers in side.outputs.items():
            error = "" if numbers.error is None else f"{numbers.error:.2e}"
            difference = ["", ""] if name == "pytorch" else [f"{numbers.difference:.2e}", f"{numbers.largest:.2g}"]
            differing = "" if numbers.differing is None else f"{numbers.differing} of {numbers.values}"
            rows.append([output, _side(proof, name), error, *difference, differing])
    if not rows:
        return []
    rows.sort(key=lambda row: row[0])  # the sides of an output beside each other
    columns = [
        "output",
        "layers",
        f"error against {proof.reference or 'none'}",
        "difference",
        "largest |Δ|",
        "values that differ",
    ]
    note = "Error and difference from PyTorch's are root mean squares, relative to the output's."
    return [Table("Outputs", columns, rows, [], names=2, note=note)]


def _side(proof: Proof, name: str) -> str:
    others = {"pytorch": "PyTorch", "yardstick": f"PyTorch, {proof.yardstick_format}"}
    if name == proof.reference:
        return f"PyTorch, {'strict ' if name == 'float32' else ''}{name}"
    return others.get(name, f"Triton {name}")


def _logged(side: SideResult, name: str) -> str:
    return f"{side.metrics[name]:.7g}" if name in side.metrics else ""


def disagreements_tables(proof: Proof) -> list[Table]:
    columns = ["sample", "label", "PyTorch", "Triton", "PyTorch's margin"]
    found = []
    for variant in proof.variants:
        examples = variant.agreement.examples[:EXAMPLES_SHOWN] if variant.agreement else []
        if examples:
            rows = [[str(d.sample), str(d.label), str(d.pytorch), str(d.other), f"{d.margin:.3g}"] for d in examples]
            title = f"Predictions that differ, {variant.name}: {variant.agreement.differing}"
            note = "" if len(examples) == variant.agreement.differing else "The largest margins; results.json has more."
            found.append(Table(title, columns, rows, [], names=0, note=note))
    return found


def layers_table(result: EvaluationResult) -> Table:
    """A row a layer, in network order; below, the kinds, their sum, the network and what the layers do not explain."""
    latency = result.latency
    clocks = list(latency.breakdowns)
    breakdowns = latency.breakdowns
    totals = [
        _total(f"all {kind}", [breakdowns[clock].kinds[kind] for clock in clocks])
        for kind in breakdowns[clocks[0]].kinds
    ]
    for label, name in (
        ("sum of the layers", "layers"),
        ("whole network", "network"),
        ("unattributed", "unattributed"),
    ):
        totals.append(_total(label, [getattr(breakdowns[clock], name) for clock in clocks]))
    notes = [_clocks(latency)]
    if any(side < 0 for b in breakdowns.values() for side in (b.unattributed.pytorch, b.unattributed.triton or 0)):
        notes.append(
            "Unattributed is the network less its layers: below zero where layers timed alone, each with a call and a "
            "clock of its own, take longer than in the network."
        )
    reasons = {f"{row.name} ran PyTorch's own operation: {row.fallback}" for row in latency.layers if row.fallback}
    return Table(
        f"Latency of each layer, batch of {result.batch_size}",
        ["layer", "kind", "input", *_clock_columns(clocks), "PyTorch p10-p90", "Triton p10-p90", "samples"],
        [_layer_cells(row, clocks) for row in latency.layers],
        totals,
        names=3,
        details=3 * len(clocks),
        note="\n".join([*notes, *sorted(reasons)]),
    )


def swaps_table(result: EvaluationResult) -> Table:
    """The whole network with each variant swapped."""
    latency = result.latency
    clocks = list(latency.breakdowns)
    rows = []
    for variant in result.proof.variants:
        cells = [cell for clock in clocks for cell in _pair(latency.networks[variant.name][clock])]
        count = variant.agreement.differing if variant.agreement else None
        rows.append([variant.name, *cells, "" if count is None else f"{count} differ" if count else "identical"])
    title = f"Latency of the whole network, batch of {result.batch_size}"
    return Table(title, ["swapped", *_clock_columns(clocks), "predictions"], rows, [], note=_clocks(latency))


def swap_notes(proof: Proof, stayed: bool) -> list[str]:
    """What was swapped and what fell back, a line each; of the main variants also what stayed PyTorch's, if wanted."""
    lines = []
    for variant in proof.variants:
        counts = ", ".join(f"{count} {kind}" for kind, count in variant.swapped.items())
        lines.append(f"{variant.name}: {'runs' if variant.fused else 'swapped'} {counts or 'nothing'}")
        for layer, reasons in variant.fallbacks.items():
            lines += [f"{variant.name}: {layer} fell back {count} times: {why}" for why, count in reasons.items()]
        if stayed and (variant.fused or variant is proof.main):
            lines += [f"{variant.name}: {len(names)} stayed: {reason}" for reason, names in variant.stayed.items()]
    return lines


def verdict(result: EvaluationResult) -> str:
    if not result.proof.variants:
        return "nothing was swapped, so nothing was proved"
    return "PASS" if result.passed else "FAIL"


def print_to(console: Console, result: EvaluationResult) -> None:
    for table in tables(result):
        console.print(rich_table(table))
        console.print(f"{table.note}\n", markup=False, highlight=False)
    for line in swap_notes(result.proof, stayed=False):
        console.print(line, markup=False, highlight=False)
    console.print(f"[bold {'green' if result.passed else 'red'}]{verdict(result)}[/]")


def markdown(result: EvaluationResult) -> str:
    """The whole report, as one page."""
    title = f"# Triton layers: {result.triton_layers}: {verdict(result)}"
    sections = [table_markdown(table) for table in reversed(tables(result))]
    notes = "\n".join(f"- {line}" for line in swap_notes(result.proof, stayed=True))
    return "\n\n".join([title, *sections, notes]) + "\n"


def table_markdown(table: Table) -> str:
    alignment = [":--" if column < table.names else "--:" for column in range(len(table.columns))]
    totals = [[f"**{cell}**" if cell else "" for cell in row] for row in table.totals]
    lines = [table.columns, alignment, *table.rows, *totals]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    note = table.note.replace("\n", "  \n")
    return "\n\n".join(part for part in (f"## {table.title}", body, note) if part)


def rich_table(table: Table) -> RichTable:
    """For a terminal: without the columns that are details."""
    shown = len(table.columns) - table.details
    rich = RichTable(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    rich.show_header = any(table.columns)
    for column, header in enumerate(table.columns[:shown]):
        rich.add_column(header, justify="left" if column < table.names else "right")
    for row in table.rows:
        rich.add_row(*row[:shown])
    rich.add_section()
    for row in table.totals:
        rich.add_row(*row[:shown], style="bold")
    return rich


def _clock_columns(clocks: list[str]) -> list[str]:
    """The first clock is the one that counts, and is plain "ms"."""
    prefixes = ["", *(f"{clock} " for clock in clocks[1:])]
    return [column for p in prefixes for column in (f"{p}PyTorch ms", f"{p}Triton ms", f"{p}increase")]


def _quality(quality: Quality | None) -> list[str]:
    if quality is None:
        return ["", "", ""]
    return [f"{quality.top1:.2%}", f"{quality.top5:.2%}", f"{quality.loss:.5f}"]


def _agreement(agreement: Agreement | None) -> list[str]:
    if agreement is None:
        return ["", "", ""]
    return [
        str(agreement.differing),
        f"{agreement.largest_logit_difference:.2g}",
        f"{agreement.mean_logit_difference:.2g}",
    ]


def _layer_cells(row: LayerRow, clocks: list[str]) -> list[str]:
    size = "x".join(map(str, row.shape))
    memory_format = "" if row.memory_format == "contiguous" else f" {row.memory_format}"
    first = clocks[0]
    return [
        row.name,
        row.kind,
        f"{size} {row.dtype}{memory_format}",
        *(cell for clock in clocks for cell in _pair(row.medians[clock])),
        _spread(row.pytorch, first),
        _spread(row.triton, first),
        str(timing(row.pytorch, first).samples),
    ]


def _total(name: str, pairs: list[Pair]) -> list[str]:
    return [name, "", "", *(cell for pair in pairs for cell in _pair(pair)), "", "", ""]


def _pair(pair: Pair) -> list[str]:
    triton = "" if pair.triton is None else _ms(pair.triton)
    return [_ms(pair.pytorch), triton, "" if pair.increase_percent is None else f"{pair.increase_percent:+.1f} %"]


def _spread(latency: Latency | None, clock: str) -> str:
    if latency is None:
        return ""
    spread = timing(latency, clock)
    return f"{_ms(spread.p10)}-{_ms(spread.p90)}"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.4f}" if abs(milliseconds) < 1 else f"{milliseconds:.2f}"


def _clocks(latency: LatencyResult) -> str:
    if not latency.device_clocks:
        return (
            "Medians of the wall clock on a CPU. Triton ran in its interpreter: its times say nothing about its speed."
        )
    device = " and ".join(latency.device_clocks)
    return (
        f"Medians of the GPU's own time ({device}); eager is the wall clock of a call from Python, launches included."
    )
