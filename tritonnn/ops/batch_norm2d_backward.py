"""Gradients of 2-D batch normalisation. With g the gradient of y, s = 1 / sqrt(var + eps), sums over M pixels:

    grad_bias = sum(g),  grad_weight = s * sum(g * (x - mean))
    grad_x = weight * s * g                                                                              in inference
    grad_x = weight * s * (g - sum(g) / M - (x - mean) * s^2 * sum(g * (x - mean)) / M)                  in training

x: [N, C, H, W], read where it is if dense; grad_x likewise, channels_last where x is. The sums are one pass over g and
x. grad_x is a second one, which starts with what the first one read last, as the L2 cache still holds part of that.
"""

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, index_type, round_to
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..runtime.blocks import ceil_div, pixel_blocks
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.memory_format import empty_image, is_channels_last, pixel_strides
from ..runtime.operator import register_gradient
from .channel_sums import (
    NO_MASK,
    Mask,
    affine,
    no_sums,
    normalized,
    partial_sums,
    passed_by_relu,
    store_sum,
    sum_of_splits,
)


@triton.jit
def batch_norm2d_backward_combine_kernel(
    partial_ptr,
    weight_ptr,
    var_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    coefficients_ptr,
    SPLITS,
    C,
    M,
    eps: tl.float64,
    TRAINING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_GRAD_WEIGHT: tl.constexpr,
    HAS_GRAD_BIAS: tl.constexpr,
    HAS_COEFFICIENTS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One program owns a channel; partial is [2, C, SPLITS], the sums of g and of g * (x - mean).

    coefficients [3, C]: of g, of x - mean, and the constant, whose sum is grad_x.
    """
    c = tl.program_id(0).to(tl.int64)
    wait_for_predecessor(DEPENDENT)
    inverse = 1 / tl.sqrt(tl.load(var_ptr + c).to(tl.float64) + eps)
    if HAS_SUMS:
        sums = sum_of_splits(partial_ptr, c, SPLITS, BLOCK_SPLITS)
        products = sum_of_splits(partial_ptr, C + c, SPLITS, BLOCK_SPLITS)
        if HAS_GRAD_WEIGHT:
            store_sum(grad_weight_ptr + c, products * inverse)
        if HAS_GRAD_BIAS:
            store_sum(grad_bias_ptr + c, sums)
    if HAS_COEFFICIENTS:
        scale = inverse
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + c).to(tl.float64)
        store_sum(coefficients_ptr + c, scale)
        if TRAINING:
            store_sum(coefficients_ptr + C + c, -scale * inverse * inverse * (products / M))
            store_sum(coefficients_ptr + 2 * C + c, -scale * (sums / M))


@triton.jit
def batch_norm2d_backward_input_kernel(
    g_ptr,
    x_ptr,
    mean_ptr,
    coefficients_ptr,
    grad_x_ptr,
    inverse_ptr,
    weight_ptr,
    bias_ptr,
    M,
    C,
    PIXELS,
    stride_n,
    stride_c,
    stride_pixel,
    TRAINING: tl.constexpr,
    BY_INPUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS pixels x BLOCK_C channels, the first one the last of them.

    BY_INPUT: ReLU follows, and masks g as in `channel_sums_partial_kernel`.
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    offs_m = (pid // blocks_c).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = (pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
    mask_c = c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = (offs_m // PIXELS).to(tl.int64) * stride_n + (offs_m % PIXELS).to(tl.int64) * stride_pixel
    offs = offs[:, None] + (c * stride_c)[None, :]
    wait_for_predecessor(DEPENDENT)
    g = tl.load(g_ptr + offs, mask=mask, other=0.0)
    if TRAINING:
        mean = tl.load(mean_ptr + c, mask=mask_c, other=0.0).to(ACC)[None, :]
        of_x = tl.load(coefficients_ptr + C + c, mask=mask_c, other=0.0)[None, :]
        constant = tl.load(coefficients_ptr + 2 * C + c, mask=mask_c, other=0.0)[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
    if BY_INPUT:
        scale, bias = affine(inverse_ptr, weight_ptr, bias_ptr, c, mask_c, HAS_WEIGHT, HAS_BIAS, ACC)
        g = passed_by_relu(g, normalized(x, mean, scale, bias, g.dtype).to(ACC))
    grad_x = g.to(ACC) * tl.load(coefficients_ptr + c, mask=mask_c, other=0.0)[None, :]
    if TRAINING:
        grad_x += (x - mean) * of_x + constant
    start_successor(DEPENDENT)
    tl.store(grad_x_ptr + offs, round_to(grad_x, grad_x_ptr.dtype.element_ty), mask=mask)


def _outputs(g, x, weight, mean, var, eps, training, output_mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the three gradients; those that are not wanted are empty."""
    parameter = mean if weight is None else weight
    grad_x = empty_image(x.shape, x, is_channels_last(x)) if output_mask[0] else x.new_empty(0)
    return grad_x, *(parameter.new_empty(x.shape[1] if wanted else 0) for wanted in output_mask[1:])


def _launch(g, x, weight, mean, var, eps, training, output_mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = _outputs(g, x, weight, mean, var, eps, training, output_mask)
    g, x = dense(g, x), dense(x, x)
    weight, mean, var = (None if t is None else t.contiguous() for t in (weight, mean, var))
    run(g, x, weight, mean, var, eps, training, gradients, NO_MASK)
    return gradients


def dense(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t [N, C, H, W] with the strides of a gradient of x, itself if it has them."""
    return t.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def run(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    training: bool,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    relu: Mask,
) -> None:
    """Fills the gradients of x, weight and bias that are not empty; all of `dense` strides."""
    grad_x, grad_weight, grad_bias = gradients
    wants_x, wants_weight, wants_bias = (grad.numel() > 0 for grad in gradients)
    channels_last = is_channels_last(x)
    N, C, H, W = x.shape
    M = N * H * W
    acc = accumulator(x.dtype)
    has_sums = wants_weight or wants_bias or training
    sums = partial_sums(g, channels_last, x, mean, relu) if has_sums else no_sums(C, x.device)
    coefficients = torch.empty(3, C, dtype=torch.float64 if acc == tl.float64 else torch.float32, device=x.device)
    launch(
        batch_norm2d_backward_combine_kernel,
        (C,),
        sums.partial,
        weight,
        var,
        grad_weight,
        grad_bias,
        coefficients,
        sums.splits,
        C,
        M,
        eps,
        TRAINING=training,
        HAS_WEIGHT=weight is not None,
        HAS_GRAD_WEIGHT=wants_weight,
        HAS_GRAD_BIAS=wants_bias,
        HAS_COEFFICIENTS=wants_x,
        HAS_SUMS=has_sums,
        **dependent_launch(x),
        **sums.blocks,
    )
    if wants_x:
        blocks = pixel_blocks(M, H * W, C, channels_last, x.device)
        launch(
            batch_norm2d_backward_input_kernel,
            (ceil_div(M, blocks.BLOCK_M) * ceil_div(C, blocks.BLOCK_C),),
            g if relu.masked is None else relu.masked,
            x,
            mean,
            coefficients,
            grad_x,
            relu.inverse,
            relu.weight,
            relu.bias,
            M,
            C,
            H * W,
            *pixel_strides(grad_x, channels_last),
            TRAINING=training,
            **relu.flags,
            **dependent_launch(x),
            ACC=acc,
            INDEX=index_type(M + blocks.BLOCK_M),
            **blocks._asdict(),
        )


def _formula(g, x, weight, mean, var, eps, training, output_mask) -> tuple[torch.Tensor | None, ...]:
    weight, mean, var = (None if t is None else t.contiguous() for t in (weight, mean, var))
    inverse = torch.rsqrt(var.to(statistics_dtype(x)) + eps)
    # On a GPU the formula for channels_last takes the last two in place of the running statistics.
    statistics = (None, None) if training else (mean, var)
    return torch.ops.aten.native_batch_norm_backward(
        g, x, weight, *statistics, mean.to(inverse.dtype), inverse, training, eps, output_mask
    )


batch_norm2d_backward = register_gradient(
    "batch_norm2d_backward(Tensor g, Tensor x, Tensor? weight, Tensor mean, Tensor var, float eps, bool training, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    _launch,
    _outputs,
    _formula,
)
"""grad_x, grad_weight and grad_bias [C]; mean and var are those of the batch in `training`, else the running ones."""


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """The type of mean and variance of a batch."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
