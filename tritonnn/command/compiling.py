"""The kernels of a swapped and of a fused network, compiled before anything is shown of them."""

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..compile_swapped import compile_swapped
from ..runtime.dependent_launch import launches_as_in_graphs


def compile_networks(
    networks: Mapping[str, nn.Module], images: Tensor, layers: Sequence[str], cuda_graph: bool
) -> None:
    """Compiles beside each other what calls of "swapped" and of "fused", if it is there, need alone and in CUDA graphs.

    `layers` are the kinds that were swapped; `cuda_graph`: whether the fused network runs in graphs of its own, for
    which it compiles by itself.
    """
    compile_swapped(networks["swapped"], images, layers=layers, in_graphs=True)
    if fused := networks.get("fused"):
        fused(images)
        if not cuda_graph:
            with launches_as_in_graphs():
                copy.deepcopy(fused)(images)
