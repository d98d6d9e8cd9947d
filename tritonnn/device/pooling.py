"""The windows of average pooling."""

import triton
import triton.language as tl


@triton.jit
def window_of(
    p,
    q,
    H,
    W,
    P,
    Q,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr,
    DIVISOR_OVERRIDE: tl.constexpr,
    ACC: tl.constexpr,
):
    """(h_first, w_first, h_end, w_end, divisor) of output pixel (p, q); the first ones may lie in the padding."""
    if ADAPTIVE:
        h_first = p * H // P
        w_first = q * W // Q
        h_end = ((p + 1) * H + P - 1) // P
        w_end = ((q + 1) * W + Q - 1) // Q
        divisor = (h_end - h_first).to(ACC) * (w_end - w_first).to(ACC)
    else:
        h_first = p * STRIDE_H - PADDING_H
        w_first = q * STRIDE_W - PADDING_W
        h_end = tl.minimum(h_first + R, H + PADDING_H)  # a ceil_mode window ends with the padding
        w_end = tl.minimum(w_first + S, W + PADDING_W)
        if DIVISOR_OVERRIDE != 0:
            divisor = tl.full(h_first.shape, DIVISOR_OVERRIDE, ACC)
        elif COUNT_INCLUDE_PAD:
            divisor = (h_end - h_first).to(ACC) * (w_end - w_first).to(ACC)
        else:
            rows = tl.minimum(h_end, H) - tl.maximum(h_first, 0)
            columns = tl.minimum(w_end, W) - tl.maximum(w_first, 0)
            divisor = rows.to(ACC) * columns.to(ACC)
        h_end = tl.minimum(h_end, H)
        w_end = tl.minimum(w_end, W)
    return h_first, w_first, h_end, w_end, divisor
