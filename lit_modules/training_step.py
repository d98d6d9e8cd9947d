"""The step of a training: loss and gradients of one batch, recorded as a CUDA graph where that can be."""

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy

from tritonnn.fusion.cuda_graphs import release_workspaces

Compute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images, labels) to the loss and the hits."""

WARM_UP = 3
"""Steps before the recording: libraries choose algorithms and allocate, compilers compile."""


def classification(network: Callable[[Tensor], Tensor], label_smoothing: float) -> Compute:
    """The smoothed cross entropy of a batch, and how many labels are the network's first guess and among its five."""

    def compute(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(images)
        return cross_entropy(logits, labels, label_smoothing=label_smoothing), hits(logits.detach(), labels)

    return compute


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """[2]: how many labels [N] are first, and among the first five, by logits [N, C]. A logit that is NaN misses."""
    before = (~(logits <= logits.gather(1, labels[:, None]))).sum(1)
    return torch.stack([(before < 1).sum(), (before < min(5, logits.shape[1])).sum()])


class GraphedStep:
    """Gives loss and hits of a batch and leaves the gradients in the parameters, as one launch for the CPU.

    The first steps run as they are, then forward and backward pass are recorded as one CUDA graph, which each later
    step replays on its own images. Batches of another size, such as the last of an epoch, run without, and larger ones
    are recorded anew. Between processes the gradients, which lie one after the other in memory, are averaged in one
    call.

    Args:
        compute: loss and hits of a batch.
        parameters: that take gradients.
        memory_format: of the images.
        compile: have `torch.compile` make faster kernels for what is recorded.
        required: raise RuntimeError where a step cannot be recorded, as it waits for the GPU, say. Otherwise that is
            warned of, and all steps run as they are.
    """

    def __init__(
        self,
        compute: Compute,
        parameters: Sequence[nn.Parameter],
        memory_format: torch.memory_format,
        compile: bool = False,
        required: bool = False,
    ) -> None:
        self._plain = compute
        self._recorded = torch.compile(compute, dynamic=False) if compile else compute
        self.parameters, self.memory_format, self.required = list(parameters), memory_format, required
        self._refused = False
        self._key: tuple | None = None
        self._size = self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._side = torch.cuda.Stream()
        self._flat: Tensor | None = None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            self._flat, self._views = _one_after_the_other(self.parameters)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        key = images.shape, images.dtype, labels.shape, tuple(p.requires_grad for p in self.parameters)
        if key != self._key and len(images) >= self._size:
            self._key, self._size, self._steps, self._graph = key, len(images), 0, None
        if key != self._key:
            loss, hits = self._run(self._plain, images.contiguous(memory_format=self.memory_format), labels)
        elif self._refused:
            loss, hits = self._run(self._recorded, images.contiguous(memory_format=self.memory_format), labels)
        elif self._steps < WARM_UP:
            self._steps += 1
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                loss, hits = self._run(self._recorded, images.contiguous(memory_format=self.memory_format), labels)
            torch.cuda.current_stream().wait_stream(self._side)
        elif self._graph is None and not self._record(images, labels):
            loss, hits = self._run(self._recorded, images.contiguous(memory_format=self.memory_format), labels)
        else:
            loss, hits = self._replay(images, labels)
        if self._flat is not None:
            distributed.all_reduce(self._flat, distributed.ReduceOp.AVG)
        return loss, hits

    def _record(self, images: Tensor, labels: Tensor) -> bool:
        """Whether it could be."""
        self._images = torch.empty_like(images, memory_format=self.memory_format)
        self._labels = torch.empty_like(labels)
        with torch.no_grad():
            torch._foreach_mul_(list(self.parameters), 1.0)  # whatever is kept of weights as they were is made anew
        release_workspaces()
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context puts the stream back after a failure; other threads, such as the one that writes
            # checkpoints, may do what a recording one may not.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self._outputs = self._run(self._recorded, self._images, self._labels)
        except RuntimeError as error:
            torch.cuda.synchronize()
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # mends the random generator, left in the recording
                torch.zeros(1, device=images.device)
            if self.required:
                raise
            self._refused = True
            rank_zero_warn(
                f"The step runs without a CUDA graph, which cannot be recorded: {str(error).splitlines()[0]}"
            )
            return False
        self._gradients = [parameter.grad for parameter in self.parameters]
        self._graph = graph
        return True

    def _replay(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        for parameter, gradient in zip(self.parameters, self._gradients):
            parameter.grad = gradient
        loss, hits = self._outputs
        return loss.clone(), hits.clone()

    def _run(self, compute: Compute, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        loss, hits = compute(images, labels)
        with torch.autocast(images.device.type, enabled=False):
            loss.backward()
        if self._flat is not None:
            self._gather()
        return loss.detach(), hits

    def _gather(self) -> None:
        """Moves the gradients to where they lie one after the other."""
        gradients = [parameter.grad for parameter in self.parameters]
        if any(gradient is None for gradient in gradients):
            self._flat.zero_()
        views = [view for view, gradient in zip(self._views, gradients) if gradient is not None]
        torch._foreach_copy_(views, [gradient for gradient in gradients if gradient is not None])
        for parameter, view in zip(self.parameters, self._views):
            parameter.grad = view


def _one_after_the_other(parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Room for all gradients, and the part of it that is each one's, in the parameter's memory format."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device, dtype=parameters[0].dtype)
    parts = flat.split([p.numel() for p in parameters])
    return flat, [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, parameters)]
