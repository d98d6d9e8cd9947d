"""A run's results as tables, for the terminal and as one page of Markdown."""

from benchmarks.networks import CHECKED_IMAGES
from benchmarks.peers import DESCRIPTIONS
from benchmarks.results import OK, LayerShape, LayersResult, Measured, NetworkResult, Results
from lit_modules.tables import Table, table_markdown

NETWORKS = {"cifar": "ResNet18, 32x32", "imagenet": "ResNet18, 224x224"}
DTYPES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "tf32": "fp32, TF32 allowed everywhere",
    "fp32": "strict fp32",
    "default": "fp32, PyTorch's default flags (TF32 in convolutions only)",
}


def network_table(result: NetworkResult) -> Table:
    """A row a peer, the fastest right one in bold on a page."""
    eager = result.peers.get(f"eager-{result.layout}")
    rows = [_network_cells(name, found, eager, result.batch_size) for name, found in result.peers.items()]
    columns = ["", "ms", "p10-p90", "samples", "images/s", f"x eager-{result.layout}", "rms error", "max error", ""]
    title = f"{result.case}: {NETWORKS[result.task]}, {DTYPES[result.dtype]}, images {result.layout}"
    return Table(title, columns, rows, [])


def _network_cells(name: str, found: Measured, eager: Measured | None, n: int) -> list[str]:
    note = found.note if found.status == OK else f"{found.status.upper()} {found.note}".strip()
    errors = [_error(found.rms_error), _error(found.max_error)]
    if not found.timing:
        return [name, "", "", "", "", "", *errors, note]
    t = found.timing
    ratio = f"{eager.timing.median / t.median:.2f}" if eager and eager.timing else ""
    spread = f"{milliseconds(t.p10)}-{milliseconds(t.p90)}"
    return [name, milliseconds(t.median), spread, str(t.samples), f"{n / t.median * 1e3:,.0f}", ratio, *errors, note]


def layers_table(result: LayersResult, ceilings: dict[str, float]) -> Table:
    """A row a distinct layer and peer; below, the sum over the network's layers by kind."""
    rows = []
    for shape in result.layers:
        floor = floor_ms(shape, ceilings, result.dtype)
        for name, found in shape.peers.items():
            rows.append([shape.label, str(shape.count), name, *_layer_cells(shape, found, floor)])
    names = _peer_names(result)
    totals = [
        [f"all {kind}", "", name, total and microseconds(total), *[""] * 7]
        for kind, by_peer in kind_totals(result).items()
        for name in names
        for total in [by_peer[name]]
    ]
    columns = ["layer", "in it", "", "us", "p10-p90", "TFLOP/s", "GB/s", "of the roof", "rms error", "max error", ""]
    title = f"Layers of {NETWORKS[result.task]}, batch {result.batch_size}, {DTYPES[result.dtype]}"
    warm = [shape.label for shape in result.layers if not shape.cold]
    note = "Activations come from memory, not from L2" + (f", but for: {'; '.join(warm)}" if warm else "") + "."
    return Table(title, columns, rows, [[cell or "" for cell in row] for row in totals], names=3, note=note)


def _layer_cells(shape: LayerShape, found: Measured, floor: float | None) -> list[str]:
    note = found.note if found.status == OK else f"{found.status.upper()} {found.note}".strip()
    errors = [_error(found.rms_error), _error(found.max_error)]
    if not found.timing:
        return ["", "", "", "", "", *errors, note]
    t = found.timing
    rate = f"{shape.flop / t.median / 1e9:.0f}" if shape.flop else ""
    roof = f"{floor / t.median:.0%}" if floor else ""
    spread = f"{microseconds(t.p10)}-{microseconds(t.p90)}"
    return [microseconds(t.median), spread, rate, f"{shape.bytes / t.median / 1e6:,.0f}", roof, *errors, note]


def totals_table(result: LayersResult) -> Table:
    """A row a kind: the sum over the network's layers of that kind, of each peer."""
    names = _peer_names(result)
    rows = []
    for kind, by_peer in kind_totals(result).items():
        rows.append([kind, *(microseconds(by_peer[name]) if by_peer[name] else "" for name in names)])
    title = f"Sum over the layers of {NETWORKS[result.task]}, batch {result.batch_size}, {DTYPES[result.dtype]}, us"
    return Table(title, ["", *names], rows, [], note="Empty where a layer of the kind has no right result.")


def kind_totals(result: LayersResult) -> dict[str, dict[str, float | None]]:
    """By kind and peer, milliseconds of all the network's layers of the kind; None if one was not timed."""
    names = _peer_names(result)
    totals: dict[str, dict[str, float | None]] = {}
    for shape in result.layers:
        by_peer = totals.setdefault(shape.kind, dict.fromkeys(names, 0.0))
        for name in names:
            found = shape.peers.get(name)
            timed = found is not None and found.timing is not None and by_peer[name] is not None
            by_peer[name] = by_peer[name] + shape.count * found.timing.median if timed else None
    return totals


def floor_ms(shape: LayerShape, ceilings: dict[str, float], dtype: str) -> float | None:
    """The roofline: the longer of arithmetic at the matrix product's rate and compulsory bytes at the copy's."""
    peak, bandwidth = ceilings.get(f"{dtype} TFLOP/s"), ceilings.get("copy GB/s")
    if not peak or not bandwidth:
        return None
    return max(shape.flop / peak / 1e9, shape.bytes / bandwidth / 1e6)


def _peer_names(result: LayersResult) -> list[str]:
    return list(dict.fromkeys(name for shape in result.layers for name in shape.peers))


def summary_table(results: Results) -> Table:
    """A row a network's case: the fastest right peer of PyTorch's side and of ours."""
    rows = []
    for result in results.networks:
        right = {name: found.timing.median for name, found in result.peers.items() if found.timing}
        sides = [
            {name: ms for name, ms in right.items() if name.startswith(("swapped", "fused")) is ours}
            for ours in (False, True)
        ]
        cells = []
        for side in sides:
            best = min(side, key=side.get, default=None)
            cells += [best or "", milliseconds(side[best]) if best else ""]
        faster = f"{min(sides[0].values()) / min(sides[1].values()):.2f}" if all(sides) else ""
        rows.append([result.case, *cells, faster])
    columns = ["case", "fastest of PyTorch's and cuDNN's", "ms", "fastest of ours", "ms", "times faster"]
    return Table("The fastest of each side", columns, rows, [])


def settings_tables(results: Results) -> list[Table]:
    rows = {**results.environment, **results.settings}
    ceilings = [[name, f"{value:,.0f}"] for name, value in results.ceilings.items()]
    return [
        Table("Settings", ["", ""], [[*row] for row in rows.items()], [], names=2),
        Table("Ceilings, measured in the same run", ["", ""], ceilings, []),
        Table("Peers", ["", ""], [[*row] for row in DESCRIPTIONS.items()], [], names=2),
    ]


def method() -> list[str]:
    return [
        "Medians; the peers take turns in every round, the order reversed in every other, so drift hits all alike. "
        "Times are events around back-to-back calls: the GPU's time, or the host's where launching takes longer.",
        f"Errors are against float64 on up to {CHECKED_IMAGES} images spread over the batch, over the root mean square "
        "of the reference. A wrong result is given no time. Results are checked before and after the timing.",
        "Random weights; batch norms have the statistics of a few random batches and random scale and shift.",
        "A CUDA graph copies the images into its own input at every call, as torch.compile does.",
        "Of the roof: the longer of operations over the ceiling of the same type and compulsory bytes over the copy's "
        "rate, over the time. Above 100 % only where a layer beats the matrix product (strict fp32) or finds its "
        "tensors in L2.",
    ]


def markdown(results: Results, plots: list[str]) -> str:
    sections = [f"# Compared on {results.environment.get('device', '')}, {results.environment.get('date', '')}"]
    sections.append(f"    {results.environment.get('command', '')}")
    sections += [f"![{plot}]({plot})" for plot in plots]
    if results.networks:
        sections.append(table_markdown(summary_table(results)))
    sections += [table_markdown(network_table(result)) for result in results.networks]
    sections += [table_markdown(totals_table(result)) for result in results.layers]
    sections += [table_markdown(layers_table(result, results.ceilings)) for result in results.layers]
    sections += [table_markdown(table) for table in settings_tables(results)]
    lines = method() + results.notes + [f"Not measured, the time was up: {name}" for name in results.skipped]
    sections.append("## How\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(sections) + "\n"


def milliseconds(ms: float) -> str:
    return f"{ms:.4f}" if ms < 1 else f"{ms:.3f}"


def microseconds(ms: float) -> str:
    return f"{ms * 1e3:.1f}" if ms < 1 else f"{ms * 1e3:,.0f}"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
