"""2-D convolution (cross-correlation) forward: the operators registered with PyTorch.

    y[n, k, p, q] = bias[k] + sum over c, r, s of weight[k, c, r, s]
                    * x[n, group(k) + c, p*stride_h + r*dilation_h - padding_h, q*stride_w + s*dilation_w - padding_w]

x: [N, C, H, W], any strides; weight: [K, C / groups, R, S]; y: [N, K, P, Q], channels_last where x or weight is. It is
computed by one of several forms (forms/), which dispatch.py picks.
"""

import torch

from ...runtime import hardware
from ...runtime.fallbacks import counter_of_backward
from ...runtime.memory_format import empty_image, is_channels_last
from ...runtime.operator import register
from ...runtime.precision import convolution_input_precision, tf32_of_convolutions
from ..channel_sums import channel_sums
from ..scaled_image import launch_scaled_image
from ..window import output_size
from .backward.choice import reasons_for_pytorch
from .backward.op import conv2d_backward_input, conv2d_backward_weight
from .dispatch import choice_with_prologue, choose, default_choice, launch_unpacked, run
from .epilogue import Epilogue
from .forms import sliced_k
from .problem import Product, Shortcut
from .prologue import Prologue


def _is_channels_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's output is channels_last: it is where x or the weight is, except for float64 on a GPU."""
    if x.dtype == torch.float64 and x.device.type == "cuda":
        return False
    return is_channels_last(x) or is_channels_last(weight)


def _empty(x, K, kernel_size, stride, padding, dilation, channels_last) -> torch.Tensor:
    P, Q = (output_size(*sizes) for sizes in zip(x.shape[2:], kernel_size, stride, padding, dilation))
    return empty_image((x.shape[0], K, P, Q), x, channels_last)


def _output(x, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
    K, _, *kernel_size = weight.shape
    return _empty(x, K, kernel_size, stride, padding, dilation, _is_channels_last(x, weight))


def _launch(x, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
    channels_last_y = _is_channels_last(x, weight)
    window = stride, padding, dilation
    y = _empty(x, weight.shape[0], weight.shape[2:], *window, channels_last_y)
    if y.numel() > 0:
        epilogue = Epilogue(bias=None if bias is None else bias.contiguous())
        input_precision = convolution_input_precision(x, weight, y.numel() // y.shape[1])
        launch_unpacked(x, weight, y, channels_last_y, window, groups, input_precision, epilogue)
    return y


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, *ctx.window = inputs
    ctx.fallbacks = counter_of_backward()
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad_y):
    x, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    reasons = reasons_for_pytorch(x, weight, *ctx.window)
    theirs = [wanted and reason is not None for wanted, reason in zip(needed, (*reasons, None))]
    grad_x = grad_weight = grad_bias = None
    if any(theirs):
        arguments = None, *ctx.window[:3], False, [0, 0], ctx.window[3]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad_y, x, weight, *arguments, theirs)
        if ctx.fallbacks is not None:
            ctx.fallbacks.update(reason for reason, wanted in zip(reasons, theirs) if wanted)
    channels_last = _is_channels_last(x, weight)
    if needed[0] and not theirs[0]:
        grad_x = conv2d_backward_input(grad_y, weight, tuple(x.shape), channels_last, *ctx.window)
    if needed[1] and not theirs[1]:
        grad_weight = conv2d_backward_weight(grad_y, x, tuple(weight.shape), channels_last, *ctx.window)
    if needed[2]:
        grad_bias = channel_sums(grad_y)
    return grad_x, grad_weight, grad_bias, None, None, None, None


conv2d = register(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups) "
    "-> Tensor",
    _launch,
    _output,
    _setup_context,
    _backward,
    tf32_of_convolutions,
)


def _fused_output(
    x, packed, scale, bias, residual, activation, slope, kernel_size, *window_and_precision
) -> torch.Tensor:
    *window, _, input_precision, _, _ = window_and_precision
    K = packed.shape[0] // (3 if input_precision == "tf32x3" else 1)
    return _empty(x, K, kernel_size, *window, channels_last=True)


def _launch_fused(
    x, packed, scale, bias, residual, activation, slope, kernel_size, *window_and_precision
) -> torch.Tensor:
    y = _fused_output(x, packed, scale, bias, residual, activation, slope, kernel_size, *window_and_precision)
    if y.numel() == 0:
        return y
    *window, groups, input_precision, rounded_x, round_y = window_and_precision
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    epilogue = Epilogue(scale, bias, residual, activation, round_y, slope)
    round_x = input_precision == "tf32" and not rounded_x
    product = Product(x, packed, y, True, *window, groups, input_precision, round_x, epilogue)
    run(product, choose(product))
    return y


conv2d_fused = register(
    "conv2d_fused(Tensor x, Tensor packed_weight, Tensor? scale, Tensor? bias, Tensor? residual, str activation, "
    "float slope, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "str input_precision, bool rounded_x, bool round_y) -> Tensor",
    _launch_fused,
    _fused_output,
)
"""activation(scale * conv2d(x, weight) + bias + residual), channels_last, for inference.

`packed_weight` is `pack_weight(weight, input_precision)`; scale and bias [K] are float32 (float64 for float64); the
residual has the shape and type of y; activation and slope as in `Epilogue`. `rounded_x`: x has been rounded to TF32;
`round_y`: y is to be.
"""


def _launch_into(wide, first, x, packed, scale, bias, activation, slope, kernel_size, *window_and_precision) -> None:
    *window, groups, input_precision, rounded_x, round_y = window_and_precision
    K = packed.shape[0] // (3 if input_precision == "tf32x3" else 1)
    y = wide[:, first : first + K]
    if y.numel() == 0:
        return
    round_x = input_precision == "tf32" and not rounded_x
    epilogue = Epilogue(scale, bias, None, activation, round_y, slope)
    product = Product(x, packed, y, True, *window, groups, input_precision, round_x, epilogue)
    run(product, choose(product))


conv2d_into = register(
    "conv2d_into(Tensor(a!) wide, int first, Tensor x, Tensor packed_weight, Tensor? scale, Tensor? bias, "
    "str activation, float slope, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "str input_precision, bool rounded_x, bool round_y) -> ()",
    _launch_into,
    lambda *arguments: None,
)
"""wide[:, first : first + K] = `conv2d_fused` of x without a residual; `wide` is channels_last, dense."""


def _scaled_output(x, x_scale, x_shift, x_activation, *arguments) -> torch.Tensor:
    *others, input_precision, round_y = arguments
    return _fused_output(x, *others, input_precision, False, round_y)


def _launch_scaled(x, x_scale, x_shift, x_activation, *arguments) -> torch.Tensor:
    y = _scaled_output(x, x_scale, x_shift, x_activation, *arguments)
    if y.numel() == 0:
        return y
    packed, scale, bias, residual, activation, slope, _, *window, groups, input_precision, round_y = arguments
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    epilogue = Epilogue(scale, bias, residual, activation, round_y, slope)
    round_x = input_precision == "tf32"
    product = Product(x, packed, y, True, *window, groups, input_precision, round_x, epilogue)
    gates = x_scale.flatten(1) if x_scale.dim() == 4 else x_scale
    with_prologue = product._replace(prologue=Prologue(gates, x_shift, x_activation))
    choice = choice_with_prologue(with_prologue)
    if choice is not None:
        run(with_prologue, choice)
        return y
    product = product._replace(x=launch_scaled_image(x, x_scale, x_shift, x_activation))
    run(product, choose(product))
    return y


conv2d_scaled = register(
    "conv2d_scaled(Tensor x, Tensor x_scale, Tensor? x_shift, str x_activation, Tensor packed_weight, Tensor? scale, "
    "Tensor? bias, Tensor? residual, str activation, float slope, int[2] kernel_size, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, str input_precision, bool round_y) -> Tensor",
    _launch_scaled,
    _scaled_output,
)
"""`conv2d_fused` of `scaled_image(x, x_scale, x_shift, x_activation)`, which is not stored where a kernel can do that.
"""


def takes_shortcut(
    x: torch.Tensor, K: int, kernel_size: tuple[int, int], P: int, Q: int, shortcut_channels: int
) -> bool:
    """Whether `conv2d_with_shortcut` has a kernel for this output [N, K, P, Q], as it has for few pixels."""
    (N, C), taps = x.shape[:2], kernel_size[0] * kernel_size[1]
    config = sliced_k.default_config(N * P * Q, K, C, taps, x.element_size(), hardware.gpu(x.device))
    return config is not None and shortcut_channels % config.BLOCK_K == 0


def _output_with_shortcut(x, packed, *arguments) -> torch.Tensor:
    kernel_size, stride, padding, dilation, _, input_precision = arguments[8:14]
    K = packed.shape[0] // (3 if input_precision == "tf32x3" else 1)
    return _empty(x, K, kernel_size, stride, padding, dilation, channels_last=True)


def _launch_with_shortcut(x, packed, *arguments) -> torch.Tensor:
    scale, bias, shortcut, shortcut_packed, shortcut_scale, shortcut_bias, activation, slope = arguments[:8]
    *window, shortcut_stride, precision, rounded, shortcut_precision, shortcut_rounded, round_y = arguments[9:]
    y = _output_with_shortcut(x, packed, *arguments)
    second = Shortcut(
        shortcut,
        shortcut_packed[-y.shape[1] :],
        shortcut_scale,
        shortcut_bias,
        shortcut_stride,
        shortcut_precision,
        shortcut_precision == "tf32" and not shortcut_rounded,
    )
    round_x = precision == "tf32" and not rounded
    epilogue = Epilogue(scale, bias, None, activation, round_y, slope)
    product = Product(x, packed, y, True, *window, 1, precision, round_x, epilogue, second)
    run(product, default_choice(product))
    return y


conv2d_with_shortcut = register(
    "conv2d_with_shortcut(Tensor x, Tensor packed_weight, Tensor? scale, Tensor? bias, Tensor shortcut, "
    "Tensor packed_shortcut_weight, Tensor? shortcut_scale, Tensor? shortcut_bias, str activation, float slope, "
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int[2] shortcut_stride, "
    "str input_precision, bool rounded_x, str shortcut_precision, bool rounded_shortcut, bool round_y) -> Tensor",
    _launch_with_shortcut,
    _output_with_shortcut,
)
"""The sum of two `conv2d_fused`: that of x and that of `shortcut`, whose filter has one tap and no padding.

Where `takes_shortcut`.
"""
