"""Which kernel computes the gradient of a convolution's weight."""

import torch
import triton

from ....runtime import hardware
from ..pack import channels_last
from . import weight, weight_halo, weight_tma


def run_weight(
    g: torch.Tensor, x: torch.Tensor, grad_weight: torch.Tensor, window: tuple, groups: int, input_precision: str
) -> None:
    """Fills grad_weight [K, C / groups, R, S]; g [N, K, P, Q] and x [N, C, H, W] have any strides."""
    if not triton.knobs.runtime.interpret:  # blocks of channels are loaded for one pixel after the other
        g, x = (t if t.stride(1) == 1 or t.shape[1] < 16 else channels_last(t).permute(0, 3, 1, 2) for t in (g, x))
    C, filter_size, gpu = x.shape[1], tuple(grad_weight.shape[2:]), hardware.gpu(x.device)
    stride = window[0][0]
    arguments = g, x, filter_size, window, groups
    by_taps = weight_tma.fits(*arguments)
    whole = by_taps and weight_tma.is_whole(g.shape, C, filter_size, gpu.multiprocessors)
    if weight_halo.fits(*arguments) and not whole and (stride == 1 or not by_taps):
        config = weight_halo.default_config(g.shape, stride, gpu.shared_memory)
        weight_halo.run(g, x, grad_weight, window, config)
    elif by_taps:
        config = weight_tma.default_config(g.shape[1], C, filter_size)
        weight_tma.run(g, x, grad_weight, window, config)
    else:
        weight.run(g, x, grad_weight, window, groups, input_precision)
