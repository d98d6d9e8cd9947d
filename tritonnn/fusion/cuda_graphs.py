"""CUDA graphs of a network, one for each kind of input: a replay costs a few microseconds, whatever its length."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from ..runtime.capabilities import knows
from ..runtime.dependent_launch import launches_as_in_graphs
from ..runtime.precision import CONVOLUTION, MATMUL
from ..runtime.replay import current_device
from .first_calls import FirstCalls

CAPTURE_AT_CALL = 2
OWN_CODE = "tritonnn."
MODULE_TABLES = {"_parameters", "_buffers", "_modules"}
MAX_GRAPHS = 8
MAX_COUNTED = 256


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: object
    weights: list[tuple[dict, str, Tensor, int, int | None]]
    """The network's parameters and buffers: where they are kept, and the state in which they were captured."""

    def is_current(self) -> bool:
        for holder, name, tensor, address, version in self.weights:  # at every call: no function, no generator
            if holder.get(name) is not tensor or tensor.data_ptr() != address:
                return False
            if version is not None and tensor._version != version:
                return False
        return True


def release_workspaces() -> None:
    """Has the graph that is captured next allocate cuBLAS' workspaces anew, among its own memory.

    cuBLAS keeps a workspace for each stream, and all captures share one stream. Without this, a graph would use a
    workspace that lies in the memory of an earlier graph; once that is gone, or torch.compile has freed it, a replay
    would access memory illegally.
    """
    torch._C._cuda_clearCublasWorkspaces()


class CudaGraphs:
    """Calls a network through CUDA graphs, of which the `MAX_GRAPHS` last used are kept.

    One graph for each shape, type, strides and device of the inputs, values of other arguments, autocast and TF32
    state, captured at the second call of that kind, so that a shape seen once (a last partial batch) costs nothing.
    The inputs are copied into the graph's own; the graphs share their memory, so calls must follow each other, on one
    stream. Eager are: calls with CPU tensors, inside another capture or under a compiler, and those that cannot be
    captured, listed in `refused` with the reason.
    """

    def __init__(self, copy_output: bool, first_calls: FirstCalls) -> None:
        self.copy_output, self.first_calls = copy_output, first_calls
        self.refused: dict[tuple, str] = {}
        self.clear()

    def clear(self) -> None:
        self._calls: Counter[tuple] = Counter()
        self._captured: OrderedDict[tuple, _Captured] = OrderedDict()
        self._unsettled: set[tuple] = set()
        """Kinds of which the last call changed attributes of modules: no replay would."""
        self.refused.clear()

    def __len__(self) -> int:
        return len(self._captured)

    def __getstate__(self) -> dict:
        return {"copy_output": self.copy_output, "first_calls": self.first_calls}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __call__(self, call: Callable, network: nn.Module, args: tuple, kwargs: dict) -> object:
        """call(*args, **kwargs), which reads the parameters and buffers of `network`."""
        leaves, spec = _flatten(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not can_be_captured(tensors):
            self.first_calls.before(call, network, args, kwargs, in_graphs=True)
            return call(*args, **kwargs)
        key = _key(leaves, spec)
        captured = self._captured.get(key)
        if captured is not None and not captured.is_current():
            del self._captured[key]
            captured = None
        if captured is None:
            self._calls[key] += 1
            if self._calls[key] < CAPTURE_AT_CALL or key in self.refused or key in self._unsettled:
                if len(self._calls) > MAX_COUNTED:
                    self._calls.clear()
                    self._unsettled.clear()
                    self.refused.clear()
                return self._eagerly(call, network, args, kwargs, key)
            captured = self._capture(call, network, leaves, spec, key)
            if captured is None:
                return call(*args, **kwargs)
        self._captured.move_to_end(key)
        if tensors[0].get_device() == current_device():
            return self._replay(captured, tensors)
        with torch.cuda.device(tensors[0].device):
            return self._replay(captured, tensors)

    def _eagerly(self, call: Callable, network: nn.Module, args: tuple, kwargs: dict, key: tuple) -> object:
        """The first call of a kind, and calls that are refused.

        A network that changes its own state is refused: warming up would change it more often, and a replay not at all.
        Attributes may change in a first call, which makes a table, say: it is captured after a call that changes none.
        """
        self.first_calls.before(call, network, args, kwargs, in_graphs=True)
        if key in self.refused:
            return call(*args, **kwargs)
        before, attributes = _state_of(network), _attributes_of(network)
        with launches_as_in_graphs():  # compiles what the graph will need, and nothing else
            output = call(*args, **kwargs)
        if _state_of(network) != before:
            self.refused[key] = "the network changes its parameters or buffers"
        if _attributes_of(network) != attributes:
            self._unsettled.add(key)
        else:
            self._unsettled.discard(key)
        return output

    def _replay(self, captured: _Captured, tensors: list[Tensor]) -> object:
        for buffer, x in zip(captured.inputs, tensors):
            buffer.copy_(x)
        captured.graph.replay()
        if not self.copy_output:
            return captured.output
        return clone(captured.output) if type(captured.output) is Tensor else tree_map(clone, captured.output)

    def _capture(
        self, call: Callable, network: nn.Module, leaves: list, spec: TreeSpec | None, key: tuple
    ) -> _Captured | None:
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        # Inference tensors could not be copied into later, outside inference mode. Autocast's cache would free the
        # converted weights that a graph reads.
        cache = torch.is_autocast_cache_enabled()
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            torch.set_autocast_cache_enabled(False)
            try:
                inputs = [torch.empty_like(leaf).copy_(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                args, kwargs = (inputs, {}) if spec is None else tree_unflatten(inputs, spec)
                versions = [x._version for x in inputs if isinstance(x, Tensor)]
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side), launches_as_in_graphs():
                    for _ in range(2):  # compiles, tunes, packs weights
                        call(*args, **kwargs)
                        overwritten = versions != [x._version for x in inputs if isinstance(x, Tensor)]
                        if overwritten:
                            break
                torch.cuda.current_stream().wait_stream(side)
                # Writes through `.data` count no version.
                if overwritten or not all(_same(x, y) for x, y in zip(inputs, leaves) if isinstance(x, Tensor)):
                    self.refused[key] = "the network overwrites its inputs"
                    return None
                weights = [(*place, t, t.data_ptr(), _version(t)) for place, t in _tensors(network)]
                graph = torch.cuda.CUDAGraph()
                pool = next((other.graph.pool() for other in self._captured.values()), None)
                release_workspaces()
                # The outer context puts the stream back after a failed capture; `torch.cuda.graph` does not.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
                ):
                    output = call(*args, **kwargs)
            except RuntimeError as error:
                self.refused[key] = str(error)
                torch.cuda.synchronize()
                with torch.cuda.graph(torch.cuda.CUDAGraph()):  # mends the random generator, left captured
                    torch.zeros(1, device="cuda")
                return None
            finally:
                torch.set_autocast_cache_enabled(cache)
        if len(self._captured) >= MAX_GRAPHS:
            self._captured.popitem(last=False)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        self._captured[key] = captured = _Captured(graph, tensors, output, weights)
        return captured


def can_be_captured(tensors: list[Tensor]) -> bool:
    if not tensors or any(x.device != tensors[0].device or x.layout != torch.strided for x in tensors):
        return False
    if tensors[0].device.type != "cuda" or torch.compiler.is_compiling() or not knows("workspaces"):
        return False
    return not torch.cuda.is_current_stream_capturing()


def _flatten(args: tuple, kwargs: dict) -> tuple[list, TreeSpec | None]:
    """The leaves and their structure, which is None if all arguments are tensors by position."""
    if not kwargs and all(type(arg) is Tensor for arg in args):
        return list(args), None
    return tree_flatten((args, kwargs))


def _key(leaves: list, spec: TreeSpec | None) -> tuple:
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    inputs = [
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.get_device()) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves
    ]
    return (spec, autocast, CONVOLUTION.fp32_precision, MATMUL.fp32_precision, *inputs)


def _tensors(network: nn.Module) -> Iterator[tuple[tuple[dict, str], Tensor]]:
    for module in network.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    yield (holder, name), tensor


def _state_of(network: nn.Module) -> list[tuple[int, int | None]]:
    return [(id(tensor), _version(tensor)) for _, tensor in _tensors(network)]


def _attributes_of(network: nn.Module) -> dict[str, dict[str, object]]:
    """Attributes by name, of modules whose code is not ours: numbers, strings and such by value, else by identity."""
    return {
        name: {key: _snapshot(value) for key, value in vars(module).items() if key not in MODULE_TABLES}
        for name, module in network.named_modules()
        if not type(module).__module__.startswith(OWN_CODE)
    }


def _snapshot(value: object) -> object:
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return type(value), value
    if type(value) in (list, tuple, set, frozenset):
        return type(value), [_snapshot(v) for v in value]
    if type(value) is dict:
        return dict, [(_snapshot(k), _snapshot(v)) for k, v in value.items()]
    return type(value), id(value)


def _version(tensor: Tensor) -> int | None:
    """None for inference tensors, which do not count theirs."""
    return None if tensor.is_inference() else tensor._version


def clone(x: object) -> object:
    """A tensor of its own with the same strides, also where these leave gaps or repeat elements."""
    if not isinstance(x, Tensor):
        return x
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    if x.numel() == 0 or x.layout != torch.strided or extent == x.numel():
        return x.clone()
    return x.as_strided((extent,), (1,)).clone().as_strided(x.shape, x.stride())


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal, NaN to NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())
