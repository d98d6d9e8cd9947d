"""Semaphores of the programs that share a tile: zero when a kernel begins, and nobody else's while it runs."""

import pytest
import torch
from helpers.compare import image
from helpers.problems import sliced_k
from torch.nn import functional as F

from tritonnn.ops.conv2d import op
from tritonnn.ops.conv2d.forms.sliced_k import MOST_TRIED_OUTPUTS, TILES
from tritonnn.ops.conv2d.pack import pack_weight
from tritonnn.ops.conv2d.problem import Choice
from tritonnn.runtime import semaphores as module
from tritonnn.runtime.launch_plan import forget_plans
from tritonnn.runtime.semaphores import LINE, PER_STREAM, RESERVE, semaphores


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(module, "_of_streams", {})
    monkeypatch.setattr(module, "_reserves", {})


SETTINGS = None, None, None, "relu", 0.01, (3, 3), (1, 1), (1, 1), (1, 1), 1, "tf32x3", False, False


class Convolution:
    """A convolution of one image by tiles of eight programs; `exact` is its result."""

    def __init__(self) -> None:
        self.x, weight = image(1, 256, 8, 8, channels_last=True), image(256, 256, 3, 3)
        self.packed = pack_weight(weight, "tf32x3")
        self.exact = F.conv2d(self.x.double(), weight.double(), padding=1).relu()

    def __call__(self) -> torch.Tensor:
        return op.conv2d_fused(self.x, self.packed, *SETTINGS)

    def assert_right(self, y: torch.Tensor) -> None:
        torch.testing.assert_close(y.double(), self.exact, rtol=1e-5, atol=1e-4)


@pytest.fixture
def split(monkeypatch, fresh):
    forget_plans()
    monkeypatch.setattr(op, "choose", lambda product: Choice(sliced_k(8, 4, 16, 32, 32, num_stages=3)))


def test_on_the_cpu_they_are_made():
    assert semaphores(torch.device("cpu"), 5).tolist() == [0] * 5


def test_there_are_enough_for_every_choice():
    """Tiles of the least size, of the largest output that is split."""
    assert PER_STREAM >= MOST_TRIED_OUTPUTS // min(block_m * block_n for block_m, block_n in TILES)


@pytest.mark.gpu
def test_a_stream_keeps_its_own(fresh):
    device = torch.device("cuda", 0)
    first = semaphores(device, 7)
    with torch.cuda.stream(torch.cuda.Stream()):
        second = semaphores(device, 7)
    assert semaphores(device, 9) is first and second.data_ptr() != first.data_ptr()
    assert not first.any() and not second.any()
    with pytest.raises(ValueError, match="semaphores"):
        semaphores(device, PER_STREAM + 1)


@pytest.mark.gpu
def test_every_kernel_in_a_graph_has_its_own(fresh):
    device = torch.device("cuda", 0)
    semaphores(device, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, second = semaphores(device, 3), semaphores(device, 3)
        module._reserves[0] = module._reserves[0][0], RESERVE - 2
        cleared = semaphores(device, 3)
    assert second.data_ptr() - first.data_ptr() == LINE * first.element_size()
    graph.replay()
    assert not cleared.any()


@pytest.mark.gpu
def test_they_are_zero_again(split):
    convolution = Convolution()
    first = convolution()
    convolution.assert_right(first)
    assert all(torch.equal(convolution(), first) for _ in range(20))
    assert len(module._of_streams) == 1
    assert not any(counts.any() for counts in module._of_streams.values())


@pytest.mark.gpu
def test_streams_and_graphs_at_once(split):
    """Each alone takes microseconds: many of them overlap."""
    convolutions = [Convolution() for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in convolutions]
    graphs, outputs = [], []
    for convolution in convolutions:
        convolution()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for _ in range(20):
                y = convolution()
        outputs.append(y)
    eager = {}
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i % 2:
                    graphs[i].replay()
                else:
                    eager[i] = convolutions[i]()
    torch.cuda.synchronize()
    for i, convolution in enumerate(convolutions):
        convolution.assert_right(outputs[i] if i % 2 else eager[i])


@pytest.mark.gpu
def test_they_are_in_no_pool_of_graphs(split):
    """In the warm-up of torch.compile's CUDA graphs, on a stream of its own, whose memory is to be free afterwards."""
    convolution = Convolution()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: op.conv2d_fused(x, convolution.packed, *SETTINGS) + 1, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            convolution.assert_right(compiled(convolution.x) - 1)
