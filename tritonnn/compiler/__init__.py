"""`torch.compile(model, backend="tritonnn")`: Inductor, with this package's kernels for convolutions."""

from typing import Any


def backend(graph: Any, example_inputs: Any, **options: Any) -> Any:
    """The backend of that name, which PyTorch finds by the entry point `torch_dynamo_backends`.

    In graphs without gradients, convolutions and linear layers become, with the batch norm, sum and activation that
    follow them, calls of `torch.ops.tritonnn.conv2d_fused`, unless PyTorch's own are faster there, which is measured
    once; Inductor compiles everything else and wraps it in CUDA graphs. Graphs with gradients are Inductor's alone.

    Weights are packed and batch norms folded once. Parameters and buffers that are replaced, or overwritten in place,
    count from the next call; not so writes that PyTorch does not count (`Tensor._version`), such as those through
    `.data`.

    Args:
        options: `mode` as for Inductor, by default "reduce-overhead", which is CUDA graphs, and `options` beside it.
    """
    from .graphs import compile_graph  # slow: it imports Inductor's configuration

    return compile_graph(graph, example_inputs, **options)
