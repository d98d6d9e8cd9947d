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
    if weight_halo.fits(g, x, grad_weight.shape[2:], window, groups):
        config = weight_halo.default_config(g.shape, hardware.gpu(x.device).shared_memory)
        weight_halo.run(g, x, grad_weight, window, config)
    elif weight_tma.fits(g, x, grad_weight.shape[2:], window, groups):
        config = weight_tma.default_config(g.shape[1], x.shape[1], grad_weight.shape[3])
        weight_tma.run(g, x, grad_weight, window, config)
    else:
        weight.run(g, x, grad_weight, window, groups, input_precision)
