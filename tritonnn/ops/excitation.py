"""The two small products of squeeze-and-excitation, for the mean of each channel of few images, in inference.

    h[n, s] = inner(bias1[s] + sum over c of weight1[s, c] * x[n, c])
    y[n, k] = outer(bias2[k] + sum over s of weight2[k, s] * h[n, s])

x: [N, C, 1, 1], weight1: [S, C], weight2: [K, S], of one type, contiguous; biases [S] and [K] or none; y: [N, K, 1, 1].
Sums in float32 (float64 for float64); h is rounded to the type of x, as if it had been stored.
"""

import torch
import triton
import triton.language as tl

from ..device.activation import activate
from ..device.arithmetic import accumulator, round_to
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..runtime.blocks import ceil_div
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.operator import register

MOST_WEIGHTS = 65536
"""Weights of each product, at most. Every program reads all of the first one's: with more, two kernels are faster."""
MOST_INNER, MOST_IMAGES = 128, 128
TILE = 8192
"""Elements of a weight that a program has in registers, 32 for each of 256 threads."""


@triton.jit
def excitation_forward_kernel(
    x_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    y_ptr,
    C,
    S,
    K,
    HAS_BIAS1: tl.constexpr,
    HAS_BIAS2: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    SLOPE1: tl.constexpr,
    SLOPE2: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_K outputs of an image; it computes all of h, BLOCK_C channels of x at a time."""
    blocks_k = (K + BLOCK_K - 1) // BLOCK_K
    n = (tl.program_id(0) // blocks_k).to(tl.int64)
    k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    s = tl.arange(0, BLOCK_S)
    wait_for_predecessor(DEPENDENT)
    products = tl.full((BLOCK_S, BLOCK_C), 0, ACC)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (s < S)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + n * C + c, mask=c < C, other=0.0).to(ACC)
        products += tl.load(weight1_ptr + s[:, None] * C + c[None, :], mask=mask, other=0.0).to(ACC) * x[None, :]
    h = tl.sum(products, 1)
    if HAS_BIAS1:
        h += tl.load(bias1_ptr + s, mask=s < S, other=0.0).to(ACC)
    h = round_to(activate(h, INNER, SLOPE1), y_ptr.dtype.element_ty).to(ACC)
    start_successor(DEPENDENT)
    mask = (k < K)[:, None] & (s < S)[None, :]
    weight2 = tl.load(weight2_ptr + k[:, None] * S + s[None, :], mask=mask, other=0.0).to(ACC)
    y = tl.sum(weight2 * h[None, :], 1)
    if HAS_BIAS2:
        y += tl.load(bias2_ptr + k, mask=k < K, other=0.0).to(ACC)
    y = activate(y, OUTER, SLOPE2)
    tl.store(y_ptr + n * K + k, round_to(y, y_ptr.dtype.element_ty), mask=k < K)


def takes(images: int, channels: int, inner: int, outputs: int) -> bool:
    """Whether one kernel is known to be faster than two for these sizes."""
    few = 0 < images <= MOST_IMAGES and inner <= MOST_INNER
    return few and inner * max(channels, outputs) <= MOST_WEIGHTS


def _output(x, weight1, bias1, weight2, bias2, *activations) -> torch.Tensor:
    shape = x.shape[0], weight2.shape[0], 1, 1
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _launch(x, weight1, bias1, weight2, bias2, inner, slope1, outer, slope2) -> torch.Tensor:
    y = _output(x, weight1, bias1, weight2, bias2)
    (S, C), K = weight1.shape, weight2.shape[0]
    block_s = triton.next_power_of_2(S)
    block_k = min(TILE // block_s, triton.next_power_of_2(K), 256)
    launch(
        excitation_forward_kernel,
        (x.shape[0] * ceil_div(K, block_k),),
        x,
        weight1,
        bias1,
        weight2,
        bias2,
        y,
        C,
        S,
        K,
        HAS_BIAS1=bias1 is not None,
        HAS_BIAS2=bias2 is not None,
        INNER=inner,
        OUTER=outer,
        SLOPE1=slope1,
        SLOPE2=slope2,
        **dependent_launch(x),
        ACC=accumulator(x.dtype),
        BLOCK_S=block_s,
        BLOCK_C=min(TILE // block_s, triton.next_power_of_2(C)),
        BLOCK_K=block_k,
        num_warps=8,
    )
    return y


excitation = register(
    "excitation(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str inner, float slope1, "
    "str outer, float slope2) -> Tensor",
    _launch,
    _output,
)
