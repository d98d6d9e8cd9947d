"""Convolution as a matrix product over tensor descriptors, for channels_last images on Hopper GPUs and later.

    y[n, p, q, k] = relu(bias[k] + residual[n, p, q, k] + scale[k]
                         * sum over r, s, c of x[n, p*stride + r*dilation - padding, q*..., c] * weight[k, r, s, c])

A program owns a box of TILE_N images x TILE_P rows x TILE_Q columns of the output. For each filter tap and block of
channels the copy engine brings the box of x that lies under it; what lies outside the image it fills with zeros, so
padding takes neither masks nor addresses. For stride 2, x [N, H, W, C] is seen as [N, H/2, 2, W/2, 2*C], where a tap
picks the parity.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .arithmetic import add_rounded_dot, add_split_dot, round_to, round_to_tf32
from .block_sizes import FLUSH_STEPS, DescriptorBlocks, ceil_div
from .dependent_launch import dependent_launch, start_successor, wait_for_predecessor
from .launch_plan import launch
from .product import Product


@triton.jit
def load_box(x_desc, n, p, q, r, s, c, C: tl.constexpr, STRIDE: tl.constexpr):
    """The box of x for the output that starts at (n, p, q), shifted by r rows and s columns of the padded image."""
    if STRIDE == 1:
        x = x_desc.load([n, p + r, q + s, c])
    else:
        x = x_desc.load([n, p + (r >> 1), r & 1, q + (s >> 1), (s & 1) * C + c])
    return x


@triton.jit
def descriptor_gemm_forward_kernel(
    x_desc,
    weight_desc,
    scale_ptr,
    bias_ptr,
    residual_desc,
    y_desc,
    N,
    P,
    Q,
    tiles_p,
    tiles_q,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    ROUND_Y: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROUND_X: tl.constexpr,
    SWAPPED: tl.constexpr,
    FLUSH: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns TILE_N x TILE_P x TILE_Q = BLOCK_M output pixels x BLOCK_N output channels.

    SWAPPED: acc [channels, pixels] = weight @ x.T, both in shared memory; to ROUND_X, x goes through registers and
    back. Natural form: acc [pixels, channels] = x @ weight.T, with x in registers, where it is rounded to TF32 or,
    "tf32x3", split; then weight_desc holds the weights rounded to TF32 and, K rows below, what that left of them, and
    the sums of FLUSH steps are added up apart, so that few float32 additions follow each other. y_desc is a pointer
    unless y is CHANNELS_LAST.
    """
    BLOCK_M: tl.constexpr = TILE_N * TILE_P * TILE_Q
    BLOCKS_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    BLOCKS_C: tl.constexpr = C // BLOCK_K
    STEPS: tl.constexpr = R * S * BLOCKS_C

    tile = tl.program_id(0)
    k = tile % BLOCKS_N * BLOCK_N
    box = tile // BLOCKS_N
    q = box % tiles_q * TILE_Q
    p = box // tiles_q % tiles_p * TILE_P
    n = box // tiles_q // tiles_p * TILE_N

    wait_for_predecessor(DEPENDENT)
    if SWAPPED:
        acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    else:
        acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    part = acc
    for step in range(STEPS):
        tap = step // BLOCKS_C
        c = step % BLOCKS_C * BLOCK_K
        r = tap // S * DILATION_H - PADDING_H
        s = tap % S * DILATION_W - PADDING_W
        x = tl.reshape(load_box(x_desc, n, p, q, r, s, c, C, STRIDE), (BLOCK_M, BLOCK_K))
        weight = weight_desc.load([k, tap * C + c])  # [BLOCK_N, BLOCK_K]
        if SWAPPED:
            if ROUND_X:
                x = round_to_tf32(x)
            acc = tl.dot(weight, x.T, acc, input_precision=INPUT_PRECISION)
        elif INPUT_PRECISION == "tf32x3":
            rest = weight_desc.load([K + k, tap * C + c])
            part = add_split_dot(x, weight.T, rest.T, part)
            if (step + 1) % FLUSH == 0:
                acc += part
                part = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
        else:
            acc = add_rounded_dot(x, weight.T, acc)
    start_successor(DEPENDENT)
    if INPUT_PRECISION == "tf32x3":
        acc += part

    if SWAPPED:
        acc = acc.T
    offs_n = k + tl.arange(0, BLOCK_N)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + offs_n, mask=offs_n < K, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < K, other=0.0)[None, :]
    if HAS_RESIDUAL:
        acc += tl.reshape(residual_desc.load([n, p, q, k]), (BLOCK_M, BLOCK_N)).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0, propagate_nan=tl.PropagateNan.ALL)
    if ROUND_Y:
        acc = round_to_tf32(acc)
    if CHANNELS_LAST:
        y = round_to(acc, y_desc.dtype)
        y_desc.store([n, p, q, k], tl.reshape(y, (TILE_N, TILE_P, TILE_Q, BLOCK_N)))
    else:
        y = round_to(acc, y_desc.dtype.element_ty)
        offs_m = tl.arange(0, BLOCK_M)
        n += offs_m // (TILE_P * TILE_Q)
        p += offs_m // TILE_Q % TILE_P
        q += offs_m % TILE_Q
        mask = ((n < N) & (p < P) & (q < Q))[:, None] & (offs_n < K)[None, :]
        offs_pixel = n.to(tl.int64) * K * P * Q + p * Q + q
        tl.store(y_desc + offs_pixel[:, None] + (offs_n.to(tl.int64) * P * Q)[None, :], y, mask=mask)


def fits_descriptors(x: torch.Tensor, out_channels: int, stride: tuple[int, int], groups: int) -> bool:
    """Whether the copy engine can fetch x [N, C, H, W], once it is channels_last, and this kernel was verified there.

    A pixel's channels are a multiple of 128 bytes; for stride 2 the image has even sides.
    """
    if triton.knobs.runtime.interpret or x.dtype == torch.float64 or groups > 1:
        return False
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return False
    _, C, H, W = x.shape
    size = x.element_size()
    even = H % 2 == 0 and W % 2 == 0
    strided = stride[0] == stride[1] and (stride[0] == 1 or (stride[0] == 2 and even))
    return strided and C * size % 128 == 0 and out_channels * size % 16 == 0


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W], channels_last, as [N, H, W, C] with the strides of these sizes, even where one is 1."""
    N, C, H, W = x.shape
    return x.as_strided((N, H, W, C), (H * W * C, W * C, C, 1))


def descriptor_gemm(product: Product, blocks: DescriptorBlocks) -> None:
    """x in channels_last (`fits_descriptors`). A residual is in channels_last, and then so is y."""
    x, weight, y, epilogue = product.x, product.packed, product.y, product.epilogue
    N, C, H, W = x.shape
    K, P, Q = y.shape[1:]
    R, S = weight.shape[1:3]
    tile_n, tile_p, tile_q, block_n, block_k = blocks[:5]
    if product.stride[0] == 1:
        x_desc = TensorDescriptor.from_tensor(_pixels(x), [tile_n, tile_p, tile_q, block_k])
    else:
        x = _pixels(x).view(N, H // 2, 2, W // 2, 2 * C)
        x_desc = TensorDescriptor.from_tensor(x, [tile_n, tile_p, 1, tile_q, block_k])
    weight_desc = TensorDescriptor.from_tensor(weight.view(-1, R * S * C), [block_n, block_k])
    y_box = [tile_n, tile_p, tile_q, block_n]
    y_desc = TensorDescriptor.from_tensor(_pixels(y), y_box) if product.channels_last_y else y
    residual_desc = y_desc
    if epilogue.residual is not None:
        residual_desc = TensorDescriptor.from_tensor(_pixels(epilogue.residual), y_box)
    tiles_p, tiles_q = ceil_div(P, tile_p), ceil_div(Q, tile_q)
    tiles = ceil_div(N, tile_n) * tiles_p * tiles_q * ceil_div(K, block_n)
    launch(
        descriptor_gemm_forward_kernel,
        (tiles,),
        x_desc,
        weight_desc,
        epilogue.scale,
        epilogue.bias,
        residual_desc,
        y_desc,
        N,
        P,
        Q,
        tiles_p,
        tiles_q,
        C,
        K,
        R,
        S,
        product.stride[0],
        *product.padding,
        *product.dilation,
        **epilogue.flags,
        **dependent_launch(x),
        INPUT_PRECISION=product.input_precision,
        CHANNELS_LAST=product.channels_last_y,
        ROUND_X=product.round_x,
        FLUSH=FLUSH_STEPS,
        **blocks._asdict(),
    )
