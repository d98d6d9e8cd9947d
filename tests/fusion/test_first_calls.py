"""The first call of a fused network: its kernels are compiled beside each other, and nobody notices."""

import pickle

import pytest
import torch
import triton
from helpers.compare import image
from helpers.fused import Net
from helpers.trained import trained
from torch import Tensor, nn
from torch.nn import functional as F

import tritonnn
from lit_modules.resnet import ResNet18
from tritonnn.fusion import cuda_graphs, first_calls
from tritonnn.fusion.fuse import FusedForward


class Counts(nn.Module):
    """Code that torch.fx cannot look into, and that would notice a second time."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def draws_random_numbers(n: Net, x: Tensor) -> Tensor:
    return F.dropout(n.a(x), 0.5, training=True)


def overwrites_its_input(n: Net, x: Tensor) -> Tensor:
    x.mul_(2)
    return n.a(x)


@torch.fx.wrap
def checked(x: Tensor) -> None:
    """Only reads, and says so."""


@torch.fx.wrap
def noted(x: Tensor) -> None:
    """May do anything."""


checked.only_reads = True


def checks_its_input(n: Net, x: Tensor) -> Tensor:
    checked(x)
    return n.a(x)


def notes_its_input(n: Net, x: Tensor) -> Tensor:
    noted(x)
    return n.a(x)


def is_a_graph_of_layers(n: Net, x: Tensor) -> Tensor:
    return n.relu(n.norm(n.a(x))).add_(n.b(x)).mean((2, 3))


def has_code_that_stays_whole(n: Net, x: Tensor) -> Tensor:
    return n.a(n.counts(x))


PROGRAMS = {
    is_a_graph_of_layers: True,
    checks_its_input: True,
    notes_its_input: False,
    draws_random_numbers: False,
    overwrites_its_input: False,
    has_code_that_stays_whole: False,
}
"""Whether a call may be gone through twice."""


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_only_what_cannot_notice_is_gone_through_twice(program):
    network = tritonnn.fuse(trained(Net(program, counts=Counts()), torch.float32))
    assert network._first_calls.can_go_through_twice is PROGRAMS[program]
    assert pickle.loads(pickle.dumps(network))._first_calls.can_go_through_twice is PROGRAMS[program]


def test_resnet18_is_compiled_ahead():
    assert tritonnn.fuse(ResNet18(width=2).eval())._first_calls.can_go_through_twice


def test_a_network_on_the_cpu_compiles_nothing(monkeypatch):
    monkeypatch.setattr(first_calls, "compile_ahead", pytest.fail)
    network = tritonnn.fuse(trained(Net(is_a_graph_of_layers), torch.float64))
    if not torch.cuda.is_available():
        network(image(1, 4, 5, 5, dtype=torch.float64))


class Replays:
    """Stands for a CUDA graph."""

    def replay(self) -> None:
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU")
def test_replays_do_not_ask_whether_something_is_to_be_compiled(monkeypatch):
    network, x = tritonnn.fuse(trained(Net(is_a_graph_of_layers)), cuda_graph=True), image(1, 4, 5, 5).double()
    asked = []
    monkeypatch.setattr(first_calls.FirstCalls, "before", lambda *args, **kwargs: asked.append(args))
    monkeypatch.setattr(cuda_graphs, "can_be_captured", lambda tensors: True)
    monkeypatch.setattr(cuda_graphs, "current_device", x.get_device)

    def capture(graphs, call, network, leaves, spec, key):
        graphs._captured[key] = cuda_graphs._Captured(Replays(), [x.clone()], call(x), [])
        return graphs._captured[key]

    monkeypatch.setattr(cuda_graphs.CudaGraphs, "_capture", capture)
    for _ in range(4):
        network(x)
    assert len(network.graphs) == len(asked) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "graph"])
def test_nothing_is_compiled_but_ahead(tmp_path, monkeypatch, cuda_graph):
    """Neither in the first call nor, with CUDA graphs, in the one that captures; and what was packed is no nonsense."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled, ahead, compile_ahead = [], [], first_calls.compile_ahead

    def noting(calls, advance, every_kernel):
        compile_ahead(calls, advance, every_kernel)
        ahead.append(len(compiled))

    monkeypatch.setattr(first_calls, "compile_ahead", noting)
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **of: compiled.append(of["src"].name))
    layers = nn.Conv2d(40, 56, 3), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(56, 24, 1)
    model = trained(nn.Sequential(*layers), torch.bfloat16)
    x = image(3, 40, 17, 17, dtype=torch.bfloat16, channels_last=True)
    network = tritonnn.fuse(model, cuda_graph=cuda_graph)
    with torch.no_grad():
        expected, exact = model(x), model.double()(x.double())
        for _ in range(3):
            y = network(x)
    assert ahead == [len(compiled)] and compiled
    assert (y - exact).abs().max() <= 2 * (expected - exact).abs().max()


def test_a_call_that_runs_the_modules_own_code_is_not_gone_through_twice():
    def own_code(x: Tensor, factor: float = 2.0) -> Tensor:
        raise AssertionError("it was run")

    forward = FusedForward(lambda x: x, own_code)
    assert isinstance(forward, first_calls.RunsGraph)
    x = torch.ones(2)
    assert forward.runs_the_graph(x) and forward.runs_the_graph(x, 2.0) and not forward.runs_the_graph(x, 3.0)
    assert not forward.fallbacks
