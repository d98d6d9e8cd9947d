"""What `benchmarks/compare.py` measures: networks and their peers, layers, in turns."""

import sys
import time
from functools import partial

import pytest
import torch
from helpers.fake_time import FakeTime
from torch import nn
from torch.nn import functional as F

import tritonnn
from benchmarks import compare, layers, measure, peers, plots, report
from benchmarks.cases import DTYPES, Case, flags
from benchmarks.networks import Setup, errors, spread
from benchmarks.results import (
    FAILED,
    MISSING,
    OK,
    WRONG,
    Measured,
)
from benchmarks.timing import MIN_ROUNDS, alternate, ceilings, clock
from tritonnn.clocks import Timing, repeats_for, summarize
from tritonnn.latency import record_calls

CPU = torch.device("cpu")
TINY = Case("cifar", "fp32", 2)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup(TINY, CPU, width=4)


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
    """Stands in for `timing.capture`: the replay runs the call and overwrites the result."""
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


def test_pixels_that_no_filter_covers_need_not_be_read():
    shortcut = nn.Conv2d(4, 8, 1, stride=2, bias=False)
    shape = layers.describe(shortcut, torch.randn(5, 4, 8, 8), torch.randn(2, 8, 4, 4), 1)
    assert shape.bytes == 4 * (5 * 4 * 16 + 5 * 8 * 16 + 8 * 4)


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


@pytest.mark.gpu
class TestOnAGpu:
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
