"""tritonnn.fuse: what blocks of newer networks have besides convolutions: layer norms, layer scale, gates."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.compare import DEVICE, TOLERANCE, image
from helpers.fused import Coded, Net, assert_right, layers
from helpers.trained import trained
from torch import Tensor, nn
from torch.nn import functional as F

import tritonnn
from tritonnn.layers.fused.layer_norm import FusedLayerNorm
from tritonnn.layers.fused.linear import FusedLinearOfImages
from tritonnn.layers.fused.scaled import FusedExcitation, FusedGate, FusedNorm, FusedScaledConv2d
from tritonnn.ops.excitation import excitation
from tritonnn.ops.layer_norm import layer_norm
from tritonnn.ops.scaled_image import scaled_image

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class ConvNeXtBlock(nn.Module):
    """As torchvision has it, and behind it a layer norm over the channels of an image, by permuting."""

    def __init__(self, C: int = 8) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(C, C, 7, padding=3, groups=C), nn.LayerNorm(C, eps=1e-6)
        self.wide, self.narrow = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.layer_scale = nn.Parameter(torch.randn(C, 1, 1))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.layer_scale * self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        y += x
        y = F.layer_norm(y.permute(0, 2, 3, 1), (8,), self.norm_weight, self.norm_bias, 1e-6)
        return y.permute(0, 3, 1, 2)


class Gated(nn.Module):
    """Squeeze-and-excitation as torchvision has it, the gates first, and as others do."""

    def __init__(self, gates_first: bool = True) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.gates_first = gates_first

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv(x))
        gates = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return gates * y if self.gates_first else y.mul(gates)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_of_convnext(dtype, channels_last):
    model = trained(ConvNeXtBlock(), dtype)
    x = image(2, 8, 6, 5, dtype=dtype, channels_last=channels_last)
    network = tritonnn.fuse(model)
    assert_right(network, model, x)
    assert len(layers(network, FusedLayerNorm)) == 2 and len(layers(network, FusedLinearOfImages)) == 1
    assert "1 linear + scale + residual" in str(network.report) and not network.report.fallbacks


def test_a_block_of_convnext_under_autocast():
    """The product with a float32 scale is float32, as PyTorch's."""
    model, x = trained(ConvNeXtBlock(), torch.float32), image(2, 8, 6, 5)
    network = tritonnn.fuse(model)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        y, pytorch = network(x), model(x)
    exact = copy.deepcopy(model).double()(x.double())
    assert (y.dtype, y.stride()) == (pytorch.dtype, pytorch.stride())
    assert (y - exact).abs().max() <= 1.5 * (pytorch - exact).abs().max()


def test_the_scale_of_a_linear_layer_follows_the_switch_for_products(monkeypatch):
    """It does not follow the one for convolutions, which may use TF32 where products may not."""
    layer = layers(tritonnn.fuse(trained(ConvNeXtBlock(), torch.float32)), FusedLinearOfImages)[0]
    seen = []
    monkeypatch.setattr("tritonnn.layers.fused.linear.matmul_input_precision", lambda x, w: seen.append(x) or "ieee")
    layer(image(2, 32, 3, 3, channels_last=True), image(2, 8, 3, 3, channels_last=True))
    assert seen


class Permutes(nn.Module):
    """Linear layers whose result goes elsewhere too, or is permuted otherwise: they stay what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return a.permute(0, 3, 1, 2).sum() + a + self.b(x).permute(0, 3, 2, 1).mean() + self.scale.sum()


def test_other_permuted_linear_layers():
    model, x = trained(Permutes(), torch.float64), image(2, 3, 3, 4, dtype=torch.float64)
    network = tritonnn.fuse(model)
    assert_right(network, model, x)
    assert not layers(network, FusedLinearOfImages)


@pytest.mark.parametrize("gates_first", [True, False])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squeeze_and_excitation(dtype, channels_last, gates_first):
    model = trained(Gated(gates_first), dtype)
    x = image(2, 4, 7, 6, dtype=dtype, channels_last=channels_last)
    network = tritonnn.fuse(model)
    assert_right(network, model, x)
    assert len(layers(network, FusedGate)) == 1 and not network.report.fallbacks


class Scaled(Coded):
    """Gates or a batch norm before a convolution of one tap, behind the convolution a."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor], C: int = 4) -> None:
        super().__init__(code)
        K = 2 * C
        self.a, self.squeeze, self.excite = nn.Conv2d(C, K, 3, padding=1), nn.Conv2d(K, 2, 1), nn.Conv2d(2, K, 1)
        self.norm, self.b, self.after = nn.BatchNorm2d(K), nn.Conv2d(K, K, 1, bias=False), nn.BatchNorm2d(K)
        self.wide, self.by_2 = nn.Conv2d(K, K, 3, padding=1), nn.Conv2d(K, K, 1, stride=2)

    def gates(self, y: Tensor) -> Tensor:
        return self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.a(x))


def overwritten_between(n: nn.Module, y: Tensor) -> Tensor:
    z = n.gates(y) * y
    w = y.mul_(2)
    return n.b(z) + w


GATED, AFTER_NORM = "gate + conv2d", "batch_norm2d + relu + conv2d"
SCALED = {
    "gates": (lambda n, y: n.b(n.gates(y) * y), GATED),
    "gates, residual, activation": (
        lambda n, y: F.silu(n.after(n.b(y * n.gates(y))) + y),
        f"{GATED} + batch_norm2d + residual + silu",
    ),
    "a batch norm before": (lambda n, y: n.b(n.norm(y + y).relu()) + y, f"{AFTER_NORM} + residual"),
    "in place": (
        lambda n, y: F.relu(n.after(n.b(F.relu_(n.norm(y * 2)))), inplace=True),
        AFTER_NORM + " + batch_norm2d + relu",
    ),
    "another activation": (lambda n, y: n.b(F.silu(n.norm(y.tanh()))), "batch_norm2d + silu + conv2d"),
    "two readers": (lambda n, y: (lambda z: n.b(z) + z)(n.gates(y) * y), None),
    "read as the residual": (lambda n, y: n.b(y) + n.gates(y) * y, None),
    "read as both": (lambda n, y: (lambda z: n.b(z) + z)(n.norm(y + y).relu()), None),
    "nine taps": (lambda n, y: n.wide(n.gates(y) * y), None),
    "stride 2": (lambda n, y: n.by_2(n.norm(y + y).relu()), None),
    "overwritten in between": (overwritten_between, None),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("case", SCALED)
def test_a_convolution_scales_what_it_reads(case, channels_last):
    code, what = SCALED[case]
    model = trained(Scaled(code), torch.float64)
    network = tritonnn.fuse(model)
    for n in (2, 1):
        assert_right(network, model, image(n, 4, 7, 6, dtype=torch.float64, channels_last=channels_last))
    [found] = [network.report.fused[name] for name in ("b", "wide", "by_2") if name in network.report.fused]
    assert found == what if what else "gate" not in found and "relu" not in found
    assert not network.report.fallbacks


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["", "graph"])
@pytest.mark.parametrize("case", ["gates, residual, activation", "in place"])
def test_it_scales_them_in_the_matrix_product(case, cuda_graph):
    model = trained(Scaled(SCALED[case][0], 48), torch.bfloat16).to(memory_format=torch.channels_last)
    network = tritonnn.fuse(model, cuda_graph=cuda_graph)
    x = image(24, 48, 30, 28, dtype=torch.bfloat16, channels_last=True)
    for _ in range(3):
        assert_right(network, model, x)
    assert type(network.network.b) is FusedScaledConv2d and not network.report.fallbacks


def test_a_norm_of_other_types_and_shapes():
    model = trained(Scaled(lambda n, y: n.b(n.norm(y + y).relu())), torch.bfloat16)
    network = tritonnn.fuse(model)
    assert_right(network, model, image(2, 4, 5, 5, dtype=torch.bfloat16))
    [norm] = layers(network, FusedNorm)
    assert norm.scale.dtype == tritonnn.fuse(model).half().get_submodule("network.b").first.scale.dtype == torch.float32
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.zeros(8, 5, 5))


def test_a_product_of_other_shapes_is_pytorchs():
    model = trained(Net(lambda n, x: n.b(x).sigmoid() * n.a(x)), torch.float64)
    network, x = tritonnn.fuse(model), image(2, 4, 3, 3, dtype=torch.float64)
    assert_right(network, model, x)
    [fallbacks] = network.report.fallbacks.values()
    assert list(fallbacks) == ["no product of an image and gates of its type"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 96), (130, 33), (3, 1000), (2, 5000)], ids=str)
def test_layer_norm(shape, dtype):
    x = torch.randn(shape, device=DEVICE).to(dtype) * 3 + 100
    weight, bias = (torch.randn(shape[1], device=DEVICE).to(dtype) for _ in range(2))
    for parameters in ((weight, bias), (weight, None), (None, None)):
        exact = F.layer_norm(x.double(), shape[1:], *[p if p is None else p.double() for p in parameters], 1e-5)
        pytorch = F.layer_norm(x, shape[1:], *parameters, 1e-5)
        y = layer_norm(x, *parameters, 1e-5)
        error, limit = (y - exact).abs().max(), (pytorch - exact).abs().max()
        assert y.dtype == dtype and error <= 2 * limit + TOLERANCE[dtype]


def test_layer_norm_of_numbers_that_are_none():
    x = torch.randn(3, 8, device=DEVICE)
    x[0, 3], x[1, 2] = float("nan"), float("inf")
    y, pytorch = layer_norm(x, None, None, 1e-5), F.layer_norm(x, (8,))
    torch.testing.assert_close(y, pytorch, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 16, 4, 4), (1, 24, 1, 1), (2, 1, 8, 8), (2, 40, 9, 1)], ids=str)
def test_gate(shape, dtype):
    gates = image(*shape[:2], 1, 1, dtype=dtype)
    for channels_last in (False, True):
        x = image(*shape, dtype=dtype, channels_last=channels_last)
        y = scaled_image(x, gates, None, "none")
        assert torch.equal(y, x * gates) and y.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 8, 2, 8), (3, 37, 5, 19), (2, 300, 70, 290), (5, 1, 1, 1)], ids=str)
def test_excitation(sizes, dtype):
    n, c, s, k = sizes
    x, first, last = image(n, c, 1, 1, dtype=dtype), image(s, c, dtype=dtype) / c**0.5, image(k, s, dtype=dtype)
    double = torch.float64 if dtype == torch.float64 else torch.float32
    bias1, bias2 = image(s, dtype=double), image(k, dtype=double)
    for biases in ((bias1, bias2), (None, bias2), (None, None)):
        added = [0 if b is None else b.double() for b in biases]
        inner = F.silu(x.double().flatten(1) @ first.double().T + added[0]).to(dtype).double()
        exact = (inner @ last.double().T + added[1]).sigmoid()
        y = excitation(x, first, biases[0], last, biases[1], "silu", 0.0, "sigmoid", 0.0)
        assert y.shape == (n, k, 1, 1) and y.dtype == dtype
        assert (y.flatten(1) - exact).abs().max() <= {torch.bfloat16: 2**-8}.get(dtype, TOLERANCE[dtype])


def test_products_of_squeeze_and_excitation_are_one():
    model = trained(Scaled(lambda n, y: n.gates(y) * y), torch.float32)
    network = tritonnn.fuse(model)
    assert_right(network, model, image(3, 4, 6, 5))
    assert (
        len(layers(network, FusedExcitation)) == 1
        and network.report.fused["excite"] == "conv2d + relu + conv2d + sigmoid"
    )
    model = trained(Scaled(lambda n, y: n.excite(n.squeeze(y).relu()).sigmoid() * y), torch.float32)
    assert not layers(tritonnn.fuse(model), FusedExcitation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_scaled_and_shifted_channels(channels_last, dtype):
    x, scale, shift = image(3, 24, 5, 7, dtype=dtype, channels_last=channels_last), image(24), image(24)
    scale, shift = (t.to(torch.float64) if dtype == torch.float64 else t for t in (scale, shift))
    for part in (x, x[:, 8:16]) if channels_last else (x,):
        factors = [t[: part.shape[1], None, None] for t in (scale, shift)]
        y, exact = scaled_image(part, *[t.flatten() for t in factors], "relu"), part.double() * factors[0] + factors[1]
        assert y.shape == part.shape and y.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        torch.testing.assert_close(y, exact.relu().to(dtype))


def test_layers_fall_back_where_no_kernel_takes_their_input():
    norm = FusedLayerNorm((3, 4)).to(DEVICE)
    x = torch.randn(2, 3, 4, device=DEVICE)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (3, 4)))
    assert list(norm.fallbacks) == ["normalized_shape"]
