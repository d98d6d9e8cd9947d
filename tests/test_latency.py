"""Recording a network's calls and timing them: on a GPU that nothing else uses meanwhile."""

import time

import pytest
import torch
from helpers.compare import DEVICE, image
from torch import nn

from lit_modules.resnet import ResNet18
from tritonnn import kind_of, swap
from tritonnn.latency import LayerCall, record_calls, time_alternately, time_layers, time_networks, twin

CPU = torch.device("cpu")


def small_network() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    return layers.eval().to(DEVICE)


def images() -> torch.Tensor:
    return image(2, 3, 4, 4)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.ReLU()
        self.first = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(self.first(x)))


class Hidden(nn.Module):
    """Reaches a layer past its list of submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.shortcut = [self.relu]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut[0](x)


def test_calls_are_in_the_order_of_running_and_repeated():
    calls = record_calls(CalledTwice(), torch.randn(3, 4))
    assert [(call.name, call.kind, call.shape) for call in calls] == [
        ("first", "linear", (3, 4)),
        ("first", "linear", (3, 4)),
        ("last", "relu", (3, 4)),
    ]


def test_calls_have_the_dtype_and_layout_seen():
    model = small_network().to(torch.bfloat16).to(memory_format=torch.channels_last)
    first, relu = record_calls(model, images().bfloat16())[:2]
    assert (first.memory_format, relu.memory_format) == ("contiguous", "channels_last")
    assert relu.dtype == torch.bfloat16


def test_a_single_layer_is_a_network():
    assert [call.name for call in record_calls(nn.ReLU(), images())] == [""]


def test_recording_leaves_no_hooks_even_after_an_error():
    model = small_network()
    with pytest.raises(RuntimeError):
        record_calls(model, image(2, 5, 4, 4))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.zeros(2, 3, 4, 5), id="contiguous"),
        pytest.param(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(torch.zeros(2, 3, 8, 5)[:, :, ::2], id="sliced"),
        pytest.param(torch.zeros(2, 1, 4, 5).expand(-1, 3, -1, -1), id="expanded"),
        pytest.param(torch.zeros(6, dtype=torch.bfloat16), id="bfloat16"),
    ],
)
def test_random_input_is_like_the_one_seen(x: torch.Tensor):
    call = LayerCall("", "relu", tuple(x.shape), x.stride(), x.dtype, x.device)
    y = call.random_input(torch.Generator().manual_seed(0))
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    assert y.std() > 0.3


def test_a_twin_shares_tensors_but_not_the_swap():
    model = CalledTwice()
    other = twin(model)
    swap(other)
    assert type(model.first) is nn.Linear and type(other.first) is not nn.Linear
    assert other.first.weight is model.first.weight
    model.first.bias = nn.Parameter(torch.ones(4))
    assert other.first.bias is model.first.bias


def test_a_twin_keeps_a_shared_module_shared():
    relu = nn.ReLU()
    first, second = twin(nn.Sequential(relu, relu))
    assert first is second and first is not relu


def test_a_twin_has_its_own_bound_methods():
    """Lightning leaves a bound `forward` in the module's dictionary; a method may be bound to another part, too."""
    model = CalledTwice()
    model.forward = model.forward
    model.last.of_root = model.extra_repr
    model.call_last = model.last.forward
    other = twin(model)
    assert other.forward.__self__ is other and other.last.of_root.__self__ is other
    assert other.call_last.__self__ is other.last
    assert model.forward.__self__ is model and model.call_last.__self__ is model.last


def test_a_network_with_a_bound_forward_is_timed():
    model = small_network()
    model.forward = model.forward
    assert len(time_networks(model, images(), variants=["all"], budget_s=0)) == 2


def test_callables_take_turns_after_their_warm_up():
    calls = []

    def slow(name: str):
        def call() -> None:
            calls.append(name)
            time.sleep(0.003)

        return call

    a, b = time_alternately([slow("a"), slow("b")], CPU, budget_s=0.05)
    assert a.eager.samples == b.eager.samples >= 3
    assert calls[-8:] in (["a", "b", "b", "a"] * 2, ["b", "a", "a", "b"] * 2)  # every other round in reverse
    assert len(calls) > 2 * a.eager.samples
    assert a.device is None


def test_times_are_milliseconds_a_call():
    quick, slow = time_alternately([lambda: None, lambda: time.sleep(0.005)], CPU, budget_s=0.05)
    assert quick.eager.median < 0.1
    assert 4.9 < slow.eager.p10 <= slow.eager.median <= slow.eager.p90 < 50


def test_a_budget_of_nothing_still_takes_three_samples():
    (latency,) = time_alternately([lambda: None], CPU, budget_s=0)
    assert latency.eager.samples == 3


def test_the_first_call_is_not_counted():
    pauses = [0.2]
    (latency,) = time_alternately([lambda: time.sleep(pauses.pop() if pauses else 0)], CPU, budget_s=0.01)
    assert latency.eager.p90 < 50


def test_layers_are_timed_on_both_sides_and_left_alone():
    model = small_network()
    rows = time_layers(model, images(), layers=["conv2d", "linear"], budget_s=0)
    assert [(row.call.name, row.triton is not None) for row in rows] == [
        ("0", True),
        ("1", False),
        ("2", True),
        ("4", True),
    ]
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Flatten, nn.Linear]


def test_a_layer_that_falls_back_says_so():
    layer = nn.Linear(2, 2, device=DEVICE, dtype=torch.complex64)
    (row,) = time_layers(layer, torch.ones(1, 2, device=DEVICE, dtype=torch.complex64), budget_s=0)
    assert row.fallback == "dtype torch.complex64"


def test_networks_are_timed_side_by_side():
    model = small_network()
    latencies = time_networks(model, images(), variants=["relu", ["conv2d", "linear"], "all"], budget_s=0)
    assert len(latencies) == 4
    assert all(latency.eager.median > 0 for latency in latencies)
    assert not any(type(layer).__name__.startswith("Triton") for layer in model)


@pytest.mark.parametrize("timed", [time_layers, time_networks])
def test_an_unknown_kind_is_an_error_that_lists_the_kinds(timed):
    argument = {"layers": "conv3d"} if timed is time_layers else {"variants": ["conv3d"]}
    with pytest.raises(ValueError, match="conv2d"):
        timed(small_network(), images(), **argument)


def test_a_layer_that_cannot_be_swapped_is_an_error():
    with pytest.raises(ValueError, match="other than as submodules"):
        time_networks(Hidden(), images(), variants=["all"], budget_s=0)


@pytest.mark.gpu
class TestOnAGpu:
    def test_device_time_excludes_the_launch(self):
        x = torch.randn(64, device="cuda")
        (latency,) = time_alternately([x.relu], x.device, budget_s=0.05)
        assert latency.device_clock == "CUDA graph"
        assert 0 < latency.device.median < latency.eager.median

    def test_device_time_of_known_work(self):
        x = torch.empty(2**28, dtype=torch.float32, device="cuda")  # 1 GiB read, 1 GiB written
        calls = [lambda: x.neg_(), lambda: (x.neg_(), x.neg_())]
        for _ in range(8):  # until no other process had a part of the GPU meanwhile
            once, twice = time_alternately(calls, x.device, budget_s=0.1)
            times = twice.device.p10, once.eager.p10
            if times == (pytest.approx(2 * once.device.p10, rel=0.1), pytest.approx(once.device.p10, rel=0.2)):
                return
        pytest.fail(f"{times} for {once.device.p10}")

    def test_what_cannot_be_captured_is_timed_by_events(self):
        x = torch.randn(64, device="cuda")
        (latency,) = time_alternately([lambda: x.relu().sum().item()], x.device, budget_s=0.05)
        assert latency.device_clock == "CUDA events"
        torch.randn(3, device="cuda")  # the generator survived the failed capture

    def test_a_network_on_both_clocks(self):
        model = small_network()
        rows = time_layers(model, images(), budget_s=0.02)
        assert all(side.device_clock == "CUDA graph" for row in rows for side in (row.pytorch, row.triton))
        assert [kind_of(model.get_submodule(row.call.name)) for row in rows] == [row.call.kind for row in rows]


@pytest.mark.gpu
def test_compiled_is_no_slower_than_eager():
    model = ResNet18().eval().requires_grad_(False).to(DEVICE)
    swap(model, strict=True)
    torch._dynamo.reset()
    compiled_model = torch.compile(model, fullgraph=True)
    x = image(1024, 3, 32, 32)  # so that the GPU is waited for, not the launches: those of compiled code cost more
    torch.testing.assert_close(compiled_model(x), model(x), rtol=1e-4, atol=1e-4)
    eager, compiled = time_alternately([lambda: model(x), lambda: compiled_model(x)], DEVICE, budget_s=1.0)
    assert compiled.eager.median <= 1.1 * eager.eager.median
    assert compiled.device.median <= 1.1 * eager.device.median
