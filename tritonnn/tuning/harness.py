"""A convolution on random operands, to check and to time choices of its form and blocks."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clocks import captured, event_clock
from ..device.activation import ACTIVATIONS
from ..layers.fused.activation import activate
from ..ops.conv2d.dispatch import can_run, run
from ..ops.conv2d.epilogue import Epilogue
from ..ops.conv2d.pack import pack_weight
from ..ops.conv2d.problem import Choice, Problem, Product
from ..runtime.memory_format import empty_image

CHECKED_IMAGES, RUNS = 8, 3
LIMITS = {"tf32": 2**-11, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-21}
"""The largest error of a right result, in the 2-norm relative to an image: one rounding, for float32 eight."""
WORSE_THAN_DEFAULT = 1.05
SAMPLE_MS = 1.0
FEWEST_CALLS, MOST_CALLS = 4, 256


class Wrong(Exception):
    """A choice gave a wrong result."""


def operands(problem: Problem, device: torch.device) -> tuple[Product, Tensor]:
    """Random operands, the same every time, and the weight [K, C / groups, R, S] before it was packed."""
    p, epilogue = problem, problem.epilogue
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    x = normal(p.n, p.h, p.w, p.c).permute(0, 3, 1, 2) if p.channels_last_x else normal(p.n, p.c, p.h, p.w)
    if p.input_precision == "tf32" and not p.round_x:
        x = rounded_to_tf32(x)
    weight = normal(p.k, p.c // p.groups, p.r, p.s) / math.sqrt(p.reduction)
    y = empty_image((p.n, p.k, *p.output), x, p.channels_last_y)
    added = {name: normal(p.k, dtype=torch.float32) for name in ("scale", "bias") if name in epilogue}
    if "residual" in epilogue:
        added["residual"] = torch.empty_like(y).copy_(normal(*y.shape))
    activation = next((step for step in epilogue if step in ACTIVATIONS), "none")
    steps = {"activation": activation, "round_y": "round_y" in epilogue}
    packed = pack_weight(weight, p.input_precision)
    window = p.stride, p.padding, p.dilation
    product = Product(
        x, packed, y, p.channels_last_y, *window, p.groups, p.input_precision, p.round_x, Epilogue(**added, **steps)
    )
    return product, weight


class Harness:
    """A problem's operands on a device and its exact result, in float64, for the first and the last images."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self.product, weight = operands(problem, device)
        n, half = problem.n, CHECKED_IMAGES // 2
        self._images = sorted({*range(min(n, half)), *range(max(n - half, 0), n)})
        scale, bias, residual, activation, round_y, slope = self.product.epilogue
        x, window = self.product.x[self._images].double(), (problem.stride, problem.padding, problem.dilation)
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # it tries slow ones too
        exact = F.conv2d(x, weight.double(), None, *window, problem.groups)  # [images, K, P, Q]
        torch.backends.cudnn.benchmark = benchmark
        if scale is not None:
            exact *= scale.double()[:, None, None]
        if bias is not None:
            exact += bias.double()[:, None, None]
        if residual is not None:
            exact += residual[self._images].double()
        self._exact = activate(exact, activation, slope)
        self.limit = LIMITS["tf32" if problem.input_precision == "tf32" or round_y else problem.dtype]
        self._copies: list[Product] = []

    def check(self, choice: Choice, like: Tensor | None = None, limit: float | None = None) -> tuple[Tensor, float]:
        """The whole result and the error of the exactly known images, relative to an image in the 2-norm.

        Args:
            like: a right result, from which this one may differ by rounding only.
            limit: the largest error; None for that of the type.

        Raises:
            Wrong: the choice cannot run, an error is larger, or two runs differ.
        """
        if not can_run(self.product, choice):
            raise Wrong("does not take the operands")
        y = self._run(choice).clone()
        if not y.isfinite().all():
            raise Wrong("not all of y is written, or finite")
        difference = (y[self._images].double() - self._exact).flatten(1).norm(dim=1)
        error = float((difference / self._exact.flatten(1).norm(dim=1)).max())
        if not error <= (limit or self.limit):
            raise Wrong(f"error {error:.1e}")
        if like is not None:
            size = like.float().square().mean().sqrt()
            if not ((y - like).float().abs() <= 8 * self.limit * (like.float().abs() + size)).all():
                raise Wrong("an image differs from the default's")
        if not all(torch.equal(self._run(choice), y) for _ in range(RUNS - 1)):
            raise Wrong("two runs differ")
        return y, error

    def _run(self, choice: Choice) -> Tensor:
        self.product.y.fill_(float("nan"))
        run(self.product, choice)
        return self.product.y

    def clock(self, choice: Choice) -> Callable[[], float]:
        """Reads the microseconds of a call in a CUDA graph: the mean of those on operands in L2, and out of it.

        In a network the images were written just now, while the weights have often left the cache.
        """
        warm = self._clock(choice, [self.product])
        clocks = [warm] if len(self.copies) == 1 else [warm, self._clock(choice, self.copies)]
        return lambda: sum(read() for read in clocks) / len(clocks)

    @property
    def copies(self) -> list[Product]:
        """As many copies of the operands as take 1.5 times the L2 cache, the operands themselves if one is enough."""
        if not self._copies:
            x, packed, y, epilogue = *self.product[:3], self.product.epilogue
            tensors = [t for t in (x, packed, y, epilogue.residual) if t is not None]
            cache = torch.cuda.get_device_properties(x.device).L2_cache_size
            count = min(math.ceil(1.5 * cache / sum(t.nbytes for t in tensors)), MOST_CALLS)
            self._copies = [self.product]
            for _ in range(count - 1):
                residual = None if epilogue.residual is None else epilogue.residual.clone()
                changed = epilogue._replace(residual=residual)
                copied = dict(x=x.clone(), packed=packed.clone(), y=y.clone(), epilogue=changed)
                self._copies.append(self.product._replace(**copied))
        return self._copies

    @staticmethod
    def _clock(choice: Choice, products: list[Product]) -> Callable[[], float]:
        run(products[0], choice)
        operands = itertools.cycle(products)

        def clock(calls: int) -> Callable[[], float]:
            read = event_clock(captured(lambda: run(next(operands), choice), calls), calls)
            read()  # the first replay uploads the graph
            return read

        calls = math.ceil(SAMPLE_MS / clock(FEWEST_CALLS)())
        read = clock(min(max(calls, len(products), FEWEST_CALLS), MOST_CALLS))
        return lambda: 1e3 * read()


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Float32 to the nearest TF32, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
