"""The tables of an evaluation: the network, its layers, the proof, and details."""

from lit_modules.agreement import Agreement, Quality
from lit_modules.answer import faster, variant_label
from lit_modules.evaluation_result import (
    EvaluationResult,
    KernelRow,
    LatencyResult,
    LayerRow,
    Pair,
    Proof,
    SideResult,
    timing,
)
from lit_modules.tables import Table
from tritonnn.latency import Latency

EXAMPLES_SHOWN = 10


def tables(result: EvaluationResult) -> list[Table]:
    """In reading order, after the answer: the network, its layers, and then details."""
    latency, proof = result.latency, result.proof
    whole = [networks_table(result)] if latency else []
    layers = [layers_table(result)] if latency else []
    details = [*epochs_tables(result), *metrics_tables(proof), *outputs_tables(proof), *disagreements_tables(proof)]
    return [*whole, proof_table(result), *layers, *details, settings_table(result)]


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
    title = f"Predictions on {proof.samples:,} test samples"
    if proof.pytorch is None:
        columns, rows = [columns[0], columns[-1]], [[row[0], row[-1]] for row in rows if row[-1]]
        title = f"Outputs and metrics on {proof.samples} samples"
    notes = [
        f"{'PASS' if variant.verdict.passed else 'FAIL'} {variant.name}: {variant.verdict.reason}"
        for variant in proof.variants
    ]
    compared = [f"Predictions are those of {proof.predictions}."] if proof.predictions else []
    return Table(title, columns, rows, [], note="\n".join([*compared, *proof.notes, *notes]))


def epochs_tables(result: EvaluationResult) -> list[Table]:
    """A row a validation during training, both sides' metrics beside each other."""
    if not result.epochs:
        return []
    sides = {"pytorch": "PyTorch", "triton": "Triton"}
    names = list(dict.fromkeys(name for epoch in result.epochs for name in epoch.metrics["pytorch"]))
    rows = []
    for epoch in result.epochs:
        values = [f"{epoch.metrics[side][name]:.5g}" for name in names for side in sides]
        rows.append(
            [str(epoch.epoch), *values, *(_ms(epoch.batch_ms[s]) if s in epoch.batch_ms else "" for s in sides)]
        )
    columns = [f"{name}, {label}" for name in names for label in sides.values()]
    times = [f"ms a batch, {label}" for label in sides.values()]
    return [Table("Validations during training", ["epoch", *columns, *times], rows, [])]


def metrics_tables(proof: Proof) -> list[Table]:
    """A row a side, a column a metric that the module logs."""
    sides = {_side(proof, name): side for name, side in proof.sides.items() if side.metrics}
    if not sides:
        return []
    names = list(dict.fromkeys(name for side in sides.values() for name in side.metrics))
    rows = [[label, *(_logged(side, name) for name in names)] for label, side in sides.items()]
    return [Table("What the module logs", ["layers", *names], rows, [])]


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
    kernels = {index: kernel for kernel in latency.kernels for index in kernel.layers}
    totals = [
        _total(f"all {kind}", [breakdowns[clock].kinds[kind] for clock in clocks], latency)
        for kind in breakdowns[clocks[0]].kinds
    ]
    for label, name in (
        ("sum of the layers", "layers"),
        ("whole network", "network"),
        ("unattributed", "unattributed"),
    ):
        totals.append(_total(label, [getattr(breakdowns[clock], name) for clock in clocks], latency))
    if latency.kernels:
        column = 3 + len(_clock_columns(latency, clocks[:1]))
        totals[-3][column] = _ms(sum(kernel.medians[clocks[0]] for kernel in latency.kernels))
        totals[-2][column] = _ms(timing(latency.network_timings[result.proof.fused.name], clocks[0]).median)
    notes = [_clocks(latency)]
    if latency.kernels:
        notes.append(
            "Fused: a kernel's time stands at the first of the layers whose work it does; the others have a dash."
        )
    if any(row.bound_ms for row in latency.layers):
        notes.append(
            "Roofline: the least time for the arithmetic and the memory traffic, at the rates of a matrix product and "
            "a copy that were measured in the same run; what fits the L2 cache is not bound by memory."
        )
    if any(side < 0 for b in breakdowns.values() for side in (b.unattributed.pytorch, b.unattributed.triton or 0)):
        notes.append(
            "Unattributed is the network less its layers: below zero where layers timed alone, each with a call and a "
            "clock of its own, take longer than in the network."
        )
    reasons = {f"{row.name} ran PyTorch's own operation: {row.fallback}" for row in latency.layers if row.fallback}
    eager = _clock_columns(latency, clocks[1:])
    return Table(
        f"Each layer alone, in network order, batch of {result.batch_size:,}, {result.memory_format}",
        [
            "layer",
            "kind",
            "input",
            *_clock_columns(latency, clocks[:1]),
            *_fused_columns(latency),
            *eager,
            "PyTorch p10-p90",
            "Triton p10-p90",
            "samples",
        ],
        [_layer_cells(row, result.memory_format, clocks, latency, kernels) for row in latency.layers],
        totals,
        names=3,
        details=3 + len(eager),
        note="\n".join([*notes, *sorted(reasons)]),
    )


def networks_table(result: EvaluationResult) -> Table:
    """The whole network: PyTorch's, and with each variant swapped."""
    latency = result.latency
    clocks = list(latency.breakdowns)
    pytorch = [timing(latency.network_timings["pytorch"], clock).median for clock in clocks]
    rows = [["PyTorch", *(cell for ms in pytorch for cell in (_ms(ms), *([""] if latency.comparable else []))), ""]]
    for variant in result.proof.variants:
        cells = [""] * (len(rows[0]) - 2)
        if variant.name in latency.networks:
            pairs = latency.networks[variant.name].values()
            cells = [
                cell
                for pair in pairs
                for cell in (_ms(pair.triton), *([faster(pair.speedup)] if latency.comparable else []))
            ]
        count = variant.agreement.differing if variant.agreement else None
        predictions = "" if count is None else f"{count:,} differ" if count else "identical"
        rows.append([variant_label(variant), *cells, predictions])
    columns = [
        column
        for clock in clocks
        for column in (
            f"{'' if clock == clocks[0] else clock + ' '}ms a batch",
            *(["than PyTorch"] if latency.comparable else []),
        )
    ]
    title = f"The whole network, batch of {result.batch_size:,}"
    return Table(title, ["", *columns, "predictions"], rows, [], note=_clocks(latency))


def _clock_columns(latency: LatencyResult, clocks: list[str]) -> list[str]:
    """The first clock is the one that counts, and is plain "ms"."""
    columns = []
    for clock in clocks:
        prefix = "" if clock == latency.clock else f"{clock} "
        columns.append(f"{prefix}PyTorch ms")
        if latency.comparable:
            columns += [f"{prefix}Triton ms", "than PyTorch"]
        elif latency.networks:
            columns.append("interpreter ms")
    return columns


def _fused_columns(latency: LatencyResult) -> list[str]:
    bound = ["of the roofline"] if any(row.bound_ms for row in latency.layers) else []
    return [*(["fused ms"] if latency.kernels else []), *bound]


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


def _layer_cells(
    row: LayerRow, usual_format: str, clocks: list[str], latency: LatencyResult, kernels: dict[int, KernelRow]
) -> list[str]:
    size = "x".join(map(str, row.shape))
    usual = row.memory_format == usual_format or len(row.shape) != 4
    memory_format = "" if usual else f" {row.memory_format}"
    first = clocks[0]
    kernel = kernels.get(row.index)
    fused = [_fused_ms(row, kernel, first)] if latency.kernels else []
    bound = [_of_the_roofline(row, kernel, first)] if "of the roofline" in _fused_columns(latency) else []
    return [
        row.name,
        row.kind,
        f"{size} {row.dtype}{memory_format}",
        *_pair(row.medians[first], latency),
        *fused,
        *bound,
        *(cell for clock in clocks[1:] for cell in _pair(row.medians[clock], latency)),
        _spread(row.pytorch, first),
        _spread(row.triton, first),
        str(timing(row.pytorch, first).samples),
    ]


def _fused_ms(row: LayerRow, kernel: KernelRow | None, clock: str) -> str:
    if kernel is None:
        return ""
    return _ms(kernel.medians[clock]) if row.index == kernel.layers[0] else "-"


def _of_the_roofline(row: LayerRow, kernel: KernelRow | None, clock: str) -> str:
    """Share of the roofline that the fused kernel reaches, told at its first layer, or Triton's or PyTorch's layer."""
    if kernel is not None:
        here = kernel.bound_ms and row.index == kernel.layers[0]
        return f"{kernel.bound_ms / kernel.medians[clock]:.0%}" if here else ""
    pair = row.medians[clock]
    return f"{row.bound_ms / (pair.triton or pair.pytorch):.0%}" if row.bound_ms else ""


def _total(name: str, pairs: list[Pair], latency: LatencyResult) -> list[str]:
    first, *rest = pairs
    gap = [""] * len(_fused_columns(latency))
    cells = [*_pair(first, latency), *gap, *(cell for pair in rest for cell in _pair(pair, latency))]
    return [name, "", "", *cells, "", "", ""]


def _pair(pair: Pair, latency: LatencyResult) -> list[str]:
    triton = "" if pair.triton is None else _ms(pair.triton)
    if latency.comparable:
        return [_ms(pair.pytorch), triton, faster(pair.speedup)]
    return [_ms(pair.pytorch), *([triton] if latency.networks else [])]


def _spread(latency: Latency | None, clock: str) -> str:
    if latency is None:
        return ""
    spread = timing(latency, clock)
    return f"{_ms(spread.p10)}-{_ms(spread.p90)}"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.4f}" if abs(milliseconds) < 1 else f"{milliseconds:.2f}"


def _clocks(latency: LatencyResult) -> str:
    if not latency.comparable:
        interpreter = "the interpreter's times say nothing about the speed of Triton's kernels."
        return (
            f"Medians of the wall clock on a CPU; {interpreter}"
            if latency.networks
            else "Medians of the wall clock on a CPU. Triton ran in its interpreter and was not timed: "
            "`make dashboard` shows an evaluation on a GPU."
        )
    device = " and ".join(latency.device_clocks)
    return (
        f"Medians of the GPU's own time ({device}); eager is the wall clock of a call from Python, launches included."
    )
