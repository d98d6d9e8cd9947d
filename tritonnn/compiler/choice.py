"""Which chains run as one kernel of this package: those that are no slower than what Inductor would run, measured.

Inductor computes a convolution or linear layer by cuDNN or cuBLAS and what follows it in a kernel of its own, unless it
joins that to what comes next. Each chain of a kind is timed alone, once a machine, on random images of its shape.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clocks import Clock, alternate, captured, event_clock, mend_generator, repeats_for
from ..compile_ahead import compile_ahead, progress_after
from ..layers.fused.activation import Activation
from ..ops.conv2d.op import conv2d_fused
from ..runtime.dependent_launch import launches_as_in_graphs
from .chains import STORED_FOR, Chain, base_name, has_neighbouring_channels, hint, value
from .measured import Times, add, measuring_alone, path_of, read
from .weights import Packed

LOG = logging.getLogger(__name__)
GRAPH_MS = 0.2
MOST_CALLS = 20
ROUNDS = 3, 7
BUDGET_S = 0.01


class Kind(NamedTuple):
    """What of a chain decides how long it takes."""

    x_shape: tuple[int, ...]
    channels_last_x: bool
    weight_shape: tuple[int, ...]
    dtype: torch.dtype
    window: tuple
    input_precision: str
    steps: tuple[bool, bool, bool]
    """Scale, bias, residual."""
    activation: Activation
    copies_y: bool
    """Whether the result is copied to where PyTorch would have put it."""
    own_epilogue: bool
    """Whether Inductor needs a kernel for what follows the layer."""

    def __str__(self) -> str:
        shape, weight = ("x".join(map(str, sizes)) for sizes in (self.x_shape, self.weight_shape))
        names = ("scale", "bias", "residual")
        steps = [*[name for name, there in zip(names, self.steps) if there], str(self.activation)]
        (stride, *_), *_, groups = self.window
        alone = "" if self.own_epilogue else ", its epilogue free for Inductor"
        return f"{shape} by {weight}/{stride}, {groups} groups, {', '.join(steps)}{alone}"


def kind_of(chain: Chain, packed: Packed) -> Kind:
    x, y = value(chain.x), chain.result
    shape = tuple(hint(size) for size in x.shape)
    if chain.is_linear:
        rows = 1
        for size in shape[:-1]:
            rows *= size
        shape = rows, shape[-1], 1, 1
    of_the_graph = chain.x.op == "placeholder"  # others are channels_last, if a kernel of ours has made them
    return Kind(
        shape,
        chain.is_linear or not of_the_graph or has_neighbouring_channels(x),
        tuple(value(chain.weight).shape),
        packed.dtype,
        chain.window,
        packed.input_precision,
        (packed.tensors[1] is not None, packed.tensors[2] is not None, chain.residual is not None),
        chain.act,
        y.dim() == 4
        and not (chain.is_linear and chain.permute is None)
        and not has_neighbouring_channels(y)
        and any(base_name(user) not in STORED_FOR for user in chain.tail.users),
        chain.is_stored,
    )


@dataclass
class Trial:
    """One kind of chain on random images, as ours and as Inductor would compute it."""

    kind: Kind
    packed: Packed
    device: torch.device
    x: Tensor | None = None
    residual: Tensor | None = None

    def make_tensors(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        self.x = torch.randn(self.kind.x_shape, generator=generator, device=self.device).to(self.kind.dtype)
        if self.kind.channels_last_x:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.weight = torch.randn(self.kind.weight_shape, generator=generator, device=self.device).to(self.kind.dtype)
        if len(self.kind.weight_shape) == 4:
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self.bias = None if self.packed.tensors[2] is None else self.packed.tensors[2].to(self.kind.dtype)
        self.x_theirs = self.x.contiguous(memory_format=torch.channels_last)
        self.residual = torch.randn_like(self._product()) if self.kind.steps[2] else None

    def ours(self) -> Tensor:
        kind = self.kind
        kernel_size = kind.weight_shape[2:] or (1, 1)
        y = conv2d_fused(
            self.x,
            *self.packed.tensors,
            self.residual,
            *kind.activation,
            kernel_size,
            *kind.window,
            kind.input_precision,
            False,
            False,
        )
        return y.contiguous() if kind.copies_y else y

    def theirs(self) -> Tensor:
        y = self._product()
        if self.residual is not None:
            return y + self.residual if self.kind.own_epilogue else y
        scale, bias, _ = self.kind.steps
        follows = scale or (bias and self._is_image) or self.kind.activation.name != "none"
        return torch.relu(y) if follows and self.kind.own_epilogue else y

    @property
    def _is_image(self) -> bool:
        return len(self.kind.weight_shape) == 4

    def _product(self) -> Tensor:
        """cuBLAS adds a bias; a convolution's Inductor adds with what follows."""
        if self._is_image:
            return F.conv2d(self.x_theirs, self.weight, None, *self.kind.window)
        return F.linear(self.x_theirs.flatten(1), self.weight, self.bias)[:, :, None, None]


def compile_kernels(
    chains: Sequence[Chain], packed: Sequence[Packed], inputs: Sequence[object], in_graphs: bool
) -> None:
    """Has what packs the weights, and what all chains would launch, compiled beside each other.

    They are timed in CUDA graphs, where kernels are others; unless they run `in_graphs` too, both are compiled. Chains
    that are known to be slower launch nothing.
    """
    device = chains[0].result.device
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return

    known = read(path_of(device))

    def calls() -> Iterator[Callable[[], object]]:
        yield lambda: [one.compute(inputs) for one in packed]
        kinds = {kind_of(chain, one): one for chain, one in zip(chains, packed) if one.tensors}
        for kind, one in kinds.items():
            if repr(kind) not in known or known[repr(kind)].ours_is_no_slower:
                yield _compiling(Trial(kind, one, device))

    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad(), progress_after() as advance:
        with launches_as_in_graphs():
            compile_ahead(calls(), advance, every_kernel=True)
        if not in_graphs:
            compile_ahead(calls(), advance, every_kernel=True)
    for one in packed:
        one.tensors = []  # nothing was launched: they are nonsense


def faster_ones(chains: Sequence[Chain], packed: Sequence[Packed]) -> list[bool]:
    """Whether each chain is to run on our kernel: on a GPU where that was measured to be faster, else always."""
    device = chains[0].result.device
    if device.type != "cuda":
        return [True] * len(chains)
    if torch.cuda.is_current_stream_capturing():
        return [False] * len(chains)
    kinds = [kind_of(chain, one) for chain, one in zip(chains, packed)]
    trials = {kind: Trial(kind, one, device) for kind, one in zip(kinds, packed)}
    path = path_of(device)
    known = read(path)
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad(), launches_as_in_graphs():
        for kind, trial in trials.items():
            if repr(kind) not in known and (times := _measured(trial)) is not None:
                known[repr(kind)] = times
                add(path, repr(kind), times)
    chosen = [repr(kind) in known and known[repr(kind)].ours_is_no_slower for kind in kinds]
    LOG.info("%d of %d convolutions and linear layers run as kernels of tritonnn", sum(chosen), len(chosen))
    return chosen


def _compiling(trial: Trial) -> Callable[[], None]:
    def call() -> None:
        x = torch.empty(trial.kind.x_shape, dtype=trial.kind.dtype, device=trial.device)
        trial.x = x.contiguous(memory_format=torch.channels_last) if trial.kind.channels_last_x else x
        trial.ours()
        trial.x = None

    return call


def _measured(trial: Trial) -> Times | None:
    """The times of both; None where they cannot be measured, for want of memory say.

    Of several samples the tenth percentile counts: whoever else uses the GPU only adds to them.
    """
    try:
        trial.make_tensors()
        with measuring_alone(trial.device):
            clocks = {name: _clock(call) for name, call in (("ours", trial.ours), ("theirs", trial.theirs))}
            samples, _ = alternate(clocks, BUDGET_S, ROUNDS)
    except RuntimeError as error:
        mend_generator()
        LOG.info("%s: not measured: %s", trial.kind, error)
        return None
    finally:
        trial.x = trial.residual = trial.weight = trial.x_theirs = None
    times = Times(samples["ours"].p10 * 1e3, samples["theirs"].p10 * 1e3)
    LOG.info("%s: %.1f us, by PyTorch %.1f us", trial.kind, *times)
    return times


def _clock(call: Callable[[], Tensor]) -> Clock:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    once = event_clock(captured(call, 1), 1)
    once()
    repeats = min(repeats_for(once(), GRAPH_MS), MOST_CALLS)
    clock = event_clock(captured(call, repeats), repeats)
    clock()
    return clock
