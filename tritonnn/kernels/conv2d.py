"""2-D convolution (cross-correlation) forward.

    y[n, k, p, q] = bias[k] + sum over c, r, s of weight[k, c, r, s]
                    * x[n, group(k) + c, p*stride_h + r*dilation_h - padding_h, q*stride_w + s*dilation_w - padding_w]

x: [N, C, H, W], any strides; weight: [K, C / groups, R, S]; y: [N, K, P, Q], channels_last where x or weight is. Two
forms: an implicit GEMM (implicit_gemm.py), and a kernel of its own where each channel has its own filter.
"""

import torch
import triton
import triton.language as tl

from ..precision import convolution_input_precision
from .arithmetic import accumulator, index_type, round_to
from .block_sizes import pixel_blocks
from .channels_last import channels_last
from .implicit_gemm import implicit_gemm, spans_taps
from .memory_format import empty_image, is_channels_last, pixel_strides
from .operator import register
from .window import output_size


@triton.jit
def conv2d_depthwise_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    M,
    H,
    W,
    PIXELS,
    Q,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_k,
    y_stride_pixel,
    K: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS output pixels x BLOCK_C output channels; PIXELS = P * Q.

    Output channel k reads input channel k // MULTIPLIER; weight is [K, R, S], contiguous.
    """
    BLOCKS_C: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_m = (pid // BLOCKS_C).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    n = (offs_m // PIXELS).to(tl.int64)
    pixel = offs_m % PIXELS
    h_first = pixel // Q * STRIDE_H - PADDING_H
    w_first = pixel % Q * STRIDE_W - PADDING_W
    k = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask_k = k < K
    x_ptrs = x_ptr + (n * x_stride_n)[:, None] + ((k // MULTIPLIER).to(tl.int64) * x_stride_c)[None, :]

    acc = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    for tap in range(R * S):
        h = h_first + tap // S * DILATION_H
        w = w_first + tap % S * DILATION_W
        mask_x = (mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & mask_k[None, :]
        x = tl.load(
            x_ptrs + (h.to(tl.int64) * x_stride_h + w.to(tl.int64) * x_stride_w)[:, None], mask=mask_x, other=0.0
        )
        weight = tl.load(weight_ptr + k.to(tl.int64) * (R * S) + tap, mask=mask_k, other=0.0)
        acc += x.to(ACC) * weight.to(ACC)[None, :]

    if HAS_BIAS:
        acc += tl.load(bias_ptr + k, mask=mask_k, other=0.0).to(ACC)[None, :]
    y_ptrs = (
        y_ptr + (n * y_stride_n + pixel.to(tl.int64) * y_stride_pixel)[:, None] + (k.to(tl.int64) * y_stride_k)[None, :]
    )
    tl.store(y_ptrs, round_to(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


def _is_channels_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's output is channels_last: where one of the two is, but for float64 on a GPU."""
    if x.dtype == torch.float64 and x.device.type == "cuda":
        return False
    return is_channels_last(x) or is_channels_last(weight)


def _output(x, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
    N, _, H, W = x.shape
    K, _, R, S = weight.shape
    P = output_size(H, R, stride[0], padding[0], dilation[0])
    Q = output_size(W, S, stride[1], padding[1], dilation[1])
    return empty_image((N, K, P, Q), x, _is_channels_last(x, weight))


def _launch(x, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
    y = _output(x, weight, bias, stride, padding, dilation, groups)
    if y.numel() == 0:
        return y
    y_strides = pixel_strides(y, _is_channels_last(x, weight))
    bias = None if bias is None else bias.contiguous()
    if weight.shape[1] == 1 and groups > 1:
        _launch_depthwise(x, weight, bias, y, y_strides, stride, padding, dilation)
        return y
    C, R, S = weight.shape[1:]
    input_precision = convolution_input_precision(x, R * S * C)
    tf32 = input_precision == "tf32"
    round_x = tf32
    if x.stride(1) != 1 and R * S > 1 and not spans_taps(C, R * S) and not triton.knobs.runtime.interpret:
        # Read once a filter tap: worth a copy with contiguous channels (H200, bf16, 512 channels: 155 us for 449).
        x, round_x = channels_last(x, tf32).permute(0, 3, 1, 2), False
    packed = channels_last(weight, tf32)
    implicit_gemm(x, packed, bias, y, y_strides, stride, padding, dilation, groups, input_precision, round_x)
    return y


def _launch_depthwise(x, weight, bias, y, y_strides, stride, padding, dilation) -> None:
    N, C, H, W = x.shape
    K, P, Q = y.shape[1:]
    M = N * P * Q
    blocks = pixel_blocks(M, P * Q, K, y_strides[1] == 1)
    grid = (triton.cdiv(M, blocks.BLOCK_M) * triton.cdiv(K, blocks.BLOCK_C),)
    conv2d_depthwise_forward_kernel[grid](
        x,
        weight.contiguous(),
        bias,
        y,
        M,
        H,
        W,
        P * Q,
        Q,
        *x.stride(),
        *y_strides,
        K,
        K // C,
        *weight.shape[2:],
        *stride,
        *padding,
        *dilation,
        HAS_BIAS=bias is not None,
        ACC=accumulator(x.dtype),
        INDEX=index_type(M + blocks.BLOCK_M),
        **blocks._asdict(),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.bias_size = None if bias is None else bias.shape
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad_y):
    x, weight = ctx.saved_tensors
    grads = torch.ops.aten.convolution_backward(
        grad_y,
        x,
        weight,
        ctx.bias_size,
        ctx.stride,
        ctx.padding,
        ctx.dilation,
        False,
        [0, 0],
        ctx.groups,
        ctx.needs_input_grad[:3],
    )
    return *grads, None, None, None, None


conv2d = register(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups) "
    "-> Tensor",
    _launch,
    _output,
    _setup_context,
    _backward,
)


def pack_weight(weight: torch.Tensor, input_precision: str) -> torch.Tensor:
    return weight.clone()


def conv2d_fused(
    x, packed_weight, bias, residual, relu, kernel_size, stride, padding, dilation, groups, input_precision
) -> torch.Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.nn.functional.conv2d(
        x.to(wide), packed_weight.to(wide), bias, list(stride), list(padding), list(dilation), groups
    )
    y = y if residual is None else y + residual
    y = y.relu() if relu else y
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)
