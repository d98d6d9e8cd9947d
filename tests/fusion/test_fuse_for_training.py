"""Networks fused for training: PyTorch's losses, gradients, buffers and checkpoints."""

import copy
import pickle

import pytest
import torch
from helpers.compare import DEVICE, image, network
from torch import nn

import tritonnn
from lit_modules.resnet import ResNet18
from tritonnn.layers.fused.batch_norm2d import BatchNormReLU2d


class Block(nn.Module):
    """A residual block in torchvision's way: one ReLU, in place, and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class TwoReaders(nn.Module):
    """What is normalised is also read before its ReLU, so that nothing may be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return y.relu() * y


class CalledTwice(nn.Module):
    """One batch norm for two inputs: its statistics are those of both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x).relu() + self.norm(2 * x).relu()


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x).relu()
        return y if y.sum() > 0 else -y


NETWORKS = {
    "ResNet18": (lambda: ResNet18(width=4, in_channels=6, num_classes=3), (2, 6, 32, 32), 17),
    "blocks of torchvision's kind": (lambda: nn.Sequential(Block(), Block()), (3, 6, 5, 4), 4),
    "a layer of every kind": (lambda: nn.Sequential(nn.Conv2d(6, 3, 1), network()), (2, 6, 8, 8), 1),
    "dropout": (
        lambda: nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.0), nn.BatchNorm2d(6), nn.ReLU()),
        (2, 6, 4, 4),
        2,
    ),
    "two readers": (TwoReaders, (2, 6, 4, 4), 0),
    "called twice": (CalledTwice, (2, 6, 4, 4), 0),
    "not traceable": (Untraceable, (2, 6, 4, 4), 0),
}
"""A network, its input, how many batch norms take what follows them."""


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_trains_like_pytorch(name, channels_last):
    """Two steps of SGD, then an evaluation; afterwards restored."""
    make, shape, expected = NETWORKS[name]
    torch.manual_seed(0)
    pytorch = make().to(DEVICE, torch.float64)
    fused = copy.deepcopy(pytorch)
    names = list(fused.state_dict())
    report = tritonnn.fuse_for_training(fused)
    assert len(report.fused) == expected, report
    assert list(fused.state_dict()) == names
    for _ in range(2):
        x = image(*shape, dtype=torch.float64, channels_last=channels_last)
        gradients = []
        for model in (pytorch, fused):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            model.zero_grad()
            model(leaf).square().mean().backward()
            gradients.append([leaf.grad, *(p.grad.clone() for p in model.parameters())])
            torch.optim.SGD(model.parameters(), 0.1).step()
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(fused.state_dict(), pytorch.state_dict(), rtol=1e-8, atol=1e-10)
    if not (channels_last and DEVICE.type == "cuda"):  # where convolutions make contiguous images of float64
        assert not report.fallbacks
    x = image(*shape, dtype=torch.float64)
    torch.testing.assert_close(fused.eval()(x), pytorch.eval()(x), rtol=1e-8, atol=1e-9)
    tritonnn.restore(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in pytorch.modules()]
    assert "forward" not in vars(fused)


def test_gradients_of_two_readers_are_added_up_by_batch_norm():
    """Two layers read each block of ResNet18 but the last; nothing else adds up images."""
    model = ResNet18(width=4, in_channels=6, num_classes=3).to(DEVICE, torch.float64)
    tritonnn.fuse_for_training(model)
    assert sum(module.twice for module in model.forward.graph.modules() if isinstance(module, BatchNormReLU2d)) == 7
    x = image(2, 6, 32, 32, dtype=torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        model(x).sum().backward()
    sums = [event for event in profile.events() if event.name in ("aten::add", "aten::add_")]
    assert sum(len(event.input_shapes[0]) == 4 for event in sums) == 1  # of the max pool's two readers


@pytest.mark.parametrize("read", [(1,), (0, 1)], ids=str)
def test_a_batch_norm_with_two_readers_to_the_second_order(read):
    """Or with two of which one is not derived."""
    layer = BatchNormReLU2d(tritonnn.TritonBatchNorm2d(3, track_running_stats=False), twice=True).to(
        DEVICE, torch.float64
    )
    tensors = [image(2, 3, 3, 2, dtype=torch.float64).requires_grad_() for _ in range(2)]

    def outputs(*tensors):
        return tuple(layer(*tensors)[i] for i in read)

    assert torch.autograd.gradcheck(outputs, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, tensors, fast_mode=True)


def test_gradients_by_transforms():
    """Two layers of the network read one batch norm's output."""
    model = nn.Sequential(Block(), Block()).to(DEVICE, torch.float64)
    pytorch = copy.deepcopy(model)
    tritonnn.fuse_for_training(model)
    x = image(2, 6, 4, 4, dtype=torch.float64)

    def gradients(net):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = module.running_mean = module.running_var = None
                module.track_running_stats = False
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        return torch.func.grad(lambda tensors: torch.func.functional_call(net, tensors, (x,)).square().sum())(
            parameters
        )

    torch.testing.assert_close(gradients(model), gradients(pytorch), rtol=1e-9, atol=1e-10)


def test_part_of_a_network_in_eval_mode_runs_its_own_code():
    model = nn.Sequential(Block(), Block()).to(DEVICE, torch.float64)
    pytorch = copy.deepcopy(model)
    tritonnn.fuse_for_training(model)
    x = image(2, 6, 4, 4, dtype=torch.float64)
    for m in (model, pytorch):
        m[0].bn1.eval()
    torch.testing.assert_close(model(x), pytorch(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.state_dict(), pytorch.state_dict(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_networks_of_their_own(copy_of):
    model = nn.Sequential(Block(), Block()).to(DEVICE, torch.float64)
    tritonnn.fuse_for_training(model)
    copied, x = copy_of(model), image(2, 6, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(copy_of(copied)(x), copy_of(model)(x))
    assert copied.forward.model is copied
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert float(copied(x).detach().abs().sum()) != float(model(x).detach().abs().sum())
    assert all(m.num_batches_tracked == 1 for net in (copied, model) for m in net.modules() if hasattr(m, "eps"))


def test_wants_training_mode():
    with pytest.raises(RuntimeError, match=r"call model.train\(\) first"):
        tritonnn.fuse_for_training(Block().eval())
