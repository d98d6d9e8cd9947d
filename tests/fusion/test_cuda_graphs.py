"""tritonnn.fuse(model, cuda_graph=True): replays give what the fused network gives."""

import pytest
import torch
from helpers.compare import image
from helpers.trained import Untraceable, small, trained
from torch import nn

import tritonnn
from lit_modules.resnet import ResNet18
from tritonnn.fusion import cuda_graphs
from tritonnn.fusion.cuda_graphs import CAPTURE_AT_CALL, MAX_GRAPHS


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need Triton's interpreter")
def test_cuda_graph_on_a_cpu_runs_plainly():
    fused, x = tritonnn.fuse(small(), cuda_graph=True), image(1, 4, 5, 5, dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(fused(x), tritonnn.fuse(small())(x))
    assert not len(fused.graphs)


class Counting(nn.Module):
    """Its results depend on an attribute that it changes: at every call, or at the first."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.layer, self.once, self.calls = nn.Conv2d(4, 4, 1), once, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.once and self.calls):
            self.calls += 1
        return self.layer(x) * self.calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU")
@pytest.mark.parametrize(("model", "attempts"), [(small(), 4), (Counting(once=True), 3), (Counting(once=False), 0)])
def test_what_changes_its_own_attributes_is_not_captured(model, attempts, monkeypatch):
    attempted = []
    monkeypatch.setattr(cuda_graphs, "can_be_captured", lambda tensors: True)
    monkeypatch.setattr(cuda_graphs.CudaGraphs, "_capture", lambda *args: attempted.append(args))
    model = trained(model)
    fused, x = tritonnn.fuse(model, cuda_graph=True), image(1, 4, 5, 5, dtype=torch.float64)
    for _ in range(5):
        torch.testing.assert_close(fused(x), model(x))
    assert len(attempted) == attempts


@pytest.mark.gpu
class TestCudaGraph:
    @staticmethod
    def networks(**arguments) -> tuple[tritonnn.FusedNetwork, tritonnn.FusedNetwork]:
        model = trained(ResNet18(width=8), torch.float32)
        return tritonnn.fuse(model), tritonnn.fuse(model, cuda_graph=True, **arguments)

    def test_replay_equals_eager(self):
        eager, graphed = self.networks()
        for call in range(1, 6):
            x = image(2, 3, 32, 32)
            torch.testing.assert_close(graphed(x), eager(x), rtol=1e-5, atol=1e-5)
            assert len(graphed.graphs) == (call >= CAPTURE_AT_CALL)
        assert not graphed.graphs.refused

    def test_the_output_is_safe_to_keep(self):
        eager, graphed = self.networks()
        inputs = [image(2, 3, 32, 32) for _ in range(6)]
        outputs = [graphed(x) for x in inputs]
        for x, y in zip(inputs, outputs):
            torch.testing.assert_close(y, eager(x), rtol=1e-5, atol=1e-5)

    def test_without_the_copy_the_output_is_the_graphs(self):
        _, graphed = self.networks(copy_output=False)
        outputs = [graphed(image(2, 3, 32, 32)) for _ in range(4)]
        assert outputs[-1].data_ptr() == outputs[-2].data_ptr()

    def test_two_shapes_in_turns(self):
        eager, graphed = self.networks()
        for _ in range(4):
            for batch in (1, 3):
                x = image(batch, 3, 32, 32)
                torch.testing.assert_close(graphed(x), eager(x), rtol=1e-5, atol=1e-5)
        assert len(graphed.graphs) == 2

    def test_the_number_of_graphs_is_bounded(self):
        model = small()
        eager, graphed = tritonnn.fuse(model), tritonnn.fuse(model, cuda_graph=True)
        for size in range(5, 5 + MAX_GRAPHS + 3):
            for _ in range(3):
                x = image(1, 4, size, size, dtype=torch.float64)
                torch.testing.assert_close(graphed(x), eager(x))
        assert len(graphed.graphs) == MAX_GRAPHS
        x = image(1, 4, 5, 5, dtype=torch.float64)  # dropped, and captured again
        torch.testing.assert_close(graphed(x), eager(x))
        assert len(graphed.graphs) == MAX_GRAPHS

    def test_autocast_and_tf32_have_graphs_of_their_own(self):
        eager, graphed = self.networks()
        x = image(2, 3, 32, 32)
        exact = eager(x)
        for _ in range(3):
            torch.testing.assert_close(graphed(x), exact, rtol=1e-5, atol=1e-5)
            with torch.autocast("cuda", torch.bfloat16):
                y = graphed(x)
                assert y.dtype == torch.bfloat16
                torch.testing.assert_close(y, eager(x), rtol=0.02, atol=0.05)
            torch.backends.cudnn.conv.fp32_precision = "tf32"
            torch.testing.assert_close(graphed(x), eager(x), rtol=1e-3, atol=1e-3)
            torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert len(graphed.graphs) == 3

    def test_changed_weights_count(self):
        model, x = small(), image(1, 4, 5, 5, dtype=torch.float64)
        graphed = tritonnn.fuse(model, cuda_graph=True)
        before = [graphed(x) for _ in range(3)][-1]
        last = graphed.network.get_submodule("3")
        last.weight.mul_(2)
        last.bias.mul_(2)
        for _ in range(3):
            torch.testing.assert_close(graphed(x), 2 * before)
        last.weight = last.weight / 2
        last.bias = last.bias / 2
        for _ in range(3):
            torch.testing.assert_close(graphed(x), before)
        graphed.to(torch.float32)
        assert not len(graphed.graphs)
        torch.testing.assert_close(graphed(x.float()), before.float(), rtol=1e-4, atol=1e-4)

    def test_not_inside_another_capture(self):
        eager, graphed = self.networks()
        x = image(2, 3, 32, 32)
        graphed(x)
        eager(x)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = graphed(x)
        graph.replay()
        assert not len(graphed.graphs)
        torch.testing.assert_close(y, eager(x), rtol=1e-5, atol=1e-5)

    def test_captured_in_inference_mode_and_used_outside(self):
        eager, graphed = self.networks()
        with torch.inference_mode():
            for _ in range(3):
                graphed(image(2, 3, 32, 32))
        x = image(2, 3, 32, 32)
        torch.testing.assert_close(graphed(x), eager(x), rtol=1e-5, atol=1e-5)
        assert len(graphed.graphs) == 1

    def test_what_cannot_be_captured_runs_eagerly(self):
        model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Untraceable()))
        eager, graphed = tritonnn.fuse(model), tritonnn.fuse(model, cuda_graph=True)
        for _ in range(4):
            x = image(2, 3, 6, 6, dtype=torch.float64)
            torch.testing.assert_close(graphed(x), eager(x))
        assert len(graphed.graphs) == 0 and len(graphed.graphs.refused) == 1
        torch.randn(1, device="cuda")

    def test_a_counter_in_a_network_goes_on(self):
        model = trained(Counting(once=False), torch.float32)
        graphed, x = tritonnn.fuse(model, cuda_graph=True), image(2, 4, 8, 8)
        for _ in range(6):
            torch.testing.assert_close(graphed(x), model(x), rtol=1e-4, atol=1e-4)

    def test_an_input_that_gets_another_shape(self):
        class Resizing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm2d(4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.norm(x)
                x.resize_(3)
                x.add_(1)
                return y

        model = trained(Resizing(), torch.float32)
        graphed, x = tritonnn.fuse(model, cuda_graph=True), image(2, 4, 8, 8)
        for _ in range(4):
            torch.testing.assert_close(graphed(x.clone()), model(x.clone()))

    def test_weights_that_pytorch_does_not_count_as_changed(self):
        model = trained(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)), torch.float32)
        graphed, x = tritonnn.fuse(model, cuda_graph=True), image(2, 4, 8, 8)
        with torch.autocast("cuda", torch.bfloat16):
            before = [graphed(x) for _ in range(3)][-1]
            graphed.network.get_submodule("2").weight.data.mul_(3)
            graphed.weights_changed()
            for _ in range(3):
                torch.testing.assert_close(graphed(x), 3 * before, rtol=0.02, atol=0.02)

    def test_outputs_lie_as_without_graphs(self):
        """Views with gaps, repeated elements and a part of an image."""

        class Views(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Conv2d(4, 4, 1)

            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                y = self.layer(x)
                return y[:, :1], y[..., ::2], y.mean((2, 3), keepdim=True).expand(-1, -1, 3, 3), y[:0]

        model = trained(Views(), torch.float32)
        graphed, x = tritonnn.fuse(model, cuda_graph=True), image(2, 4, 8, 8)
        with torch.no_grad():
            expected = model(x)
            for _ in range(4):
                for actual, y in zip(graphed(x), expected, strict=True):
                    torch.testing.assert_close(actual, y)
                    assert actual.stride() == y.stride()

    @pytest.mark.parametrize("through_data", [False, True])
    def test_a_network_that_overwrites_its_input_is_not_captured(self, through_data):
        class Overwriting(nn.Sequential):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                overwritten = x.data if through_data else x
                overwritten += 1
                return super().forward(x)

        model = trained(Overwriting(nn.Conv2d(4, 4, 3), nn.ReLU()))
        graphed, x = tritonnn.fuse(model, cuda_graph=True), image(2, 4, 8, 8, dtype=torch.float64)
        y = x.clone()
        for _ in range(4):
            with torch.no_grad():
                torch.testing.assert_close(graphed(y), model(x))
            assert torch.equal(x, y)
        assert list(graphed.graphs.refused.values()) == ["the network overwrites its inputs"]

    def test_a_network_that_counts_its_calls_is_not_captured(self):
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Conv2d(4, 4, 1)
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                return self.layer(x) * self.calls

        model = trained(Counting())
        graphed, x = tritonnn.fuse(model, cuda_graph=True), image(2, 4, 8, 8, dtype=torch.float64)
        for _ in range(4):
            with torch.no_grad():
                torch.testing.assert_close(graphed(x), model(x))
        assert list(graphed.graphs.refused.values()) == ["the network changes its parameters or buffers"]


@pytest.mark.parametrize(
    "view",
    {
        "dense": lambda x: x.permute(0, 2, 3, 1),
        "a part": lambda x: x[:, 1:2, ::2, 1:],
        "repeated": lambda x: x[:, :, :1, :1].expand(-1, -1, 3, 5),
        "nothing": lambda x: x[:0],
    }.values(),
    ids=["dense", "a part", "repeated", "nothing"],
)
def test_what_is_handed_out_lies_as_it_did_and_is_its_own(view):
    x = torch.randn(2, 3, 4, 6)
    y, copied = view(x), cuda_graphs.clone(view(x))
    assert torch.equal(copied, y) and copied.stride() == y.stride()
    before = copied.clone()
    x.zero_()
    assert torch.equal(copied, before)
