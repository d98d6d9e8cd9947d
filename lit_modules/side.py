"""One side of a comparison: a copy of a LightningModule that makes the module's own steps."""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MaxMetric, Metric, MetricCollection, MinMetric, SumMetric

from lit_modules.trees import batch_size, mapped, named_tensors
from tritonnn import kind_of
from tritonnn.latency import twin

STEPS = {"test": "test_step", "validate": "validation_step", "predict": "predict_step"}
HOOKS = {"test": "test", "validate": "validation", "predict": "predict"}
"""By the Trainer's function: the module's step, and how the hooks around it are named."""
LOG = inspect.signature(LightningModule.log)


class WeightedMean(Metric):
    """In float64, NaN among it. (torchmetrics' own mean drops weights where it is not to look for NaN.)"""

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("total", "weight"):
            self.add_state(state, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: float) -> None:
        self.total += value * weight
        self.weight += weight

    def compute(self) -> Tensor:
        return self.total / self.weight


REDUCTIONS = {"sum": SumMetric, "max": MaxMetric, "min": MinMetric}


class Logged:
    """What a module logs, reduced over batches and processes as its Trainer would for a whole epoch."""

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self._values: dict[str, Metric] = {}
        self._size = 1
        self._dataloader: int | None = None

    def __bool__(self) -> bool:
        return bool(self._values)

    def start_batch(self, size: int, dataloader_idx: int | None) -> None:
        self._size, self._dataloader = size, dataloader_idx

    def log(self, *args: Any, **kwargs: Any) -> None:
        """In place of `LightningModule.log`."""
        bound = LOG.bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        name, value, reduction = (bound.arguments[key] for key in ("name", "value", "reduce_fx"))
        if self._dataloader is not None and bound.arguments["add_dataloader_idx"]:
            name = f"{name}/dataloader_idx_{self._dataloader}"
        if isinstance(value, Metric):
            self._values[name] = value
            return
        value = torch.as_tensor(value).detach().double().reshape(())
        if name not in self._values:
            kind = REDUCTIONS.get(getattr(reduction, "__name__", reduction))
            reduced = kind(nan_strategy="disable").set_dtype(torch.float64) if kind else WeightedMean()
            self._values[name] = reduced.to(value.device)
        reduced = self._values[name]
        if isinstance(reduced, WeightedMean):
            reduced.update(value, bound.arguments["batch_size"] or self._size)
        else:
            reduced.update(value)

    def values(self) -> dict[str, float]:
        """Called on all processes. What not all of them have logged is left out: it could not be reduced."""
        names = list(self._values)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everywhere: list[list[str]] = [[]] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, names)
            names = [name for name in everywhere[0] if all(name in others for others in everywhere)]
        return {name: float(self._values[name].compute()) for name in names}


@dataclass
class Call:
    """An outermost call that a step made: of the module itself, whose name is "", or of a part of it."""

    name: str
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None


class Side:
    """A copy of a module that shares its parameters; buffers, metrics and what else the steps change are its own.

    Args:
        module: in the state in which its next batch would find it.
        trainer: the copy's, too.
        stage: "test", "validate" or "predict".
        context: in which steps run, such as autocast.
        memory_format: of the images that a step's first call is given.

    Raises:
        MisconfigurationException: the module cannot be copied.
    """

    def __init__(
        self,
        module: LightningModule,
        trainer: Trainer,
        stage: str,
        context: Callable[[], AbstractContextManager],
        memory_format: torch.memory_format,
    ) -> None:
        self.module = _copy(module, trainer)
        self.stage = stage
        self.context = context
        self.memory_format = memory_format
        self.dtype: torch.dtype | None = None
        self.logged = Logged(self.module)
        for part in self.module.modules():
            if isinstance(part, LightningModule):
                part.__dict__["log"] = self.logged.log
        self.calls: list[Call] = []
        self._depth = 0
        self._handles: list[Any] = []

    def with_parameters(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "Side":
        """Gives the copy changed parameters, and all of it the type, to which inputs are converted then; returns it."""
        self.dtype = dtype
        parameters: dict[nn.Parameter, nn.Parameter] = {}
        for part in self.module.modules():
            if isinstance(part, Metric):
                continue
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if parameter not in parameters:
                        changed = change(parameter.detach())
                        parameters[parameter] = nn.Parameter(changed, requires_grad=parameter.requires_grad)
                    part._parameters[name] = parameters[parameter]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self._typed(buffer)
        return self

    def _typed(self, x: Tensor) -> Tensor:
        return x if self.dtype is None or not x.is_floating_point() else x.to(self.dtype)

    def _image(self, x: Tensor) -> Tensor:
        return in_format(self._typed(x), self.memory_format)

    def watch(self, names: Iterable[str]) -> None:
        """Notes in `calls` the outermost calls of these modules, whose inputs are converted first, from now on."""
        self.unwatch()
        for name in names:
            part = self.module.get_submodule(name)
            enter, leave = self._watcher(name, _computes(part))
            self._handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(part.register_forward_hook(leave))

    def unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _watcher(self, name: str, computes: bool) -> tuple[Callable, Callable]:
        def enter(part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            self._depth += 1
            if self._depth > 1 or not computes:
                return None
            convert = self._typed if self.calls else self._image
            args, kwargs = mapped(convert, args), mapped(convert, kwargs)
            self.calls.append(Call(name, args, kwargs))
            return args, kwargs

        def leave(part: nn.Module, args: tuple, output: Any) -> None:
            self._depth -= 1
            if self._depth == 0 and computes:
                self.calls[-1].output = output

        return enter, leave

    def step(self, batch: Any, indices: tuple[int, ...]) -> Any:
        """The module's step, with its hooks for a batch; `indices` are the batch's and, of several, its loader's.

        Returns:
            what the step returns; `calls` are those that it made.
        """
        self.calls, self._depth = [], 0
        self.logged.start_batch(batch_size(batch), indices[1] if len(indices) > 1 else None)
        if self.dtype is not None:
            batch = mapped(self._typed, batch)
        hooks, step = HOOKS[self.stage], getattr(self.module, STEPS[self.stage])
        with self.context():
            getattr(self.module, f"on_{hooks}_batch_start")(batch, *indices)
            output = step(batch, *(indices if _takes_batch_idx(step) else indices[1:]))
            getattr(self.module, f"on_{hooks}_batch_end")(output, batch, *indices)
        return output

    def forward(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """A call of the module itself, noted in `calls` in place of those before."""
        self.calls, self._depth = [], 0
        with self.context():
            self.module(*args, **kwargs)

    def metrics(self) -> dict[str, float]:
        """What the copy has logged, also at the end of the epoch, which this is. Called on all processes."""
        self.logged.start_batch(1, None)
        with self.context():
            getattr(self.module, f"on_{HOOKS[self.stage]}_epoch_end")()
            return self.logged.values()


def named_outputs(calls: Sequence[Call]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that the calls gave, with its place, such as "forward['logits']" or "head, call 2"."""
    times: Counter[str] = Counter()
    for call in calls:
        times[call.name] += 1
        name = f"{call.name or 'forward'}{f', call {times[call.name]}' if times[call.name] > 1 else ''}"
        yield from named_tensors(call.output, name)


def modules_called(calls: Sequence[Call]) -> list[str]:
    """The names of the modules called, each once."""
    return list(dict.fromkeys(call.name for call in calls))


def replay(module: LightningModule, calls: Sequence[Call]) -> nn.Module:
    """A network that makes these calls again, with the same inputs, whatever it is given; names are the module's."""

    def forward(self: nn.Module, *_: Any) -> list[Any]:
        def called(name: str) -> Callable:
            return MethodType(type(self).forward, self) if name == "" else self.get_submodule(name)

        return [called(call.name)(*call.args, **call.kwargs) for call in calls]

    again = twin(module)
    again.__dict__["forward"] = MethodType(forward, again)
    return again


class Replayed(nn.Module):
    """Makes the calls again with networks that stand in for the modules called, whatever it is given."""

    def __init__(self, networks: dict[str, nn.Module], calls: Sequence[Call]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks.values())
        self.calls = [(list(networks).index(call.name), call.args, call.kwargs) for call in calls]

    def forward(self, *_: Any) -> list[Any]:
        return [self.networks[index](*args, **kwargs) for index, args, kwargs in self.calls]


def in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Images [N, C, H, W] in the memory format, anything else as it is."""
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x


def _computes(module: nn.Module) -> bool:
    """A network or a layer, as against a metric, or a loss without weights."""
    if isinstance(module, Metric | MetricCollection):
        return False
    return any(True for _ in module.parameters()) or any(kind_of(part) for part in module.modules())


def _copy(module: LightningModule, trainer: Trainer) -> LightningModule:
    shared: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # PyTorch does not copy it, being part of a graph
                shared[id(value)] = value.detach().clone()
    try:
        other = copy.deepcopy(module, shared)
    except Exception as error:  # whatever an attribute of the module's says to being copied
        raise MisconfigurationException(
            f"TritonEvaluation compares copies of the module, and {type(module).__name__} cannot be copied "
            f"(copy.deepcopy: {type(error).__name__}: {error}): keep such an attribute out of the module"
        ) from error
    for part in other.modules():  # torch.compile left functions of the module that was copied
        if isinstance(part, LightningModule) and getattr(part, "_compiler_ctx", None):
            to_uncompiled(part)
    other.trainer = trainer
    return other


def _takes_batch_idx(step: Callable) -> bool:
    parameters = inspect.signature(step).parameters
    return (
        "batch_idx" in parameters
        or len(parameters) >= 2
        or any(p.kind == p.VAR_POSITIONAL for p in parameters.values())
    )
