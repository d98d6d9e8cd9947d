"""`benchmarks/compare.py`: all of it but the GPU."""

import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tritonnn
from benchmarks import ahead, compare, layers, measure, peers, plots, report
from benchmarks.cases import BATCH_SIZES, DEFAULT_CASES, DTYPES, Case, affordable, every_case, flags, select
from benchmarks.networks import Setup, errors, spread
from benchmarks.results import (
    FAILED,
    MISSING,
    OK,
    WRONG,
    LayerShape,
    LayersResult,
    Measured,
    NetworkResult,
    Results,
    load,
    save,
)
from benchmarks.timing import MIN_ROUNDS, DeviceLost, alternate, ceilings, clock, repeats_for, summarize
from lit_modules.command_line import UserError
from lit_modules.report import rich_table, table_markdown
from tritonnn.latency import Timing, record_calls

CPU = torch.device("cpu")
TINY = Case("cifar", "fp32", 2)
ROOT = Path(__file__).resolve().parents[1]


class FakeTime:
    """Advances only when a clock is read."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.read: list[str] = []

    def now(self) -> float:
        return self.seconds

    def clock(self, name: str, samples: list[float]):
        def read() -> float:
            self.read.append(name)
            self.seconds += 1
            return samples[(len(self.read) - 1) % len(samples)]

        return read


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup(TINY, CPU, width=4)


def right(median: float) -> Measured:
    return Measured(OK, Timing(median, 0.9 * median, 1.2 * median, 20), 1e-2, 3e-3)


def made_up() -> Results:
    networks = [
        NetworkResult(
            f"cifar-bf16-{n}",
            "cifar",
            "bf16",
            n,
            "channels-last",
            {
                "eager-channels-last": right(0.004 * n),
                "compile-reduce-overhead": right(0.003 * n),
                "swapped": Measured(WRONG, max_error=3.0, rms_error=0.5),
                "fused": Measured(MISSING, note="tritonnn has no fuse"),
                "fused-graph": right(0.002 * n),
            },
            12.5,
        )
        for n in (1, 128, 1024)
    ]
    by_peer = {"pytorch-channels-last": right(0.2), "triton-channels-last": right(0.1)}
    one_failed = by_peer | {"triton-channels-last": Measured(FAILED, note="a | b")}
    shapes = [
        LayerShape("conv2d", "conv 3x3/1 64-64, 32x32", 4, 10**11, 10**8, True, by_peer),
        LayerShape("conv2d", "conv 1x1/2 64-128, 32x32", 1, 10**9, 10**8, True, dict(by_peer)),
        LayerShape("relu", "relu 64 at 32x32", 5, 0, 10**8, False, one_failed),
    ]
    return Results(
        {"device": "NVIDIA H200", "date": "2026-11-22", "command": "python benchmarks/compare.py"},
        {"cudnn.benchmark": "on"},
        {"bf16 TFLOP/s": 790.0, "copy GB/s": 4300.0},
        networks,
        [LayersResult("layers-bf16-1024", "cifar", "bf16", 1024, shapes, 30.0)],
        ["cifar-fp16-1024"],
        ["attorch is not installed"],
    )


# Statistics and turns


def test_summary_is_median_and_deciles():
    assert summarize([float(i) for i in range(11)]) == Timing(5.0, 1.0, 9.0, 11)


def test_clocks_take_turns_in_both_orders_until_the_budget_is_spent():
    fake = FakeTime()
    timings, failures = alternate({name: fake.clock(name, [1.0]) for name in "abc"}, 30, CPU, fake.now)
    assert fake.read == list("abccba") * 5
    assert {name: timing.samples for name, timing in timings.items()} == dict.fromkeys("abc", 10)
    assert failures == {}


def test_a_budget_of_nothing_still_takes_some_rounds():
    fake = FakeTime()
    timings, _ = alternate({"a": fake.clock("a", [2.0])}, 0, CPU, fake.now)
    assert timings["a"] == Timing(2.0, 2.0, 2.0, MIN_ROUNDS)


def test_a_clock_that_fails_does_not_stop_the_others():
    def fail() -> float:
        raise RuntimeError("out of luck\nand a trace")

    timings, failures = alternate({"a": fail, "b": lambda: 1.0}, 0, CPU)
    assert list(timings) == ["b"] and failures == {"a": "RuntimeError: out of luck"}


@pytest.mark.parametrize(("once", "repeats"), [(0.05, 40), (4.0, 1), (0.0, 500)])
def test_a_reading_takes_some_milliseconds(once: float, repeats: int):
    assert repeats_for(once, 2.0) == repeats


def test_a_clock_reads_milliseconds_a_call():
    assert 4.9 < clock(partial(time.sleep, 0.005), CPU)() < 50


# Cases and the budget


def test_every_case_has_a_name_of_its_own_and_the_important_ones_come_first():
    cases = every_case()
    assert len({case.name for case in cases}) == len(cases) > len(DEFAULT_CASES)
    assert tuple(cases[: len(DEFAULT_CASES)]) == DEFAULT_CASES
    assert {case.batch_size for case in cases} == set(BATCH_SIZES)


def test_selection():
    assert select(None, None, None) == list(DEFAULT_CASES)
    layer_cases = select(["layers-bf16-*"], [128, 1024], None)
    assert [case.name for case in layer_cases] == ["layers-bf16-1024", "layers-bf16-128"]
    fp16 = select(["cifar-*"], [256], ["fp16"])
    assert [case.name for case in fp16] == ["cifar-fp16-256", "cifar-fp16-256-max-autotune"]
    assert select(None, None, None, everything=True) == every_case()


def test_cases_that_no_longer_fit_are_skipped_and_shorter_ones_still_run():
    fake = FakeTime()
    cases = [Case("cifar", "bf16", 1024), Case("cifar", "bf16", 1024, True), Case("cifar", "bf16", 1)]
    run = []
    for _, fits in affordable(cases, 100, fake.now):
        run.append(fits)
        fake.seconds += 50 * fits
    assert run == [True, False, True]


@pytest.mark.parametrize(("seconds", "fit"), [(100, [True, True, False]), (10, [True, True, True])])
def test_a_case_is_expected_to_last_as_long_as_those_before_it(seconds: int, fit: list[bool]):
    """Whatever its estimate is, 40 s."""
    fake = FakeTime()
    run = []
    for _, fits in affordable([Case("cifar", "bf16", n) for n in (1024, 128, 1)], 2.5 * seconds + 20, fake.now):
        run.append(fits)
        fake.seconds += seconds * fits
    assert run == fit


def test_what_is_compiled_ahead():
    """Networks once, whatever runs them, those of layers too; nothing that chooses by times."""
    networks = [Case("cifar", "bf16", 8), Case("cifar", "bf16", 8, max_autotune=True), Case("layers", "tf32", 1)]
    found = ahead.jobs((case, compare.names_of(case, None)) for case in networks)
    every = ["compile-reduce-overhead", "swapped-graph", "fused-graph"]
    assert found == {networks[0]: every, Case("cifar", "tf32", 1): ["swapped-graph"]}
    assert ahead.jobs([(networks[0], ["eager-nchw", "fused-graph-in-place"])]) == {networks[0]: ["fused-graph"]}
    assert ahead.jobs([(networks[0], ["eager-nchw"])]) == {}


def test_compiling_ahead_may_fail(monkeypatch: pytest.MonkeyPatch):
    commands, said = [], []

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        commands.append(command)
        if command[-2] == "1":
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, int(command[-2] == "8"))

    monkeypatch.setattr(ahead.subprocess, "run", run)
    todo = {Case("cifar", "bf16", n): ["fused-graph"] for n in (1, 8, 128)}
    ahead.compile_ahead(todo, 2, said.append)
    assert sorted(command[2:] for command in commands) == sorted(
        ["cifar", "bf16", str(n), "fused-graph"] for n in (1, 8, 128)
    )
    assert len(said) == 1 and said[0].startswith("compiled ahead: 1 of 3 networks in ")


def test_the_first_case_runs_whatever_the_budget():
    fake, run = FakeTime(), []
    for _, fits in affordable(DEFAULT_CASES[:2], 1, fake.now):
        run.append(fits)
        fake.seconds += 2
    assert run == [True, False]


@pytest.mark.parametrize(
    ("dtype", "precisions"),
    [
        ("tf32", ("tf32", "tf32", True)),
        ("fp32", ("ieee", "ieee", False)),
        ("default", ("tf32", "ieee", False)),
        ("bf16", ("tf32", "ieee", False)),
    ],
)
def test_flags_are_readable_by_either_of_their_names(dtype: str, precisions: tuple):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with flags(dtype):
        assert (cudnn.conv.fp32_precision, matmul.fp32_precision, matmul.allow_tf32) == precisions
        assert cudnn.allow_tf32 is (dtype != "fp32")
    assert (cudnn.conv.fp32_precision, matmul.allow_tf32) == ("tf32", False)


# Networks, errors and peers


def test_the_network_has_sane_values_in_either_layout(setup: Setup):
    (nchw, x), (channels_last, y) = setup.in_layout("nchw"), setup.in_layout("channels-last")
    assert x.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last) and x.equal(y)
    assert setup.in_layout("nchw")[0] is nchw
    assert setup.reference.dtype == torch.float64 and 0.05 < setup.reference.std() < 5
    assert torch.allclose(nchw(x), channels_last(y), atol=1e-5)
    variances = [m.running_var for m in nchw.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(v.std() > 0 and v.isfinite().all() for v in variances)


def test_errors_are_relative_and_what_is_not_finite_is_infinite():
    reference = torch.full((3, 2), 2.0, dtype=torch.float64)
    y = torch.full((3, 2), 2.0)
    assert errors(y, reference, 3) == (0, 0)
    y[2, 1] = 3.0
    largest, rms = errors(y, reference, 3)
    assert largest == pytest.approx(0.5) and rms == pytest.approx(0.5 / 6**0.5)
    y[0, 0] = float("nan")
    assert errors(y, reference, 3)[1] == float("inf")
    assert errors(torch.zeros(2, 2), reference, 3)[1] == float("inf")


def test_checked_images_are_spread_over_the_batch():
    assert spread(1) == [0] and spread(3) == [0, 1, 2]
    assert len(spread(1024)) == 16 and spread(1024)[0] == 0 and spread(1024)[-1] == 1023


class FoldedOnCpu(peers.FoldedConv2d):
    def relu(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias, *self.geometry))

    def add_relu(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias, *self.geometry) + z)


def test_the_network_for_cudnn_is_the_same_function(setup: Setup):
    model, images = setup.in_layout("channels-last")
    logits = peers.CudnnFused(model, FoldedOnCpu)(images)
    assert errors(logits, setup.reference, 2)[1] < 1e-5


def test_each_peer_is_described_and_has_a_colour():
    assert set(plots.COLOURS) == {*peers.PEERS, *layers.LAYER_PEERS}
    assert list(peers.DESCRIPTIONS) == list(peers.PEERS)
    assert set(peers.MAX_AUTOTUNE_PEERS) <= set(peers.PEERS)


def test_max_autotune_runs_only_in_cases_of_its_own():
    wanted = ["fused", "eager-nchw"]
    assert "compile-max-autotune" not in measure.peers_of(TINY, None)
    assert measure.peers_of(TINY, [*wanted, "compile-max-autotune"]) == ["eager-nchw", "fused"]
    tuned = Case("cifar", "fp32", 2, max_autotune=True)
    assert measure.peers_of(tuned, None) == [name for name in peers.PEERS if name in peers.MAX_AUTOTUNE_PEERS]
    assert measure.peers_of(tuned, wanted) == []
    args = compare.parse(["--batch-sizes", "1", "--dtypes", "bf16", "--peers", "compile-max-autotune"])
    assert [case.name for case in args.selected] == ["cifar-bf16-1-max-autotune"]


def test_right_peers_are_timed_and_the_others_say_why(setup: Setup):
    model, images = setup.in_layout("nchw")
    wrong_later = iter([False] * 6)
    said = []

    def missing() -> peers.Call:
        raise peers.Unavailable("no such library")

    def broken() -> peers.Call:
        raise RuntimeError("no kernel")

    builders = {
        "right": lambda: partial(model, images),
        "wrong": lambda: lambda: model(images) * 1.001,
        "unstable": lambda: lambda: model(images) * (1 if next(wrong_later, True) is False else 2),
        "missing": missing,
        "broken": broken,
    }
    with torch.no_grad():
        found = measure.measure(builders, setup, said.append, budget_s=0)
    assert {name: m.status for name, m in found.items()} == {
        "right": OK,
        "wrong": WRONG,
        "unstable": WRONG,
        "missing": MISSING,
        "broken": FAILED,
    }
    assert found["right"].timing.samples == MIN_ROUNDS and found["right"].rms_error < 1e-5
    assert [name for name, m in found.items() if m.timing] == ["right"]
    assert found["unstable"].note == "right at first, wrong after the timing"
    assert found["broken"].note == "RuntimeError: no kernel"
    assert len(said) == len(builders)


def test_a_network_case_of_peers_that_run_without_a_gpu():
    result = measure.network_result(TINY, CPU, ["eager-nchw", "eager-channels-last"], print, width=4, budget_s=0)
    assert [found.status for found in result.peers.values()] == [OK, OK]
    assert result.seconds > 0


def test_swapped_networks_tell_what_fell_back(setup: Setup):
    call = peers.swapped(setup)
    model, _ = setup.in_layout("channels-last")
    assert type(call.model.stem.conv).__name__ == "TritonConv2d" and type(model.stem.conv) is nn.Conv2d
    assert call.note == ""
    call.model.stem.conv.fallbacks["dtype"] += 1
    assert call.note == "fell back to PyTorch: stem.conv"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which a GPU excludes")
@pytest.mark.parametrize("name", ["fused", "fused-graph-in-place"])
def test_fused_networks_are_right_or_not_there(setup: Setup, name: str):
    def check(y: torch.Tensor) -> Measured:
        return measure.checked(y, setup.reference, 2, 1e-4)

    with torch.no_grad():
        found, _ = measure.prepared(partial(peers.PEERS[name], setup), check, CPU)
    assert found.status == (OK if hasattr(tritonnn, "fuse") else MISSING)
    assert found.note == ("" if found.status == OK else "tritonnn has no fuse")


# Layers


def test_a_layers_case(monkeypatch: pytest.MonkeyPatch):
    said = []
    names = ["pytorch-nchw", "pytorch-channels-last"]
    result = layers.layers_result(Case("layers", "fp32", 2), CPU, names, said.append, width=4, budget_s=0)
    kinds = [shape.kind for shape in result.layers]
    assert (kinds.count("conv2d"), kinds.count("batch_norm2d"), kinds.count("relu")) == (11, 4, 4)
    assert sum(shape.count for shape in result.layers) == 20 + 20 + 17 + 3
    assert all(found.timing for shape in result.layers for found in shape.peers.values())
    assert len(said) == len(result.layers) == 22
    assert set(report.kind_totals(result)) == {"conv2d", "batch_norm2d", "relu", "max_pool2d", "avg_pool2d", "linear"}


def fake_capture(call):
    """As `timing.capture`: the replay runs the call and overwrites the result."""
    result = call()

    def replay() -> None:
        for old, new in zip(*[found if isinstance(found, list) else [found] for found in (result, call())]):
            old.copy_(new)

    return replay, result


def test_a_graph_takes_turns_among_the_inputs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layers, "capture", fake_capture)
    monkeypatch.setattr(layers, "read_events", lambda call, repeats: 0.4)
    seen = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return 2 * x

    inputs = [torch.full((2,), float(i)) for i in range(1, 4)]
    run = layers.Rotating(layer, inputs, graph=True)
    assert run.calls == 9 and run.note == ""
    seen.clear()
    assert run().tolist() == [2.0, 2.0]
    assert [x[0].item() for x in seen] == [1, 2, 3] * 3


def test_a_layer_that_cannot_be_captured_is_run_without_a_graph(monkeypatch: pytest.MonkeyPatch):
    def capture(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(layers, "capture", capture)
    run = layers.Rotating(torch.relu, [torch.ones(2)], graph=True)
    assert run().tolist() == [1.0, 1.0] and run.calls == 1
    assert run.note == "not in a CUDA graph: RuntimeError: operation not permitted when stream is capturing"


def test_a_captured_network_reads_its_images_at_every_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "capture", fake_capture)
    images = torch.ones(3)
    network = nn.Linear(3, 3)
    assert peers.replayed(network, images).model is network  # a graph does not keep the weights that it reads
    call = peers.replayed(lambda x: 2 * x, images)
    images.fill_(5)
    assert call().tolist() == [10.0] * 3


def test_ceilings_are_per_second():
    found = ceilings(CPU, flags, n=32, copied=2**12)
    assert set(found) == {f"{dtype} TFLOP/s" for dtype in DTYPES} | {"copy GB/s"}
    assert all(rate > 0 for rate in found.values()) and found["copy GB/s"] < 5000


def test_operations_and_bytes_of_a_layer():
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
    x = torch.randn(5, 4, 8, 8)
    (call,) = record_calls(conv, x)
    shape = layers.measure_layer(conv.requires_grad_(False), call, 3, "fp32", ["pytorch-nchw"], 0)
    assert (shape.label, shape.count, shape.cold) == ("conv 3x3/2 4-8, 8x8", 3, False)
    assert shape.flop == 2 * 5 * 8 * 4 * 4 * 4 * 9
    assert shape.bytes == 4 * (5 * 4 * 64 + 5 * 8 * 16 + 8 * 4 * 9)
    assert shape.peers["pytorch-nchw"].timing


def test_a_layer_that_is_wrong_has_no_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(layers.LAYER_PEERS, "flag-gems", ("nchw", lambda layer: lambda x: layer(x) + 0.1))
    relu = nn.ReLU()
    (call,) = record_calls(relu, torch.randn(2, 3, 4, 4))
    found = layers.measure_layer(relu, call, 1, "fp32", ["flag-gems"], 0).peers["flag-gems"]
    assert found.status == WRONG and found.timing is None


def test_libraries_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch):
    for package in ("flag_gems", "attorch"):
        monkeypatch.setitem(sys.modules, package, None)
    assert list(layers.unavailable(layers.LAYER_PEERS)) == ["flag-gems", "attorch"]
    assert layers.unavailable(["triton-nchw"]) == {}


# Tables, JSON and pictures


def test_json_round_trip(tmp_path: Path):
    save(made_up(), tmp_path / "results.json")
    assert load(tmp_path / "results.json") == made_up()


def test_a_wrong_result_has_its_error_but_no_time():
    rows = {row[0]: row for row in report.network_table(made_up().networks[1]).rows}
    assert rows["swapped"][1:] == ["", "", "", "", "", "5.0e-01", "3.0e+00", "WRONG"]
    assert rows["fused"][-1] == "UNAVAILABLE tritonnn has no fuse"
    assert rows["fused-graph"][1:6] == ["0.2560", "0.2304-0.3072", "20", "500,000", "2.00"]


def test_layers_are_held_against_the_roofline_and_summed_by_kind():
    results = made_up()
    (layer_case,) = results.layers
    shape = layer_case.layers[0]
    assert report.floor_ms(shape, results.ceilings, "bf16") == pytest.approx(10**11 / 790e12 * 1e3)
    assert report.floor_ms(layer_case.layers[2], results.ceilings, "bf16") == pytest.approx(10**8 / 4300e9 * 1e3)
    totals = report.kind_totals(layer_case)
    assert totals["conv2d"] == pytest.approx({"pytorch-channels-last": 1.0, "triton-channels-last": 0.5})
    assert totals["relu"] == {"pytorch-channels-last": pytest.approx(1.0), "triton-channels-last": None}
    table = report.layers_table(layer_case, results.ceilings)
    assert table.rows[0][3:8] == ["200.0", "180.0-240.0", "500", "500", "63%"]
    assert "relu 64 at 32x32" in table.note
    assert all(len(row) == len(table.columns) for row in table.rows + table.totals)


def test_the_fastest_of_each_side():
    assert report.summary_table(made_up()).rows[2] == [
        "cifar-bf16-1024",
        "compile-reduce-overhead",
        "3.072",
        "fused-graph",
        "2.048",
        "1.50",
    ]


def test_the_page_has_everything():
    page = report.markdown(made_up(), ["networks.png"])
    for part in (
        "NVIDIA H200",
        "python benchmarks/compare.py",
        "![networks.png](networks.png)",
        "attorch is not installed",
        "Not measured, the time was up: cifar-fp16-1024",
        "FAILED a \\| b",
        "| bf16 TFLOP/s | 790 |",
    ):
        assert part in page


def test_tables_have_as_many_cells_as_columns():
    results = made_up()
    tables = [report.summary_table(results), *report.settings_tables(results)]
    tables += [report.network_table(network) for network in results.networks]
    tables += [report.totals_table(case) for case in results.layers]
    for table in tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert table_markdown(table) and rich_table(table)


def test_pictures_are_written(tmp_path: Path):
    assert plots.save_plots(made_up(), tmp_path) == ["networks.png", "layers-bf16-1024.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("networks.png", "layers-bf16-1024.png"))


def test_nothing_to_show_is_no_picture(tmp_path: Path):
    results = made_up()
    results.networks, results.layers = [], []
    assert plots.save_plots(results, tmp_path) == []


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "cifar-int8-1"], "no case fits 'cifar-int8-1'"),
        (["--batch-sizes", "0"], "'0'"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--peers", "tensorrt"], "invalid choice: 'tensorrt'"),
        (["--minutes", "-1"], "'-1'"),
        (["--cases", "layers-*", "--peers", "fused"], "no case is left"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        compare.parse(arguments)


def test_without_a_gpu_the_command_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        compare.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no CUDA GPU: times on anything else say nothing about the kernels\n"


def test_the_page_of_an_earlier_run_is_written_again(tmp_path: Path):
    save(made_up(), tmp_path / "results.json")
    compare.main(["--report", str(tmp_path / "results.json")])
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "README.md",
        "networks.png",
        "layers-bf16-1024.png",
    }
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="results.json"):
        compare.report_again(tmp_path / "results.json")


def test_the_command_is_recorded_without_the_folder():
    arguments = ["--dtypes", "bf16", "--output", "/somewhere", "--output=else", "--all"]
    assert compare.command(arguments) == "python benchmarks/compare.py --dtypes bf16 --all"


def test_the_script_runs_from_anywhere(tmp_path: Path):
    command = [sys.executable, ROOT / "benchmarks/compare.py", "--list", "--dtypes", "bf16", "--batch-sizes", "8"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert listed == ["cifar-bf16-8", "layers-bf16-8", "cifar-bf16-8-max-autotune"]


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("", "gpu")]
)
def test_the_folder_is_named_after_the_gpu(name: str, expected: str):
    assert compare.slug(name) == expected


def test_a_run_writes_after_each_case_and_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made = made_up()

    def network_result(case: Case, *_) -> NetworkResult:
        if case.batch_size == 8:
            raise RuntimeError("out of memory")
        return next(network for network in made.networks if network.batch_size == case.batch_size)

    monkeypatch.setattr(compare, "network_result", network_result)
    args = compare.parse(["--cases", "cifar-bf16-?", "cifar-bf16-128", "cifar-bf16-1024", "--ahead", "0"])
    results, said = made_up(), []
    results.networks, results.layers, results.skipped = [], [], []
    console = compare.Console(file=open(tmp_path / "log", "w"), width=160)
    compare.run(args, CPU, results, tmp_path, said.append, console)
    written = load(tmp_path / "results.json")
    assert [network.batch_size for network in written.networks] == [1024, 128, 1]
    assert "cifar-bf16-8 failed: RuntimeError: out of memory" in results.notes
    assert (tmp_path / "README.md").exists()


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch, made: Results) -> None:
    for name, value in {"is_available": True, "current_device": 0, "get_device_name": "NVIDIA H200"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, value in {"ceilings": made.ceilings, "described": made.environment, "settings": made.settings}.items():
        monkeypatch.setattr(compare, name, lambda *_, value=value: value)
    monkeypatch.setattr(ahead, "compile_ahead", lambda todo, processes, say: say(f"ahead: {len(todo)}"))


def test_the_whole_command_but_for_the_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    made = made_up()
    pretend_a_gpu(monkeypatch, made)
    monkeypatch.setattr(compare, "network_result", lambda case, *_: made.networks[0])
    monkeypatch.setattr(compare, "layers_result", lambda case, *_: made.layers[0])
    folder = tmp_path / "new" / "compare"
    with pytest.raises(SystemExit) as ended:
        compare.main(["--cases", "cifar-bf16-1", "layers-bf16-1", "--output", str(folder)])
    assert ended.value.code == 0
    found = load(folder / "results.json")
    assert (found.networks, found.layers) == (made.networks[:1], made.layers)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".png"}
    out = capsys.readouterr().out
    assert "The fastest of each side" in out and "ahead: 1\n" in out


@pytest.mark.parametrize(
    "reason, status, said",
    [
        (DeviceLost("an illegal memory access"), 1, "error: the GPU was lost: an illegal memory access"),
        (KeyboardInterrupt(), 130, "interrupted: {folder} has the cases that were done"),
    ],
    ids=["a lost GPU", "Ctrl-C"],
)
def test_what_ends_the_run_keeps_what_was_measured(
    reason: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    made = made_up()

    def network_result(case: Case, *_) -> NetworkResult:
        if case.batch_size == 1:
            raise reason
        return made.networks[1]

    pretend_a_gpu(monkeypatch, made)
    monkeypatch.setattr(compare, "network_result", network_result)
    with pytest.raises(SystemExit) as ended:
        compare.main(["--cases", "cifar-bf16-128", "cifar-bf16-1", "--output", str(tmp_path)])
    assert ended.value.code == status
    assert capsys.readouterr().err == said.format(folder=tmp_path) + "\n"
    found = load(tmp_path / "results.json")
    assert found.networks == [made.networks[1]] and ("lost" in found.notes[-1] or "Interrupted" in found.notes[-1])


@pytest.mark.gpu
class TestOnAGpu:
    def test_compiling_ahead(self):
        said = []
        ahead.compile_ahead({Case("cifar", "bf16", 8): ["swapped-graph", "fused-graph"]}, 1, said.append)
        assert said[0].startswith("compiled ahead: 1 of 1 networks")

    def test_the_peers_that_compile_in_seconds(self):
        names = [name for name in peers.PEERS if not name.startswith("compile")]
        with flags("bf16"):
            result = measure.network_result(Case("cifar", "bf16", 8), torch.device("cuda"), names, print, budget_s=0.2)
        assert {name: f.note for name, f in result.peers.items() if f.status not in (OK, MISSING)} == {}
        assert all(found.timing for found in result.peers.values() if found.status == OK)

    def test_layers(self):
        case = Case("layers", "bf16", 128)
        result = layers.layers_result(case, torch.device("cuda"), None, print, budget_s=0.02)
        assert all(shape.cold for shape in result.layers if shape.kind == "conv2d")
        assert all(found.note == "" for shape in result.layers for found in shape.peers.values())
