"""2-D batch normalisation forward: y = (x - mean) / sqrt(var + eps) * weight + bias, per channel.

x: [N, C, H, W], read where it is if dense; y lies as PyTorch's does. Inference takes mean and variance from the running
statistics, training from the batch (batch_norm2d_statistics.py).
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, index_type, round_to
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..device.pixels import block_of_channels, block_of_pixels
from ..runtime.blocks import PixelBlocks, busy_blocks, ceil_div, pixel_blocks
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.memory_format import empty_image, is_channels_last, pixel_strides
from ..runtime.operator import LIBRARY, each_example, on_its_device, register
from .batch_norm2d_backward import batch_norm2d_backward, statistics_dtype
from .batch_norm2d_statistics import batch_statistics


@triton.jit
def batch_norm2d_normalize_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    M,
    C,
    eps: tl.float64,
    PIXELS,
    stride_n,
    stride_c,
    stride_pixel,
    INVERTED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS pixels x BLOCK_C channels; x and y share their strides.

    INVERTED: var_ptr is to 1 / sqrt(var + eps), computed before. The residual has the strides of y; what is added up
    and goes through ReLU was rounded before, as if each were an operation of its own.
    """
    pid = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    n, pixel, mask_m = block_of_pixels(pid // blocks_c, M, PIXELS, INDEX, BLOCK_M)
    c, mask_c = block_of_channels(pid % blocks_c, C, BLOCK_C)
    mask = mask_m[:, None] & mask_c[None, :]
    offs = (n * stride_n + pixel.to(tl.int64) * stride_pixel)[:, None] + (c * stride_c)[None, :]

    wait_for_predecessor(DEPENDENT)
    mean = tl.load(mean_ptr + c, mask=mask_c, other=0.0).to(ACC)
    scale = tl.load(var_ptr + c, mask=mask_c, other=0.0).to(ACC)
    if not INVERTED:
        scale = 1 / tl.sqrt((scale + eps).to(ACC))
    if HAS_WEIGHT:
        scale = scale * tl.load(weight_ptr + c, mask=mask_c, other=0.0).to(ACC)
    y = (tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC) - mean[None, :]) * scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=mask_c, other=0.0).to(ACC)[None, :]
    y = round_to(y, y_ptr.dtype.element_ty)
    if HAS_RESIDUAL:
        y = y.to(ACC) + tl.load(residual_ptr + offs, mask=mask, other=0.0).to(ACC)
        y = round_to(y, y_ptr.dtype.element_ty)
    if RELU:
        y = tl.where(y.to(ACC) < 0, tl.zeros_like(y), y)
    start_successor(DEPENDENT)
    tl.store(y_ptr + offs, y, mask=mask)


@triton.jit
def batch_norm2d_update_kernel(
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    C,
    momentum: tl.float64,
    unbiased: tl.float64,
    DEPENDENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """running = (1 - momentum) * running + momentum * batch, the variance times `unbiased` = M / (M - 1)."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    DTYPE: tl.constexpr = running_mean_ptr.dtype.element_ty
    wait_for_predecessor(DEPENDENT)
    mean = tl.load(running_mean_ptr + c, mask=mask).to(mean_ptr.dtype.element_ty)
    mean += momentum * (tl.load(mean_ptr + c, mask=mask) - mean)
    tl.store(running_mean_ptr + c, round_to(mean, DTYPE), mask=mask)
    var = tl.load(running_var_ptr + c, mask=mask).to(var_ptr.dtype.element_ty)
    var += momentum * (tl.load(var_ptr + c, mask=mask) * unbiased - var)
    tl.store(running_var_ptr + c, round_to(var, DTYPE), mask=mask)


def _is_channels_last(x: torch.Tensor) -> bool:
    """Whether PyTorch's output is channels_last: of a tensor that fits both formats it is contiguous on a CPU."""
    if x.device.type != "cpu":
        return is_channels_last(x)
    return not x.is_contiguous() and (x.is_contiguous(memory_format=torch.channels_last) or is_channels_last(x))


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if its memory is that of a contiguous or channels_last tensor, otherwise such a copy."""
    return x.contiguous(memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format)


def _contiguous(*parameters: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
    """Parameters as the kernels index them; those of a layer may be views with strides."""
    return (t if t is None else t.contiguous() for t in parameters)


def _keeps_strides(x, weight, bias, training: bool) -> bool:
    """Whether PyTorch's output has the order of x's dimensions, whatever it is: on a GPU where cuDNN is not asked.

    PyTorch's `_select_batch_norm_backend` in ATen/native/Normalization.cpp.
    """
    if x.device.type == "cpu":
        return False
    plain = weight is None or bias is None or torch.bfloat16 in (x.dtype, weight.dtype)
    plain = plain or weight.dtype == torch.float16
    images, numel = x.shape[0], x.numel()
    large = False  # also where sizes are open, as in an exported program, which would be restricted to the smaller ones
    if isinstance(images, int) and isinstance(numel, int):
        large = images > (880_801 if training else 65_535) or numel >= 2**31 - 1
    return plain or large or not torch.backends.cudnn.enabled


def _output(x, weight, bias, training: bool) -> torch.Tensor:
    if _keeps_strides(x, weight, bias, training):
        return torch.empty_like(x)
    return empty_image(x.shape, x, _is_channels_last(x))


def _as_pytorch_lies(y, x, weight, bias, training: bool) -> torch.Tensor:
    """y, contiguous or channels_last, or a copy with the order of x's dimensions where PyTorch's has it."""
    if y.stride() == x.stride() or not _keeps_strides(x, weight, bias, training):
        return y
    copy = torch.empty_like(x)
    return y if y.stride() == copy.stride() else copy.copy_(y)


def normalize(x, weight, bias, mean, var, eps, inverted=False, residual=None, relu=False) -> torch.Tensor:
    """y, contiguous or channels_last."""
    channels_last = _is_channels_last(x)
    x, y = _dense(x), empty_image(x.shape, x, channels_last)
    if y.numel() == 0:
        return y
    weight, bias, mean, var = _contiguous(weight, bias, mean, var)
    N, C, H, W = x.shape
    M = N * H * W
    blocks = _blocks(x, M, channels_last)
    grid = (ceil_div(M, blocks.BLOCK_M) * ceil_div(C, blocks.BLOCK_C),)
    launch(
        batch_norm2d_normalize_kernel,
        grid,
        x,
        y,
        weight,
        bias,
        mean,
        var,
        residual,
        M,
        C,
        eps,
        H * W,
        *pixel_strides(y, channels_last),
        INVERTED=inverted,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        **dependent_launch(x),
        ACC=accumulator(x.dtype),
        INDEX=index_type(M + blocks.BLOCK_M),
        **blocks._asdict(),
    )
    return y


def _blocks(x: torch.Tensor, pixels: int, channels_last: bool) -> PixelBlocks:
    """As for pools; of 16-bit numbers in channels_last twice as many, and of channels what leaves few lanes idle.

    64 images in bfloat16 (H200), us, in brackets as for pools: 144 channels of 28x28 8.0 (17.3), 192 9.6 (17.1), 96 of
    56x56 20 (33), 72 27 (41), 24 of 112x112 38 (43). Blocks of 16 channels, a sector of memory, take a seventh longer.
    """
    C, H, W = x.shape[1:]
    blocks = pixel_blocks(pixels, H * W, C, channels_last, x.device)
    if not channels_last or x.element_size() != 2 or C < 24 or triton.knobs.runtime.interpret:
        return blocks
    block_c = min((128, 64, 32, 16), key=lambda block_c: ceil_div(C, block_c) * block_c * (8 if block_c < 32 else 7))
    return busy_blocks(pixels, C, block_c, 2048, x.device)


def _launch_inference(x, weight, bias, mean, var, eps) -> torch.Tensor:
    return _as_pytorch_lies(normalize(x, weight, bias, mean, var, eps), x, weight, bias, training=False)


def _outputs_inference(x, weight, bias, *_) -> torch.Tensor:
    return _output(x, weight, bias, training=False)


def _launch_training(x, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dense = _dense(x)
    mean, var, inverse = batch_statistics(dense, _is_channels_last(x), eps)
    y = normalize(dense, weight, bias, mean, inverse, eps, inverted=True)
    return _as_pytorch_lies(y, x, weight, bias, training=True), mean, var


def _outputs_training(x, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    C, dtype = x.shape[1], statistics_dtype(x)
    return _output(x, weight, bias, training=True), x.new_empty(C, dtype=dtype), x.new_empty(C, dtype=dtype)


def launch_update(mean, var, running_mean, running_var, momentum, count) -> None:
    mean, var = mean.contiguous(), var.contiguous()
    C = mean.numel()
    if not (running_mean.is_contiguous() and running_var.is_contiguous()):
        copies = running_mean.contiguous(), running_var.contiguous()
        launch_update(mean, var, *copies, momentum, count)
        running_mean.copy_(copies[0])
        running_var.copy_(copies[1])
        return
    block = 1024 if triton.knobs.runtime.interpret else 128
    launch(
        batch_norm2d_update_kernel,
        (ceil_div(C, block),),
        mean,
        var,
        running_mean,
        running_var,
        C,
        momentum,
        count / (count - 1),
        **dependent_launch(mean),
        BLOCK_C=block,
    )


def _setup_context_training(ctx, inputs, output) -> None:
    x, weight, _, ctx.eps = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)  # of those: PyTorch would fill zeros for them
    ctx.save_for_backward(x, weight, mean, var)


def _backward_training(ctx, grad_y, *_):
    if grad_y is None:
        return None, None, None, None
    x, weight, mean, var = ctx.saved_tensors
    return *_gradients(ctx, grad_y, x, weight, mean, var, True), None


def _setup_context_inference(ctx, inputs, output) -> None:
    x, weight, _, mean, var, ctx.eps = inputs
    ctx.save_for_backward(x, weight, mean, var)


def _backward_inference(ctx, grad_y):
    x, weight, mean, var = ctx.saved_tensors
    return *_gradients(ctx, grad_y, x, weight, mean, var, False), None, None, None


def _gradients(ctx, grad_y, x, weight, mean, var, training: bool) -> Iterator[torch.Tensor | None]:
    """The gradients of x, weight and bias, None where one is not needed."""
    needed = tuple(ctx.needs_input_grad[:3])
    grads = batch_norm2d_backward(grad_y, x, weight, mean, var, ctx.eps, training, needed)
    return (grad if wanted else None for grad, wanted in zip(grads, needed))


batch_norm2d_inference = register(
    "batch_norm2d_inference(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps) -> Tensor",
    _launch_inference,
    _outputs_inference,
    _setup_context_inference,
    _backward_inference,
)
batch_norm2d_training = register(
    "batch_norm2d_training(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _launch_training,
    _outputs_training,
    _setup_context_training,
    _backward_training,
)
batch_norm2d_update_ = register(
    "batch_norm2d_update_(Tensor mean, Tensor var, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, "
    "int count) -> ()",
    launch_update,
    lambda *_: None,
)


def _launch_training_and_update(x, weight, bias, running_mean, running_var, eps, momentum):
    y, mean, var = _launch_training(x, weight, bias, eps)
    launch_update(mean, var, running_mean, running_var, momentum, x.numel() // x.shape[1])
    return y, mean, var


def _train(x, weight, bias, running_mean, running_var, eps, momentum):
    y, mean, var = batch_norm2d_training.op(x, weight, bias, eps)
    batch_norm2d_update_.op(mean, var, running_mean, running_var, momentum, x.numel() // x.shape[1])
    return y, mean, var


def train_directly(eps: float) -> Callable:
    """For `by_plan`, where autograd records: `batch_norm2d_training` and, in the same plan, `batch_norm2d_update_`.

    Of x, weight, bias, running_mean, running_var, eps and momentum.
    """
    launch = on_its_device(_launch_training_and_update, _train)
    return batch_norm2d_training.shortcut(3, (eps,), launch)


@torch.library.register_vmap("tritonnn::batch_norm2d_update_", lib=LIBRARY)
def _update_each_example(info, in_dims, mean, var, running_mean, running_var, *args):
    if None in in_dims[2:4]:
        raise RuntimeError(
            "Batch norm got a batched tensor as input while the running_mean or running_var, which will be updated in "
            "place, were not batched."
        )
    return each_example(batch_norm2d_update_)(info, in_dims, mean, var, running_mean, running_var, *args)
