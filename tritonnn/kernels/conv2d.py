"""2-D convolution (cross-correlation) forward.

    y[n, k, p, q] = bias[k] + sum over c, r, s of weight[k, c, r, s]
                    * x[n, group(k) + c, p*stride_h + r*dilation_h - padding_h, q*stride_w + s*dilation_w - padding_w]

x: [N, C, H, W], any strides; weight: [K, C / groups, R, S]; y: [N, K, P, Q], channels_last where x or weight is. It is
a matrix product in one of six forms. For few pixels its sums are split among warps, which hold all that they need in
registers (held_gemm.py) or else fetch it ahead (split_gemm.py). On Hopper GPUs the copy engine brings the tiles, under
a 3x3 filter with a halo (halo_gemm.py) or else for one tap after the other (descriptor_gemm.py). A large filter of few
channels is applied by its rows (row_gemm.py). What is left goes by pointers (implicit_gemm.py). Where each channel has
a filter of its own it is no product of matrices (depthwise.py).
"""

import torch
import triton

from ..precision import convolution_input_precision, convolutions_in_tf32
from .block_sizes import (
    DescriptorBlocks,
    GemmBlocks,
    HaloBlocks,
    HeldBlocks,
    RowBlocks,
    SplitBlocks,
    descriptor_blocks,
    halo_blocks,
    held_blocks,
    row_blocks,
    split_blocks,
)
from .channels_last import channels_last, pack_weight
from .depthwise import depthwise_conv2d
from .descriptor_gemm import descriptor_gemm, fits_descriptors
from .epilogue import Epilogue
from .halo_gemm import are_halo_blocks, fits_halo, halo_gemm
from .held_gemm import are_held_blocks, fits_held, held_gemm
from .implicit_gemm import implicit_gemm, pointer_blocks, spans_taps
from .memory_format import empty_image, is_aligned, is_channels_last
from .operator import register
from .product import Choice, Product, Shortcut, on_tensor_cores
from .row_gemm import fits_rows, row_gemm
from .split_gemm import MOST_PIXELS, split_gemm
from .tuned_blocks import tuned_choice
from .window import output_size


def _is_channels_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's output is channels_last: where one of the two is, but for float64 on a GPU."""
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
    if y.numel() == 0:
        return y
    epilogue = Epilogue(bias=None if bias is None else bias.contiguous())
    if weight.shape[1] == 1 and groups > 1:
        depthwise_conv2d(x, weight.contiguous(), y, channels_last_y, *window, epilogue)
        return y
    input_precision = convolution_input_precision(x, weight, y.numel() // y.shape[1])
    launch_unpacked(x, weight, y, channels_last_y, window, groups, input_precision, epilogue)
    return y


def launch_unpacked(x, weight, y, channels_last_y, window, groups, input_precision, epilogue) -> None:
    """Runs the product of x and a weight [K, C / groups, R, S], which is packed first where its form needs that."""
    packed = weight.permute(0, 2, 3, 1)
    round_x = input_precision == "tf32"
    product = Product(x, packed, y, channels_last_y, *window, groups, input_precision, round_x, epilogue)
    choice = choose(product)
    few = isinstance(choice.blocks, HeldBlocks | SplitBlocks)
    packed = channels_last(weight) if few else pack_weight(weight, input_precision)
    run_gemm(product._replace(packed=packed), choice)


def launch_gemm(*operands) -> None:
    """Runs a product (`Product`)."""
    product = Product(*operands)
    run_gemm(product, choose(product))


def choose(product: Product) -> Choice:
    """The form and blocks that were tuned for a product, or else the default ones; its weight need not be packed."""
    choice = tuned_choice(product)
    return choice if choice is not None and can_run(product, choice) else default_choice(product)


def default_choice(product: Product) -> Choice:
    """Picks the form of the product: held or split for few pixels, by rows, halo, descriptors or pointers."""
    x, packed, y, _, stride, _, dilation, groups, input_precision, round_x, *_ = product
    N, C, _, _ = x.shape
    K, P, Q = y.shape[1:]
    R, S = packed.shape[1:3]
    blocks = few_pixels_blocks(product) if groups == 1 else None
    if blocks is not None:
        return Choice(blocks, copies_x=False)
    if fits_rows(C, dilation, groups, x.dtype):
        blocks = row_blocks(N * P * Q, K, R * S * C, x.element_size(), input_precision)
        if blocks is not None:
            return Choice(blocks, copies_x=False)
    aligned = is_aligned(x)
    halo = halo_blocks(N, P, Q, C, K, stride[0], x.element_size(), round_x and aligned)
    if halo is not None and not fetches_with_halo(product):
        halo = None
    descriptors = fetches_by_descriptors(product) and (x.stride(1) == 1 or R * S > 1)
    gathers = R * S > 1 and not spans_taps(C // groups, R * S) and not triton.knobs.runtime.interpret
    # With NCHW each filter tap would read pixels apart: worth a copy (H200, bf16, 512 channels: 155 us for 449). Where
    # an element of x takes part in many products, rounding it first is worth one too (128 channels: 295 us for 324).
    many = K * R * S >= 1152 * stride[0] * stride[1]
    rounds = descriptors and round_x and many and not (halo is not None and aligned)
    copies_x = gathers and (x.stride(1) != 1 or rounds)
    if halo is not None and (copies_x or aligned):
        blocks = halo
    elif descriptors and (copies_x or aligned):
        swapped = input_precision != "tf32x3" and (copies_x or not round_x)
        blocks = descriptor_blocks(N, P, Q, K, R * S * C, x.element_size(), swapped)
    else:
        blocks = pointer_blocks(N * P * Q, K // groups, C // groups, R * S, x.element_size(), input_precision)
    return Choice(blocks, copies_x)


def few_pixels_blocks(product: Product) -> HeldBlocks | SplitBlocks | None:
    """None where there are too many pixels for both forms."""
    x, (N, K, P, Q), (R, S) = product.x, product.y.shape, product.packed.shape[1:3]
    sizes = N * P * Q, K, x.shape[1], R * S, x.element_size()
    blocks = held_blocks(*sizes)
    held = blocks is not None and fits_held(product) and are_held_blocks(blocks, product)
    return blocks if held else split_blocks(*sizes)


def fetches_by_descriptors(product: Product) -> bool:
    """Whether a product is one of the tensor cores' whose x, once it is channels_last, descriptors can fetch."""
    x = product.x
    fits = on_tensor_cores(x, product.input_precision)
    fits = fits and fits_descriptors(x, product.y.shape[1], product.stride, product.groups)
    return fits and _has_aligned_residual(product)


def fetches_with_halo(product: Product) -> bool:
    """Whether a product is one of the tensor cores', of a 3x3 filter, that makes a channels_last y from boxes of x."""
    x, packed, y, channels_last_y, *window = product[:8]  # to groups
    fits = x.element_size() == 2 or product.input_precision == "tf32"
    fits = fits and channels_last_y and fits_halo(x, y.shape[1], packed.shape[1:3], *window)
    return fits and _has_aligned_residual(product)


def _has_aligned_residual(product: Product) -> bool:
    residual = product.epilogue.residual
    return residual is None or residual.data_ptr() % 16 == 0


def can_run(product: Product, choice: Choice) -> bool:
    """Whether the form of a choice can take the product."""
    x, blocks = product.x, choice.blocks
    C = x.shape[1]
    if isinstance(blocks, SplitBlocks):
        few = product.y.numel() // product.y.shape[1] < MOST_PIXELS
        return few and product.groups == 1 and x.element_size() <= 4 and C % blocks.BLOCK_K == 0
    if isinstance(blocks, HeldBlocks):
        return fits_held(product) and are_held_blocks(blocks, product)
    if isinstance(blocks, RowBlocks):
        return fits_rows(C, product.dilation, product.groups, x.dtype)
    if isinstance(blocks, HaloBlocks):
        sizes = product.y.shape, C, product.stride[0], x.element_size()
        fits = fetches_with_halo(product) and are_halo_blocks(blocks, *sizes)
        return fits and (choice.copies_x or is_aligned(x))
    if isinstance(blocks, DescriptorBlocks):
        forms = {"tf32x3": [False], "tf32": [False, True]}.get(product.input_precision, [True])
        fits = fetches_by_descriptors(product) and blocks.SWAPPED in forms and C % blocks.BLOCK_K == 0
        return fits and (choice.copies_x or is_aligned(x))
    return True


RUN = {
    HeldBlocks: held_gemm,
    SplitBlocks: split_gemm,
    HaloBlocks: halo_gemm,
    DescriptorBlocks: descriptor_gemm,
    RowBlocks: row_gemm,
    GemmBlocks: implicit_gemm,
}


def run_gemm(product: Product, choice: Choice) -> None:
    """Fills y."""
    if choice.copies_x:
        x = channels_last(product.x, product.round_x).permute(0, 3, 1, 2)
        product = product._replace(x=x, round_x=False)
    RUN[type(choice.blocks)](product, choice.blocks)


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
    convolutions_in_tf32,
)


def _fused_output(x, packed, scale, bias, residual, relu, kernel_size, *window_and_precision) -> torch.Tensor:
    *window, _, input_precision, _, _ = window_and_precision
    K = packed.shape[0] // (3 if input_precision == "tf32x3" else 1)
    return _empty(x, K, kernel_size, *window, channels_last=True)


def _launch_fused(x, packed, scale, bias, residual, relu, kernel_size, *window_and_precision) -> torch.Tensor:
    y = _fused_output(x, packed, scale, bias, residual, relu, kernel_size, *window_and_precision)
    if y.numel() == 0:
        return y
    *window, groups, input_precision, rounded_x, round_y = window_and_precision
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    epilogue = Epilogue(scale, bias, residual, relu, round_y)
    if packed.shape[3] == 1 and groups > 1:
        weight = packed[-y.shape[1] :].view(y.shape[1], 1, *kernel_size)
        depthwise_conv2d(x, weight, y, True, *window, epilogue)
        return y
    round_x = input_precision == "tf32" and not rounded_x
    launch_gemm(x, packed, y, True, *window, groups, input_precision, round_x, epilogue)
    return y


conv2d_fused = register(
    "conv2d_fused(Tensor x, Tensor packed_weight, Tensor? scale, Tensor? bias, Tensor? residual, bool relu, "
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, str input_precision, "
    "bool rounded_x, bool round_y) -> Tensor",
    _launch_fused,
    _fused_output,
)
"""relu(scale * conv2d(x, weight) + bias + residual), channels_last, for inference.

`packed_weight` is `pack_weight(weight, input_precision)`; scale and bias [K] are float32 (float64 for float64); the
residual has the shape and type of y. `rounded_x`: x has been rounded to TF32; `round_y`: y is to be.
"""


def takes_shortcut(
    x: torch.Tensor, K: int, kernel_size: tuple[int, int], P: int, Q: int, shortcut_channels: int
) -> bool:
    """Whether `conv2d_with_shortcut` has a kernel: for few pixels, of which it makes [N, K, P, Q]."""
    N, C = x.shape[:2]
    blocks = split_blocks(N * P * Q, K, C, kernel_size[0] * kernel_size[1], x.element_size())
    return blocks is not None and shortcut_channels % blocks.BLOCK_K == 0


def _output_with_shortcut(x, packed, *arguments) -> torch.Tensor:
    kernel_size, stride, padding, dilation, _, input_precision = arguments[7:13]
    K = packed.shape[0] // (3 if input_precision == "tf32x3" else 1)
    return _empty(x, K, kernel_size, stride, padding, dilation, channels_last=True)


def _launch_with_shortcut(x, packed, *arguments) -> torch.Tensor:
    scale, bias, shortcut, shortcut_packed, shortcut_scale, shortcut_bias, relu, kernel_size = arguments[:8]
    *window, shortcut_stride, precision, rounded, shortcut_precision, shortcut_rounded, round_y = arguments[8:]
    y = _output_with_shortcut(x, packed, *arguments)
    K = y.shape[1]
    second = Shortcut(
        shortcut,
        shortcut_packed[-K:],
        shortcut_scale,
        shortcut_bias,
        shortcut_stride,
        shortcut_precision,
        shortcut_precision == "tf32" and not shortcut_rounded,
    )
    round_x = precision == "tf32" and not rounded
    epilogue = Epilogue(scale, bias, None, relu, round_y)
    product = Product(x, packed, y, True, *window, 1, precision, round_x, epilogue, second)
    run_gemm(product, Choice(few_pixels_blocks(product), copies_x=False))
    return y


conv2d_with_shortcut = register(
    "conv2d_with_shortcut(Tensor x, Tensor packed_weight, Tensor? scale, Tensor? bias, Tensor shortcut, "
    "Tensor packed_shortcut_weight, Tensor? shortcut_scale, Tensor? shortcut_bias, bool relu, int[2] kernel_size, "
    "int[2] stride, int[2] padding, int[2] dilation, int[2] shortcut_stride, str input_precision, bool rounded_x, "
    "str shortcut_precision, bool rounded_shortcut, bool round_y) -> Tensor",
    _launch_with_shortcut,
    _output_with_shortcut,
)
"""conv2d_fused of x plus that of `shortcut`, with filters of one tap and no padding, where `takes_shortcut`."""
