"""Launch plans give what the launchers give. Without a GPU interpreted kernels play the compiled ones."""

import copy
import ctypes
import gc
import threading
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from helpers.compare import DEVICE, image
from helpers.twins import assert_same, images, twins
from torch.multiprocessing.reductions import StorageWeakRef
from triton.compiler.compiler import LazyDict
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import tritonnn
from tritonnn.layers.fused.conv2d import FusedConv2d
from tritonnn.ops import avg_pool2d, batch_norm2d, linear, max_pool2d, relu
from tritonnn.ops.conv2d import op as conv2d
from tritonnn.ops.conv2d.forms.few_channels import FewChannelsConfig
from tritonnn.ops.conv2d.pack import pack_weight
from tritonnn.ops.conv2d.problem import Choice
from tritonnn.ops.relu import relu_forward_kernel
from tritonnn.runtime import launch_plan, replay
from tritonnn.runtime.dependent_launch import launches_as_in_graphs
from tritonnn.runtime.launch_plan import Plans, forget_plans, launch, launch_key
from tritonnn.runtime.operator import INTERPRETER

ONCE = (1, 1), (1, 1), (1, 1), 1
HALVED = (2, 2), (0, 0)


class Compiled:
    """A kernel as Triton's compiler returns it: `run` takes addresses."""

    function, packed_metadata = 0, (4, 1, 0)

    def __init__(self, kernel: InterpretedFunction, arguments: tuple) -> None:
        self.kernel, self.like = kernel, [_without_memory(arg) for arg in arguments]

    def launch_metadata(self, grid, stream, *arguments):
        return {"name": self.kernel.__name__}

    def run(self, x, y, z, stream, function, packed_metadata, metadata, enter_hook, exit_hook, *arguments):
        if enter_hook is not None:
            enter_hook(metadata)
        arguments = [_at(arg, like) for arg, like in zip(arguments, self.like, strict=True)]
        with INTERPRETER:
            run_interpreted(self.kernel, *arguments, grid=(x, y, z), warmup=False)
        if exit_hook is not None:
            exit_hook(metadata)


run_interpreted = InterpretedFunction.run


def _without_memory(arg: object) -> object:
    if isinstance(arg, TensorDescriptor):
        arg = copy.copy(arg)
        arg.base = arg.base.new_empty(0)
    return arg.new_empty(0) if isinstance(arg, torch.Tensor) else arg


def _at(arg: object, like: object) -> object:
    """A tensor or descriptor like that one, at the address; anything else as it is."""
    if isinstance(like, TensorDescriptor):
        base = _at(arg.base.data_ptr(), like.base)
        return TensorDescriptor(base, list(arg.shape), list(arg.strides), like.block_shape, arg.padding)
    if not isinstance(like, torch.Tensor):
        return arg
    if arg == 0:
        return like.new_empty(0)
    return torch.frombuffer((ctypes.c_char * like.element_size()).from_address(arg), dtype=like.dtype)


def _run_and_return_compiled(kernel, *args, grid, warmup, **constants):
    run_interpreted(kernel, *args, grid=grid, warmup=warmup, **constants)
    named = dict(zip(kernel.arg_names, args)) | constants
    return Compiled(kernel, tuple(named[name] for name in kernel.arg_names))


@pytest.fixture(autouse=True)
def replays(monkeypatch) -> Iterator[list]:
    """The plans that were replayed, none of which another test made."""
    seen = []
    forget_plans()
    replayed = replay.Plan.__call__

    def counted(plan, addresses):
        seen.append(plan)
        return replayed(plan, addresses)

    monkeypatch.setattr(replay.Plan, "__call__", counted)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(InterpretedFunction, "run", _run_and_return_compiled)
        monkeypatch.setattr(launch_plan, "can_record", lambda tensors: True)
        monkeypatch.setattr(replay, "current_stream", lambda device: 0)
    yield seen
    forget_plans()


def last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return image(*shape, dtype=dtype, channels_last=True)


def packed(*shape: int, input_precision: str = "ieee") -> torch.Tensor:
    return pack_weight(image(*shape), input_precision)


def half(*shape: int) -> torch.Tensor:
    return image(*shape, dtype=torch.bfloat16)


def large(batch: int = 32) -> torch.Tensor:
    return last(batch, 64, 16, 16, dtype=torch.bfloat16)


CASES = {
    "conv2d": (conv2d.conv2d, lambda: (image(2, 4, 5, 5), image(3, 4, 3, 3), None, *ONCE)),
    "conv2d, bias": (conv2d.conv2d, lambda: (last(2, 4, 6, 6), image(3, 4, 3, 3), image(3), *HALVED, (1, 1), 1)),
    "conv2d, packed": (conv2d.conv2d, lambda: (last(2, 4, 5, 5), last(3, 4, 3, 3), image(3), *ONCE)),
    "conv2d, few pixels": (conv2d.conv2d, lambda: (image(1, 32, 5, 5), image(8, 32, 3, 3), image(8), *ONCE)),
    "conv2d, groups": (conv2d.conv2d, lambda: (image(1, 4, 5, 5), image(6, 2, 3, 3), image(6), *ONCE[:3], 2)),
    "conv2d, depthwise": (conv2d.conv2d, lambda: (image(1, 4, 5, 5), image(4, 1, 3, 3), None, *ONCE[:3], 4)),
    "conv2d_fused": (
        conv2d.conv2d_fused,
        lambda: (
            (last(2, 4, 5, 5), packed(3, 4, 3, 3), image(3), image(3), last(2, 3, 5, 5), "relu", 0.01, (3, 3), *ONCE)
            + ("ieee", False, False)
        ),
    ),
    "conv2d_fused, split": (
        conv2d.conv2d_fused,
        lambda: (
            (last(2, 16, 5, 5), packed(16, 16, 3, 3, input_precision="tf32x3"), None, None, None, "none", 0.01, (3, 3))
            + (*ONCE, "tf32x3", False, False)
        ),
    ),
    "conv2d_fused, depthwise, split": (
        conv2d.conv2d_fused,
        lambda: (
            (last(1, 4, 5, 5), packed(4, 1, 3, 3, input_precision="tf32x3"), None, None, None, "none", 0.01, (3, 3))
            + (*ONCE[:3], 4, "tf32x3", False, False)
        ),
    ),
    "linear": (linear.linear, lambda: (image(3, 8), image(5, 8), image(5))),
    "relu": (relu.relu, lambda: (image(3, 5),)),
    "relu, channels_last": (relu.relu, lambda: (last(2, 3, 4, 4),)),
    "max_pool2d": (max_pool2d.max_pool2d, lambda: (image(2, 3, 6, 6), (2, 2), *HALVED, (1, 1), False, False)),
    "max_pool2d, indices": (max_pool2d.max_pool2d, lambda: (last(2, 3, 6, 6), (2, 2), *HALVED, (1, 1), False, True)),
    "avg_pool2d": (avg_pool2d.avg_pool2d, lambda: (image(2, 3, 6, 6), (2, 2), *HALVED, False, True, None)),
    "adaptive_avg_pool2d": (avg_pool2d.adaptive_avg_pool2d, lambda: (image(2, 3, 6, 6), (1, 2))),
    "batch_norm2d": (
        batch_norm2d.batch_norm2d_inference,
        lambda: (image(2, 3, 4, 4), image(3), None, image(3), image(3).abs(), 1e-5),
    ),
    "batch_norm2d, training": (
        batch_norm2d.batch_norm2d_training,
        lambda: (last(2, 3, 4, 4), image(3), image(3), 1e-5),
    ),
}
LARGE = {
    "conv2d, TMA": (conv2d.conv2d, lambda: (large(), half(64, 64, 3, 3), half(64), *ONCE)),
    "conv2d, TMA, contiguous": (
        conv2d.conv2d,
        lambda: (image(32, 64, 16, 16), image(64, 64, 3, 3), image(64), *ONCE),
    ),
    "conv2d_fused, TMA": (
        conv2d.conv2d_fused,
        lambda: (
            (large(), pack_weight(half(64, 64, 3, 3), "ieee"), image(64), image(64), large(), "relu", 0.01)
            + ((3, 3), *ONCE, "ieee", False, False)
        ),
    ),
    "conv2d_fused, TMA, stride 2": (
        conv2d.conv2d_fused,
        lambda: (
            (large(128), pack_weight(half(256, 64, 1, 1), "ieee"), None, image(256), None, "relu", 0.01)
            + ((1, 1), *HALVED, (1, 1), 1, "ieee", False, False)
        ),
    ),
}
"""Too large for the interpreter, or forms that it does not take."""
IN_PLACE = {
    "relu_": (relu.relu_, lambda: (image(3, 5),)),
    "batch_norm2d_update_": (
        batch_norm2d.batch_norm2d_update_,
        lambda: (image(3), image(3).abs(), image(3), image(3).abs(), 0.1, 32),
    ),
}


def elsewhere(t: object) -> object:
    """A copy of a tensor with the same strides, 64 bytes behind the start of its storage."""
    if not isinstance(t, torch.Tensor):
        return t
    offset = 64 // t.element_size()
    size = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) + 1
    return t.new_empty(size + offset).as_strided(t.shape, t.stride(), offset).copy_(t)


def launched(operator, *args):
    """What an operator gives without a plan; it makes one, and others are forgotten."""
    forget_plans()
    return operator(*args)


def planned(launcher, state=None):
    """launcher by plan."""
    plans = Plans(state)
    return lambda *args: plans.run(launch_key(args), args, locked, launcher, *args)


def locked(launcher, *args):
    with INTERPRETER:
        return launcher(*args)


def assert_identical(actual, expected):
    for a, e in zip(*((t if isinstance(t, tuple) else (t,)) for t in (actual, expected)), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (e.shape, e.stride(), e.dtype)
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.gpu) for name in LARGE)])
def test_replays_give_what_the_launcher_gives(name, replays):
    operator, make = (CASES | LARGE)[name]
    inputs = [make(), make(), make(), tuple(elsewhere(t) for t in make())]
    expected = [launched(operator, *args) for args in inputs]
    assert not replays
    actual = [operator(*args) for args in inputs]
    assert len(replays) == 4
    for i in range(4):  # each call has memory of its own
        assert_identical(actual[i], expected[i])


DIFFERENTIABLE = ("conv2d, bias", "conv2d, groups", "linear", "relu", "max_pool2d, indices", "avg_pool2d")
DIFFERENTIABLE += ("adaptive_avg_pool2d", "batch_norm2d", "batch_norm2d, training")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_by_plan_are_those_of_the_launchers(name, replays):
    """The backward pass is a plan as a whole, for each choice of gradients that are needed."""
    operator, make = CASES[name]

    def gradients(args, needed):
        leaves = [arg.clone().requires_grad_() for arg in args[:needed] if isinstance(arg, torch.Tensor)]
        y = operator(*leaves, *args[len(leaves) :])
        y = y[0] if isinstance(y, tuple) else y
        return torch.autograd.grad(y, leaves, y.detach() * 2)

    calls = [(make(), needed) for _ in range(2) for needed in (2, 1)]
    expected = []
    for call in calls:
        forget_plans()
        expected.append(gradients(*call))
    replays.clear()
    actual = [gradients(*call) for call in calls]
    planned = 1 if DEVICE.type == "cuda" and name.startswith("conv2d") else 2  # PyTorch has gradients in float32 there
    assert len(replays) >= planned * len(calls) - 2  # the first of each kind may have to make its plans
    for a, e in zip(actual, expected, strict=True):
        assert_identical(a, e)


def test_gradients_by_plan_depend_on_constants(replays):
    x = image(2, 3, 6, 6).requires_grad_()
    grads = []
    for _ in range(2):
        for count_include_pad in (True, False):
            y = avg_pool2d.avg_pool2d(x, (3, 3), (1, 1), (1, 1), False, count_include_pad, None)
            grads += torch.autograd.grad(y, x, torch.ones_like(y))
    assert len(replays) == 4
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3]) and not torch.equal(grads[0], grads[1])


def test_gradients_by_plan_depend_on_an_input_that_was_not_saved(replays):
    """The mean of whole images keeps nothing of them for backward, and all sizes have gradients of one size."""
    for size, channels_last in ((6, False), (4, False), (6, True), (6, False), (4, False), (6, True)):
        x = image(2, 3, size, size, channels_last=channels_last).requires_grad_()
        y = avg_pool2d.adaptive_avg_pool2d(x, (1, 1))
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert_identical(grad, torch.full_like(x, 1 / size**2))
    assert len(replays) == 6


def test_replays_of_a_copy_whose_pixels_overlap(replays, monkeypatch):
    config = FewChannelsConfig(BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=1)
    monkeypatch.setattr(conv2d, "choose", lambda product: Choice(config))
    inputs = [(image(2, 3, 9, 10), image(8, 3, 7, 7), image(8), (2, 2), (3, 3), (1, 1), 1) for _ in range(3)]
    expected = [launched(conv2d.conv2d, *args) for args in inputs]
    for i in range(3):
        assert_identical(conv2d.conv2d(*inputs[i]), expected[i])
        assert len(replays) == i + 1


@pytest.mark.parametrize("name", IN_PLACE)
def test_replays_in_place(name, replays):
    operator, make = IN_PLACE[name]
    for i in range(3):
        args = tuple(elsewhere(t) for t in make())
        expected = copy.deepcopy(args)
        assert launched(operator, *expected) is None
        assert operator(*args) is None
        assert len(replays) == i + 1
        for a, e in zip(args, expected):
            assert torch.equal(a, e) if isinstance(a, torch.Tensor) else a == e


@triton.jit
def copy_box_kernel(x_desc, y_ptr, H: tl.constexpr, W: tl.constexpr):
    x = x_desc.load([H, 0])
    tl.store(y_ptr + tl.arange(0, H)[:, None] * W + tl.arange(0, W)[None, :], x)


def test_tensor_descriptors(replays):
    """The second of two tiles, of an input, an allocation and a part of one."""

    def launcher(x):
        whole, y, z = x.new_empty(48, 16), x.new_empty(16, 16), x.new_empty(16, 16)
        launch(relu_forward_kernel, (1,), x, whole[16:], x.numel(), ACC=tl.float32, BLOCK=512)
        for source, copied in ((x, y), (whole[16:], z)):
            launch(copy_box_kernel, (1,), TensorDescriptor.from_tensor(source, [16, 16]), copied, H=16, W=16)
        return y, z

    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU with tensor descriptors")
    run = planned(launcher)
    for i in range(3):
        x = image(32, 16)
        assert_identical(run(x), (x[16:], x[16:].relu()))
        assert len(replays) == i


def test_a_launcher_that_computes_runs_every_time(replays):
    for _ in range(3):
        x = image(4, 6)[:, ::2]  # which it copies
        assert torch.equal(relu.relu(x), x.relu())
    assert not replays


def test_unknown_memory_is_never_replayed(replays):
    table = image(4)

    def launcher(x):
        y = torch.empty_like(x)
        launch(relu_forward_kernel, (1,), table, y, 4, ACC=tl.float32, BLOCK=4)
        return y

    run = planned(launcher)
    for _ in range(3):
        table = image(4)
        assert torch.equal(run(image(4)), table.relu())
    assert not replays


def test_overlapping_inputs_are_not_recorded(replays):
    x, weight, scale, bias = last(2, 4, 5, 5), packed(4, 4, 3, 3), image(4).abs(), image(4).abs()
    rest = ("relu", 0.01, (3, 3), *ONCE, "ieee", False, False)
    expected = launched(conv2d.conv2d_fused, x, weight, scale, bias, x.clone(), *rest)
    forget_plans()
    for _ in range(2):
        assert_identical(conv2d.conv2d_fused(x, weight, scale, bias, x, *rest), expected)
    assert not replays
    for residual in (x.clone(), x.clone(), x):
        assert_identical(conv2d.conv2d_fused(x, weight, scale, bias, residual, *rest), expected)
    assert len(replays) == 2


OTHERS = {
    "shape": lambda x: image(2, 4, 4, 4),
    "strides": lambda x: x.to(memory_format=torch.channels_last),
    "type": lambda x: x.double(),
    "alignment": lambda x: image(4 * 4 * 4 + 1)[1:].view(1, 4, 4, 4),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_arguments_have_other_plans(other, replays):
    launched = []

    def launcher(x):
        launched.append(x)
        return relu.relu(x)

    run = planned(launcher)
    x = image(1, 4, 4, 4)
    for t in (x, OTHERS[other](x)):
        for _ in range(2):
            assert_identical(run(t), t.relu())
    assert len(launched) == 2 and len(replays) == 2


def test_constants_and_missing_tensors_have_other_plans(replays):
    x = image(1, 2, 8, 8)
    for kernel_size in ((2, 2), (3, 3), (2, 2)):
        y, _ = max_pool2d.max_pool2d(x, kernel_size, *HALVED, (1, 1), False, False)
        assert torch.equal(y, torch.max_pool2d(x, kernel_size, 2))
    x, weight = image(2, 8), image(3, 8)
    for bias in (None, image(3), None, image(3)):
        torch.testing.assert_close(linear.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert len(replays) == 3


def test_state_has_other_plans(replays):
    state = [False]

    def launcher(x):
        return relu.relu(x) if state[0] else max_pool2d.max_pool2d(x, (1, 1), (1, 1), (0, 0), (1, 1), False, False)[0]

    run = planned(launcher, lambda x: state[0])
    x = image(1, 2, 3, 3)
    for state[0] in (False, True, False, True):
        assert torch.equal(run(x), x.relu() if state[0] else x)
    assert len(replays) == 2


@pytest.mark.parametrize("flag", [torch.backends.cudnn.conv, torch.backends.cuda.matmul], ids=["conv2d", "linear"])
def test_precision_flags_have_other_plans(flag, replays):
    _, swapped = twins(dtype=torch.float32)
    layer, x = (swapped[0], image(2, 3, 8, 8)) if flag is torch.backends.cudnn.conv else (swapped[7], image(2, 8))
    with torch.no_grad():
        for flag.fp32_precision in ("ieee", "tf32"):
            layer(x)
        assert not replays
        layer(x)
    assert len(replays) == 1


def test_launches_as_in_graphs_have_other_plans(replays):
    layer, x = tritonnn.TritonReLU(), image(2, 3, 4, 4)
    for replayed in 0, 1:
        layer(x)
        assert len(replays) == replayed
    with launches_as_in_graphs():
        for replayed in 1, 2:
            layer(x)
            assert len(replays) == replayed
    layer(x)
    assert len(replays) == 2


def test_autocast_has_other_plans(replays):
    """Layer and input are in bfloat16, which one of the types of autocast leaves alone."""
    pytorch, swapped = (model[7].to(torch.bfloat16) for model in twins())
    x = half(2, 8)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast(DEVICE.type, dtype):
                assert swapped(x).dtype == pytorch(x).dtype == dtype
    assert len(replays) == 2


def test_what_autocast_allows_a_fused_layer_is_refused_without(replays):
    layer = next(m for m in tritonnn.fuse(twins(dtype=torch.float32)[0]).modules() if isinstance(m, FusedConv2d))
    x = half(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        expected, *others = (layer(x) for _ in range(4))
        assert all(torch.equal(y, expected) for y in others)
    assert len(replays) == 2
    with torch.no_grad(), pytest.raises(RuntimeError, match="type"):
        layer(x)


def test_fused_weights_of_the_moment(replays):
    layer = next(m for m in tritonnn.fuse(twins()[0]).modules() if isinstance(m, FusedConv2d))
    x = images()
    with torch.no_grad():
        before = [layer(x) for _ in range(3)][-1]
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        for _ in range(3):
            assert_same(layer(x), 2 * before)
        layer.weight = layer.weight / 2
        layer.bias = layer.bias / 2
        for _ in range(3):
            assert_same(layer(x), before)
    assert len(replays) >= 5


@pytest.mark.parametrize("x", [3.0, None])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.MaxPool2d, torch.nn.Linear])
def test_an_input_that_is_no_tensor_is_pytorchs_error(kind, recorded, x):
    pytorch, swapped = twins(training=recorded)
    index = next(i for i, layer in enumerate(pytorch) if type(layer) is kind)
    with torch.set_grad_enabled(recorded):
        with pytest.raises((AttributeError, TypeError)) as expected:
            pytorch[index](x)
        with pytest.raises(expected.type):
            swapped[index](x)


def test_the_number_of_plans_is_bounded(replays, monkeypatch):
    monkeypatch.setattr(launch_plan, "MOST_PLANS", 3)
    run = planned(relu.relu)
    for _ in range(2):
        for size in range(1, 5):
            run(image(size))
    assert not replays
    run(image(4))
    assert len(replays) == 1


def test_plans_hold_no_tensors():
    x = image(4)
    y = relu.relu(x)
    storages = [StorageWeakRef(t.untyped_storage()) for t in (x, y)]
    del x, y
    relu.relu(image(4))
    gc.collect()  # Triton's interpreter leaves cycles
    assert all(storage.expired() for storage in storages)


def test_profilers_see_the_launches(replays):
    x = image(4)
    relu.relu(x)
    names = []
    hook = triton.knobs.runtime.launch_enter_hook

    def enter(metadata):
        names.append((metadata.get() if isinstance(metadata, LazyDict) else metadata)["name"])

    hook.add(enter)
    try:
        relu.relu(x)
    finally:
        hook.remove(enter)
    assert len(replays) == 1
    assert names == ["relu_forward_kernel"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_network_in_modes_of_autograd(mode, replays):
    pytorch, swapped = (model.requires_grad_(False) for model in twins())
    with mode():
        for _ in range(3):
            x = images()
            expected, actual = pytorch(x), swapped(x)
            assert_same(actual, expected)
            assert actual.is_inference() == expected.is_inference() and not actual.requires_grad
    assert len(replays) >= 14


def test_training(replays):
    """Through PyTorch's dispatcher."""
    pytorch, swapped = twins(training=True)
    for _ in range(3):
        x = images(4)
        expected, actual = pytorch(x), swapped(x)
        assert_same(actual, expected)
        for model, y in ((pytorch, expected), (swapped, actual)):
            model.zero_grad()
            y.square().sum().backward()
        assert_same([p.grad for p in swapped.parameters()], [p.grad for p in pytorch.parameters()])
        assert_same(list(swapped.buffers()), list(pytorch.buffers()))
    assert replays


def test_threads(replays):
    run, make = CASES["batch_norm2d, training"]
    inputs = [make() for _ in range(4)]
    expected = [launched(run, *args) for args in inputs]
    actual = {}

    def work(i: int) -> None:
        for _ in range(3):
            actual[i] = run(*inputs[i])

    if DEVICE.type == "cpu":  # the interpreter itself takes one thread
        run(*inputs[0])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_identical(actual[i], expected[i])
    assert replays


def test_numbers_seen_as_their_negatives():
    """The imaginary part of a conjugate is its memory with a sign that only PyTorch's dispatcher knows of."""
    pytorch, swapped = twins(dtype=torch.float32)
    x = torch.randn(3, 8, dtype=torch.complex64, device=DEVICE).conj().imag
    assert x.is_neg()
    with torch.no_grad():
        torch.testing.assert_close(swapped[7](x), pytorch[7](x))


def test_momentum_of_a_layer_that_counts_no_batches(replays):
    """Nothing but kernels runs then, in training too."""
    pytorch, swapped = twins(training=True)
    for momentum in (0.1, 0.5, 0.9):
        x = image(4, 8, 3, 3, dtype=torch.float64)
        for layer in (pytorch[1], swapped[1]):
            layer.num_batches_tracked, layer.momentum = None, momentum
            with torch.no_grad():
                layer(x)
        assert_same(list(swapped[1].buffers()), list(pytorch[1].buffers()))


def test_running_statistics_of_a_step(replays):
    """Where autograd records, they are in the plan of the batch norm itself."""
    pytorch, swapped = (model[1] for model in twins(training=True))
    for step, momentum in enumerate((0.1, 0.1, 0.5, 0.5, 0.5, None, 0.1, 0.1)):
        x, grads = image(4, 8, 3, 3, dtype=torch.float64), []
        for layer in (pytorch, swapped):
            layer.momentum = momentum
            if step == 3:
                layer.running_var = layer.running_var * 2
            if step == 4:
                layer.weight.data, layer.eps = layer.weight.data * 2, 0.1
            y = layer(x)
            grads.append(torch.autograd.grad(y.square().sum(), tuple(layer.parameters())))
        assert_same(grads[1], grads[0])
        assert_same(list(swapped.buffers()), list(pytorch.buffers()))
    assert len(replays) >= 8


def test_attributes_of_the_moment_where_autograd_records(replays):
    x, layers = image(2, 4, 7, 7, dtype=torch.float64).requires_grad_(), []
    for conv, pool in ((torch.nn.Conv2d, torch.nn.MaxPool2d), (tritonnn.TritonConv2d, tritonnn.TritonMaxPool2d)):
        torch.manual_seed(0)
        layers.append((conv(4, 6, 3, padding=1).to(DEVICE, torch.float64), pool(3)))
    once, beside = (1, 1), (0, 1)
    for _ in range(2):
        for stride, padding, mode in (
            (once, once, "zeros"),
            ((2, 1), once, "zeros"),
            (once, beside, "zeros"),
            (once, once, "reflect"),
        ):
            results = []
            for conv, pool in layers:
                conv.stride, conv.padding, conv.padding_mode, pool.stride = stride, padding, mode, stride
                y = pool(conv(x))
                results.append((y, *torch.autograd.grad(y.square().sum(), (x, conv.weight, conv.bias))))
            assert_same(results[1], results[0])
    assert len(replays) >= 8


class Cropped(tritonnn.TritonConv2d):
    first = 0

    def _padded(self, x):
        return x[:, :, self.first : self.first + 3], (0, 0)


def test_subclasses_may_depend_on_more(replays):
    layer, x = Cropped(4, 3, 3, device=DEVICE), image(1, 4, 5, 5)
    with torch.no_grad():
        for layer.first in (0, 0, 2, 1):
            expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias)[:, :, layer.first : layer.first + 1]
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_method_replaced_in_one_layer(replays):
    layers = [tritonnn.TritonConv2d(4, 4, 3, device=DEVICE) for _ in range(2)]
    x = image(1, 4, 3, 3)
    layers[1]._conv_forward = lambda input, weight, bias: input
    with torch.no_grad():
        for _ in range(3):
            layers[0](x)
            assert layers[1](x) is x
    assert len(replays) == 2


def test_parameters_are_those_of_the_moment(replays):
    """Written through .data, replaced, or computed from others."""
    pytorch, swapped = (model[0] for model in twins())
    x = images()
    with torch.no_grad():
        for change in (
            lambda layer: None,
            lambda layer: layer.weight.data.mul_(2),
            lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight * 3)),
            lambda layer: setattr(layer, "stride", (2, 2)),
            lambda layer: setattr(layer, "bias", None),
            lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
        ):
            for layer in (pytorch, swapped):
                change(layer)
            for _ in range(2):
                assert_same(swapped(x), pytorch(x))
    assert len(replays) >= 7


@pytest.mark.gpu
def test_a_second_gpu_while_the_first_is_current(replays):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pytorch, swapped = twins()
    with torch.no_grad():
        for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
            pytorch, swapped = pytorch.to(device), swapped.to(device)
            x = images().to(device)
            for _ in range(3):
                y = swapped(x)
                assert y.device == torch.device(device) and torch.cuda.current_device() == 0
                assert_same(y, pytorch(x))
    assert {plan.device for plan in replays} == {0, 1}


@pytest.mark.gpu
def test_replays_in_a_cuda_graph(replays):
    _, swapped = twins()
    x = images()
    with torch.no_grad():
        expected = [swapped(x) for _ in range(3)][-1]
        for _ in range(2):  # what is launched in a graph has a plan of its own
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            before = len(replays)
            with torch.cuda.graph(graph):
                y = swapped(x)
    assert len(replays) == before + 7
    y.zero_()
    graph.replay()
    assert_same(y, expected)
