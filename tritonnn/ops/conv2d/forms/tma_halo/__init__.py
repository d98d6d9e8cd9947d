"""3x3 convolution of stride 1 or 2 of channels_last images from tiles with a halo: TMA and wgmma, for Hopper GPUs.

    y[n, p, q, k] = activation(bias[k] + residual[n, p, q, k] + scale[k]
                               * sum over r, s, c of x[n, p*stride + r - padding, q*stride + s - padding, c]
                               * weight[k, r, s, c])

A tile is TILE_P rows x TILE_Q columns of TILE_N images. For each block of channels TMA loads the rows under it and one
more on either side three times, shifted by a column each time; what lies outside an image it fills with zeros. The
filter's rows are slices of the same box in shared memory, as a row, of all the images, is a multiple of the 1024 bytes
after which the swizzle repeats: a tile reads 3 (TILE_P + 2) rows of x from L2, where nine taps would each read TILE_P.
With stride 2 a box has of every other column the odd rows, which two rows of the filter share, and then the even ones
(without padding the even ones are shared, and come first): 3 (2 TILE_P + 1) rows. Programs are persistent: while a box
is multiplied the next ones arrive, those of the next tile as well.
"""

import dataclasses
import functools
from collections.abc import Iterator

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .....runtime import hardware
from .....runtime.blocks import ceil_div
from .....runtime.capabilities import rounding_on_load, rounds_on_load
from .....runtime.dependent_launch import dependent_launch
from .....runtime.hardware import Gpu
from .....runtime.launch_plan import launch
from .....runtime.memory_format import pixel_stride
from ...pack import block_diagonal
from ...problem import Choice, Problem, Product
from ..form import Form
from ..pointers import one_wave
from .config import CANDIDATES, TmaHaloConfig, default_config, grouped_config
from .geometry import box_rows, edge_rows
from .kernel import conv2d_tma_halo_forward_kernel

OPERANDS = (torch.float32, torch.float16, torch.bfloat16)
LEAST_OF_A_TILE = 0.75
"""The part of the tiles with a halo that is to lie inside the images."""
GROUPED_BLOCK_N = 64
"""Output channels of a block where there are groups: the fewest, as the rest of its square of the weight is zeros."""
BARRIERS = 256
"""Bytes of shared memory, at most."""


class TmaHaloForm(Form):
    """A 3x3 filter of images in channels_last, float32 in TF32."""

    config = TmaHaloConfig
    loads_by_descriptor = True
    kernels = (conv2d_tma_halo_forward_kernel,)

    def fits(self, product: Product) -> bool:
        """A 3x3 filter over every pixel or, in images of even sides, every other; channels are multiples of 16 bytes.

        Any padding; with a stride of 2 at most 1, and channels are multiples of 128 bytes, unless there are groups:
        what lies beyond x's last channel is then the next column's first, and the weight is zero there. Verified on
        Hopper, with some versions of Triton.
        """
        x, K, stride = product.x, product.y.shape[1], tuple(product.stride)
        _, C, H, W = x.shape
        window = *product.packed.shape[1:3], *product.dilation
        if window != (3, 3, 1, 1) or x.dtype not in OPERANDS:
            return False
        if x.dtype == torch.float32 and product.input_precision != "tf32":
            return False
        if stride not in ((1, 1), (2, 2)) or H % stride[0] != 0 or W % stride[0] != 0:
            return False
        if stride == (2, 2) and max(product.padding) > 1:
            return False
        size = x.element_size()
        if not product.has_aligned_y:
            return False
        if C * size % 16 != 0 or K * size % 16 != 0 or product.is_depthwise or H * W * max(C, K) >= 2**31:
            return False
        if stride != (1, 1) and product.groups == 1 and C * size % 128 != 0:
            return False
        return product.epilogue.has_aligned_residual and hardware.gluon_is_verified(x.device)

    def takes(self, product: Product, choice: Choice) -> bool:
        """Whether the kernel can be compiled with a configuration, shared memory and registers permitting."""
        config, stride = choice.config, product.stride[0]
        _, K, P, Q = product.y.shape
        line = 128 // product.x.element_size()
        staging = product.channels_last_y if config.STAGED else product.fills_image and not config.IN_SLOT
        # y's box is then in one of x's
        in_slot = not config.IN_SLOT or config.TILE_P * config.BLOCK_N <= box_rows(config.TILE_P, stride) * line
        slots = min(config.X_SLOTS, config.W_SLOTS) >= 2  # one is read while the next is filled
        divided = config.BLOCK_N % 64 == 0 if product.groups == 1 else config.BLOCK_N == GROUPED_BLOCK_N
        row = config.TILE_N * config.TILE_Q
        tile = row >= 8 and config.TILE_P * row >= 64 and config.num_warps >= 4  # the swizzle repeats after 8 lines
        indexed = config.TILE_N * P * Q * K < 2**31  # within a tile
        runs = config.BLOCK_K == line and staging and in_slot and slots and divided and tile and indexed
        return runs and (choice.copies_x or product.is_aligned)

    def default(self, product: Product) -> Choice | None:
        """On an aligned x, or where a copy of it is worth while."""
        (N, K, P, Q), C, aligned = product.y.shape, product.x.shape[1], product.is_aligned
        stride, size = product.stride[0], product.x.element_size()
        worth_a_copy = product.groups > 1 or product.reads_apart or product.rounds_often
        if not self.fits(product) or not (aligned or worth_a_copy) or product.has_short_taps:
            return None
        if product.groups > 1:
            if one_wave(product):
                return None
            wastes = depth_of_block(C // product.groups, K // product.groups, K, GROUPED_BLOCK_N, 128 // size)
            if wastes > max(GROUPED_BLOCK_N, 2 * C // product.groups):
                return None
            config = grouped_config(P, Q, stride, size)
        elif size == 2 and not product.channels_last_y:  # stores of two pixels' 4 bytes
            config = None
        else:
            rounds = product.round_x and aligned and not rounds_on_load()
            gpu = hardware.gpu(product.x.device)
            config = default_config(N, P, Q, C, K, stride, size, rounds, gpu)
        if config is None:
            return None
        if not product.channels_last_y:
            config = dataclasses.replace(config, STAGED=False, IN_SLOT=False)
        choice = Choice(config, copies_x=not aligned)
        return choice if self.takes(product, choice) else None

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
        """The tiles that waste least first. TF32's x is rounded on load or on the way, unless NCHW is copied."""
        (p, q), size, stride = problem.output, problem.dtype.itemsize, problem.stride[0]

        def covered(config: TmaHaloConfig) -> int:
            return config.tiles(problem.n, p, q) * config.pixels * ceil_div(problem.k, config.BLOCK_N) * config.BLOCK_N

        tiles = CANDIDATES[size, stride]
        if problem.groups > 1:
            tiles = [grouped_config(p, q, stride, size), *(tile for tile in tiles if tile.BLOCK_N == GROUPED_BLOCK_N)]
        for config in sorted(tiles, key=covered):
            whole = config.TILE_N == 1 or (p <= config.TILE_P and q <= config.TILE_Q)  # several images: all of them
            inside = LEAST_OF_A_TILE * config.tiles(problem.n, p, q) * config.pixels <= problem.pixels
            fits = inside and config.BLOCK_N < max(2 * problem.k, 65)
            busy = 2 * config.tiles(problem.n, p, q) * ceil_div(problem.k, config.BLOCK_N) >= gpu.multiprocessors
            if whole and fits and busy and shared_memory(config, size, stride) <= gpu.shared_memory:
                if not problem.channels_last_y:
                    config = dataclasses.replace(config, STAGED=False, IN_SLOT=False)
                yield Choice(config, copies_x=not problem.channels_last_x)

    def run(self, product: Product, config: TmaHaloConfig) -> None:
        x, weight, y, round_x, epilogue = product.x, product.packed, product.y, product.round_x, product.epilogue
        N, C, _, _ = x.shape
        K, P, Q = y.shape[1:]
        tile_n, tile_p, tile_q = config.TILE_N, config.TILE_P, config.TILE_Q
        block_n, block_k = config.BLOCK_N, config.BLOCK_K
        stride = product.stride[0]
        rows = rows_first(x, stride)
        rounding = rounding_on_load(round_x)
        round_x = round_x and not rounding
        y_desc, residual_desc = y, epilogue.residual
        if config.STAGED:
            y_box = [tile_p, tile_n, tile_q, block_n]
            y_desc = box_descriptor(rows_first(y, 1)[:, 0], y_box)
            residual_desc = (
                y_desc if epilogue.residual is None else box_descriptor(rows_first(epilogue.residual, 1)[:, 0], y_box)
            )
        tiles_p, tiles_q, blocks_n = ceil_div(P, tile_p), ceil_div(Q, tile_q), ceil_div(K, block_n)
        group_c, group_k, depth = C // product.groups, K // product.groups, C
        if product.groups > 1:
            depth = depth_of_block(group_c, group_k, K, block_n, block_k)
        expands = product.groups > 1 and depth == block_k and config.W_SLOTS >= 9
        if product.groups > 1 and not expands:
            weight = block_diagonal(weight, group_k, block_n, depth)
        tiles = ceil_div(N, tile_n) * tiles_p * tiles_q * blocks_n
        options = config.constants
        programs = min(tiles, options.pop("PROGRAMS") * hardware.gpu(x.device).multiprocessors)
        programs = max(programs - programs % blocks_n, blocks_n)
        launch(
            conv2d_tma_halo_forward_kernel,
            (programs,),
            box_descriptor(rows, [tile_p, 1, tile_n, tile_q, block_k], **rounding),
            box_descriptor(rows, [edge_rows(stride), 1, tile_n, tile_q, block_k], **rounding),
            weight if expands else box_descriptor(weight.view(K, 9, -1), [block_n, 1, block_k]),
            epilogue.scale,
            epilogue.bias,
            residual_desc,
            y_desc,
            N if tile_n > 1 else None,  # where it counts for nothing, it asks for no compilation of its own
            P,
            Q,
            tiles,
            tiles_p,
            tiles_q,
            C,
            K,
            depth,
            group_c,
            group_k,
            **epilogue.flags,
            **dependent_launch(x),
            ROUND_X=round_x,
            ROUND_AHEAD=round_x and config.rounds_ahead,
            WHOLE=Q == tile_q and (tile_n == 1 or P == tile_p),
            MASKED=N % tile_n != 0 or P % tile_p != 0 or Q % tile_q != 0,
            STRIDE=stride,
            PADDING_H=product.padding[0],
            PADDING_W=product.padding[1],
            CHANNELS_LAST=product.channels_last_y,
            EXPAND=expands,
            **options,
        )


def depth_of_block(group_c: int, group_k: int, k: int, block_n: int, block_k: int) -> int:
    """Channels of x, in whole blocks, that a block of output channels reads: those of all groups that it touches."""
    firsts = range(0, k, block_n)
    groups = max((min(first + block_n, k) - 1) // group_k - first // group_k + 1 for first in firsts)
    return ceil_div(groups * group_c, block_k) * block_k


def shared_memory(config: TmaHaloConfig, element_size: int, stride: int) -> int:
    """Bytes that the programs of a multiprocessor take together."""
    rows = box_rows(config.TILE_P, stride)
    lines = config.X_SLOTS * config.TILE_N * rows * config.TILE_Q + config.W_SLOTS * config.BLOCK_N
    stage = config.pixels * config.BLOCK_N * element_size if config.STAGED and not config.IN_SLOT else 0
    return config.PROGRAMS * (128 * lines + stage + BARRIERS)


def rows_first(x: torch.Tensor, stride: int) -> torch.Tensor:
    """x [N, C, H, W], channels_last, as [H / stride, stride, N, W / stride, stride * C].

    In this order a box in shared memory has together what its images have of a row. With the strides of these sizes,
    even where one is 1.
    """
    (N, C, H, W), step = x.shape, pixel_stride(x) or x.shape[1]
    sizes = H // stride, stride, N, W // stride, stride * C
    return x.as_strided(sizes, (stride * W * step, W * step, H * W * step, stride * step, 1))


@functools.lru_cache
def _layout(bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128, bits, rank)


def box_descriptor(x: torch.Tensor, box: list[int], **rounding: bool) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, box, _layout(8 * x.element_size(), len(box)), **rounding)
