"""Autocast, modes of autograd, kinds of tensors, threads, processes and devices: as with PyTorch's layers."""

import copy
import threading

import numpy as np
import pytest
import torch
from helpers.compare import DEVICE, assert_close, image
from helpers.twins import assert_same, images, twins
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

import tritonnn

# Autocast

AUTOCAST = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), torch.float32, torch.float32),
    "conv2d, half input": (lambda: nn.Conv2d(3, 4, 3), torch.float32, torch.bfloat16),
    "conv2d, half parameters": (lambda: nn.Conv2d(3, 4, 3), torch.bfloat16, torch.float32),
    "conv2d, float64": (lambda: nn.Conv2d(3, 4, 3), torch.float64, torch.float64),
    "linear": (lambda: nn.Linear(6, 4), torch.float32, torch.float32),
    "linear, half input": (lambda: nn.Linear(6, 4), torch.float32, torch.float16),
    "linear, float64": (lambda: nn.Linear(6, 4), torch.float64, torch.float64),
    "batch_norm2d": (lambda: nn.BatchNorm2d(3), torch.float32, torch.float32),
    "batch_norm2d, half input": (lambda: nn.BatchNorm2d(3), torch.float32, torch.bfloat16),
    "batch_norm2d, eval, half input": (lambda: nn.BatchNorm2d(3).eval(), torch.float32, torch.bfloat16),
    "max_pool2d": (lambda: nn.MaxPool2d(2), torch.float32, torch.float32),
    "max_pool2d, half": (lambda: nn.MaxPool2d(2), torch.float32, torch.float16),
    "avg_pool2d": (lambda: nn.AvgPool2d(2), torch.float32, torch.float32),
    "avg_pool2d, half": (lambda: nn.AvgPool2d(2), torch.float32, torch.float16),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d(2), torch.float32, torch.bfloat16),
    "relu": (lambda: nn.ReLU(), torch.float32, torch.float32),
    "relu, half": (lambda: nn.ReLU(), torch.float32, torch.float16),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", AUTOCAST)
def test_autocast_has_pytorchs_type_rules(case, dtype):
    make, parameters, inputs = AUTOCAST[case]
    layer = make().to(DEVICE, parameters)
    twin = copy.deepcopy(layer)
    exact = copy.deepcopy(layer).double()
    tritonnn.swap(twin, strict=True)
    x = image(2, 3, 6, 6, dtype=inputs).requires_grad_()
    types, outputs = [], []
    for each in (layer, twin):
        with torch.autocast(DEVICE.type, dtype):
            y = each(x)
            with torch.autocast(DEVICE.type, enabled=False):
                off = each(x.to(parameters)).dtype
        (grad_x, *grads) = torch.autograd.grad(y.float().sum(), (x, *each.parameters()))
        types.append([y.dtype, off, grad_x.dtype, *(g.dtype for g in grads)])
        outputs.append(y)
    assert types[1] == types[0]
    assert_close(outputs[1], exact(x.double()), outputs[0].dtype)


def test_autocast_trains_with_a_gradient_scaler():
    pytorch, swapped = twins(training=True, dtype=torch.float32)
    x, gradients = image(4, 3, 8, 8), []
    for model in (pytorch, swapped):
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
        with torch.autocast(DEVICE.type, torch.float16):
            y = model(x)
        scaler.scale(y.float().square().mean()).backward()
        scaler.unscale_(torch.optim.SGD(model.parameters()))
        gradients.append([p.grad for p in model.parameters()])
    assert all(g.dtype == torch.float32 for g in gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=5e-3)


# Tensors that are more than strided memory


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout, device=DEVICE)


SPECIAL_TENSORS = {
    "nested": (lambda: nn.ReLU(), lambda: nested(torch.strided), "nested tensor"),
    "nested, jagged": (lambda: nn.Linear(3, 2), lambda: nested(torch.jagged), "tensor of type NestedTensor"),
    "sparse": (lambda: nn.ReLU(), lambda: (-torch.eye(3, device=DEVICE)).to_sparse(), "layout torch.sparse_coo"),
    "complex, conv2d": (
        lambda: nn.Conv2d(2, 3, 1, dtype=torch.complex64),
        lambda: torch.randn(1, 2, 4, 4, dtype=torch.complex64, device=DEVICE),
        "dtype torch.complex64",
    ),
    "complex, linear": (
        lambda: nn.Linear(3, 2, dtype=torch.complex64),
        lambda: torch.randn(4, 3, dtype=torch.complex64, device=DEVICE),
        "dtype torch.complex64",
    ),
}


@pytest.mark.parametrize("case", SPECIAL_TENSORS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_other_tensors_fall_back(case):
    make, tensor, reason = SPECIAL_TENSORS[case]
    layer, x = make().to(DEVICE), tensor()
    expected = layer(x)
    report = tritonnn.swap(layer)
    actual = layer(x)
    assert type(actual) is type(expected) and actual.layout == expected.layout
    components = (t.unbind() if t.is_nested else (t.to_dense(),) for t in (actual, expected))
    for a, e in zip(*components, strict=True):
        torch.testing.assert_close(a, e)
    assert report.fallbacks == {"": {reason: 1}}


@pytest.mark.parametrize("inputs", ["data", "autocast", "gradients"])
@pytest.mark.parametrize("shape", [(5, 6), (6,), (2, 5, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
def test_a_sparse_weight_falls_back(layout, bias, shape, inputs):
    """Or is PyTorch's error, which has no product for some of these."""
    layer = nn.Linear(6, 4, bias=bias, device=DEVICE)
    blocks = {"blocksize": (2, 2)} if layout.startswith("b") else {}
    layer.weight = nn.Parameter(getattr(layer.weight.detach(), f"to_sparse_{layout}")(**blocks), requires_grad=False)
    twin = copy.copy(layer)
    report = tritonnn.swap(twin)
    x = image(*shape).requires_grad_(inputs == "gradients")
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=inputs == "autocast"):
        try:
            expected = layer(x)
        except RuntimeError as error:
            with pytest.raises(type(error)) as caught:
                twin(x)
            assert str(caught.value) == str(error)
        else:
            torch.testing.assert_close(twin(x), expected)
            assert report.fallbacks == {"": {f"layout {layer.weight.layout}": 1}}


NO_TENSORS = {"None": None, "list": [1.0, 2.0], "numpy": np.ones((1, 2, 4, 4), dtype=np.float32), "number": 3.0}
TAKEN = {
    "conv2d": lambda: nn.Conv2d(2, 3, 1),
    "linear": lambda: nn.Linear(4, 3),
    "batch_norm2d, training": lambda: nn.BatchNorm2d(2),
    "batch_norm2d, eval": lambda: nn.BatchNorm2d(2).eval(),
    "max_pool2d": lambda: nn.MaxPool2d(2),
    "avg_pool2d": lambda: nn.AvgPool2d(2),
    "adaptive_avg_pool2d": lambda: nn.AdaptiveAvgPool2d(2),
    "relu": lambda: nn.ReLU(),
    "relu, inplace": lambda: nn.ReLU(inplace=True),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("what", NO_TENSORS)
@pytest.mark.parametrize("name", TAKEN)
def test_no_tensor_is_pytorchs_error(name, what, autocast):
    layer = TAKEN[name]().to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        with pytest.raises((TypeError, AttributeError)) as expected:
            layer(NO_TENSORS[what])
        tritonnn.swap(layer)
        with pytest.raises(expected.type) as actual:
            layer(NO_TENSORS[what])
    assert str(actual.value) == str(expected.value)


class Duck:
    """Quacks like the tensor that it holds: no subclass, but PyTorch's functions take it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.dim, self.size = tensor, tensor.dim, tensor.size

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = [arg.tensor if isinstance(arg, cls) else arg for arg in args]
        return cls(func(*args, **kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", TAKEN)
def test_what_has_torch_function_is_taken(name, autocast):
    layer, x = TAKEN[name]().to(DEVICE), image(1, 2, 4, 4)
    twin = copy.deepcopy(layer)
    report = tritonnn.swap(twin)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        expected, actual = layer(Duck(x.clone())), twin(Duck(x.clone()))
    assert type(actual) is Duck and torch.equal(actual.tensor, expected.tensor)
    assert report.fallbacks == {"": {"input of type Duck": 1}}
    for buffer, expected_buffer in zip(twin.buffers(), layer.buffers()):
        assert torch.equal(buffer, expected_buffer)


INTEGERS = {
    "max_pool2d": lambda: nn.MaxPool2d(2),
    "avg_pool2d": lambda: nn.AvgPool2d(2),
    "adaptive_avg_pool2d": lambda: nn.AdaptiveAvgPool2d(2),
    "batch_norm2d": lambda: nn.BatchNorm2d(2),
}


@pytest.mark.parametrize("case", INTEGERS)
def test_integers_fall_back_or_are_pytorchs_error(case):
    """PyTorch pools integers on a CPU, not on a GPU."""
    x = torch.arange(32, device=DEVICE).view(1, 2, 4, 4)
    layer = INTEGERS[case]().to(DEVICE)
    twin = copy.deepcopy(layer)
    report = tritonnn.swap(twin)
    try:
        expected = layer(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as caught:
            twin(x)
        assert str(caught.value) == str(error)
    else:
        assert torch.equal(twin(x), expected)
        assert report.fallbacks == {"": {"dtype torch.int64": 1}}


class Named(torch.Tensor):
    pass


@pytest.mark.parametrize("make", [Named, tv_tensors.Image], ids=["subclass", "tv_tensors.Image"])
def test_subclasses_of_tensor(make):
    pytorch, swapped = twins()
    x = images()
    x = x.as_subclass(Named) if make is Named else make(x)
    expected, actual = pytorch(x), swapped(x)
    assert type(actual) is type(expected)
    assert_same(actual.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    assert not any(m.fallbacks for m in swapped if hasattr(m, "fallbacks"))


def test_distributed_tensors_fall_back():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = nn.Linear(3, 2)
        x = torch.randn(4, 3)
        expected = layer(x)
        report = tritonnn.swap(distribute_module(layer, mesh))
        assert_same(layer(distribute_tensor(x, mesh)).full_tensor(), expected)
        assert report.fallbacks == {"": {"tensor of type DTensor": 1}}
    finally:
        torch.distributed.destroy_process_group()


# Modes of autograd, threads, processes, devices, streams


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd(mode, training):
    x = images()
    results = []
    for model in twins(training):
        with mode():
            y = model(x)
        results.append(
            (y.requires_grad, y.is_inference(), y.grad_fn is None, y.detach().clone(), list(model.buffers()))
        )
    assert results[1][:3] == results[0][:3]
    assert_same(results[1][3:], results[0][3:])


def test_a_network_made_in_inference_mode():
    with torch.inference_mode():
        pytorch, swapped = twins(training=True)
        x = images()
        assert_same(swapped(x), pytorch(x))
        assert_same(list(swapped.buffers()), list(pytorch.buffers()))


def test_two_threads_at_once():
    pytorch, swapped = twins()
    inputs = [images() for _ in range(4)]
    expected = [pytorch(x) for x in inputs]
    actual, errors = {}, []

    def work(i: int) -> None:
        try:
            for _ in range(3):
                actual[i] = swapped(inputs[i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_same([actual[i] for i in range(4)], expected)


class SwappedInTheWorker(Dataset):
    """Items that the worker computes with the network swapped, or restored where there is no interpreter."""

    def __init__(self, model: nn.Module, inputs: torch.Tensor) -> None:
        self.model, self.inputs = model, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad(), tritonnn.swapped(self.model) as report:
            assert len(report.swapped) == 7
            if DEVICE.type == "cpu":
                return self.model(self.inputs[i : i + 1])
        return self.model(self.inputs[i : i + 1]).detach()


def test_a_forked_data_loader_worker():
    pytorch, swapped = twins()
    x = images(4)
    expected = pytorch(x)
    assert_same(swapped(x), expected)  # kernels have run in the parent
    dataset = SwappedInTheWorker(copy.deepcopy(pytorch).cpu(), x.cpu())
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
    items = torch.cat([batch.flatten(0, 1) for batch in loader])
    assert_same(items.to(DEVICE), expected)
    assert_same(swapped(x), expected)


@pytest.mark.parametrize(
    "i",
    [0, 1, 2, 3, 4, 5, 7],
    ids=["conv2d", "batch_norm2d", "relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "linear"],
)
def test_deterministic_algorithms_give_the_same_bits_twice(i):
    """Where PyTorch's layer refuses (on a GPU average pooling has no deterministic backward), so may Triton's."""
    pytorch, swapped = twins(training=True, dtype=torch.float32)
    x = image(16, *{0: (3, 16, 16), 7: (8,)}.get(i, (8, 16, 16))).requires_grad_()

    def run(layer: nn.Module) -> list[torch.Tensor] | None:
        try:
            y = layer(x * 1)
            return [y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))]
        except RuntimeError as error:
            assert "deterministic" in str(error)
            return None

    torch.use_deterministic_algorithms(True)
    try:
        expected, first, second = (run(layer) for layer in (pytorch[i], swapped[i], swapped[i]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first is not None or expected is None
    if first is not None:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_cuda_graph_of_a_warmed_network(training):
    pytorch, swapped = twins(training)
    static = images(4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            swapped(static), pytorch(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = swapped(static)
    for _ in range(2):
        x = images(4)
        static.copy_(x)
        graph.replay()
        with torch.no_grad():
            assert_same(y, pytorch(x))
    assert_same(list(swapped.buffers()), list(pytorch.buffers()))


@pytest.mark.gpu
def test_cuda_graph_of_a_training_step():
    pytorch, swapped = twins(training=True)
    x = images(4)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(swapped), (x.clone(),))
    for model in (pytorch, graphed):
        model(x).square().sum().backward()
    assert_same([p.grad for p in graphed.parameters()], [p.grad for p in pytorch.parameters()])


@pytest.mark.gpu
def test_side_stream():
    pytorch, swapped = twins(dtype=torch.float32)
    stream = torch.cuda.Stream()
    x = image(64, 3, 32, 32)
    with torch.no_grad():
        expected = pytorch[:7](x)
        swapped[:7](x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(500_000_000)  # some 0.3 s: kernels on another stream would run before the input is there
        y = swapped[:7](x * 1)
        assert not stream.query()
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_second_gpu_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pytorch, swapped = (model.to("cuda:1") for model in twins(training=True))
    assert torch.cuda.current_device() == 0
    x = images(4).to("cuda:1")
    for model in (pytorch, swapped):
        y = model(x)
        assert y.device == torch.device("cuda", 1)
        y.square().sum().backward()
    assert_same([p.grad for p in swapped.parameters()], [p.grad for p in pytorch.parameters()])
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_data_parallel():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pytorch, swapped = twins()
    x = images(6)
    assert_same(nn.DataParallel(swapped)(x), pytorch(x))
