"""Checkpoints, copies, parametrizations and hooks see no difference between PyTorch's layers and the swapped ones."""

import io

import pytest
import torch
from helpers.compare import network
from helpers.twins import assert_same, images, twins
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tritonnn

# Checkpoints and copies


def test_state_dict_both_ways():
    pytorch, swapped = twins()
    fresh_pytorch, fresh_swapped = twins()
    fresh_pytorch.load_state_dict(swapped.state_dict(), strict=True)
    fresh_swapped.load_state_dict(pytorch.state_dict(), strict=True)
    assert list(swapped.state_dict()) == list(pytorch.state_dict())
    x = images()
    for model in (swapped, fresh_pytorch, fresh_swapped):
        assert_same(model(x), pytorch(x))


@pytest.mark.parametrize("weights_only", [False, True])
def test_torch_save_of_the_model(weights_only):
    _, swapped = twins()
    file = io.BytesIO()
    torch.save(swapped, file)
    file.seek(0)
    classes = [type(m) for m in swapped.modules()] + [set]
    with torch.serialization.safe_globals(classes):
        loaded = torch.load(file, weights_only=weights_only)
    x = images()
    assert type(loaded[0]) is tritonnn.TritonConv2d
    assert torch.equal(loaded(x), swapped(x))
    tritonnn.restore(loaded)
    assert type(loaded[0]) is nn.Conv2d


def test_an_old_checkpoint_without_num_batches_tracked():
    pytorch, swapped = twins()
    checkpoint = {name: 1.5 * t for name, t in pytorch.state_dict().items() if "num_batches" not in name}
    for model in (pytorch, swapped):
        model.load_state_dict(checkpoint, strict=True)
    assert_same(swapped.state_dict(), pytorch.state_dict())


# What changes a layer's parameters or its class


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_parametrize_a_swapped_layer():
    pytorch, swapped = twins()
    x = images()
    for model in (pytorch, swapped):
        parametrize.register_parametrization(model[0], "weight", Doubled())
    expected = pytorch(x)
    assert_same(swapped(x), expected)
    tritonnn.restore(swapped)
    assert type(swapped[0]).__name__ == "ParametrizedConv2d" and not isinstance(swapped[0], tritonnn.TritonConv2d)
    assert_same(swapped(x), expected)
    parametrize.remove_parametrizations(swapped[0], "weight")
    assert type(swapped[0]) is nn.Conv2d
    assert_same(swapped(x), expected)


def test_a_parametrized_layer_stays_and_the_report_says_why():
    model = network()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    report = tritonnn.swap(model)
    assert report.stayed["0"] == "ParametrizedConv2d is a subclass of Conv2d, with behaviour of its own"
    assert "1 linear" in str(report) and "conv2d," not in str(report).splitlines()[0]


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weight_norms(norm):
    pytorch, swapped = twins()
    torch.manual_seed(0)
    norm(pytorch[7])
    torch.manual_seed(0)
    norm(swapped[7])
    x = images()
    assert_same(swapped(x), pytorch(x))
    swapped(x).sum().backward()
    pytorch(x).sum().backward()
    assert_same([p.grad for p in swapped.parameters()], [p.grad for p in pytorch.parameters()])


def test_pruning():
    pytorch, swapped = twins()
    x = images()
    for model in (pytorch, swapped):
        prune.l1_unstructured(model[0], "weight", amount=0.5)
        prune.ln_structured(model[7], "weight", amount=0.5, n=2, dim=0)
    assert_same(swapped(x), pytorch(x))
    for model in (pytorch, swapped):
        prune.remove(model[0], "weight")
        model.train()(x).sum().backward()
    assert (swapped[0].weight == 0).sum() == swapped[0].weight.numel() // 2
    assert_same([p.grad for p in swapped.parameters()], [p.grad for p in pytorch.parameters()])


def test_fuse_conv_bn_eval():
    pytorch, swapped = twins()
    fused = nn.utils.fuse_conv_bn_eval(swapped[0], swapped[1])
    assert type(fused) is tritonnn.TritonConv2d
    x = images()
    assert_same(fused(x), pytorch[1](pytorch[0](x)))


def test_convert_sync_batchnorm_before_and_after_the_swap():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    report = tritonnn.swap(model)
    assert report.stayed["1"] == "no Triton layer for SyncBatchNorm"
    model = network()
    before = tritonnn.swap(model)
    assert before.swapped["1"] == "batch_norm2d"
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm
    tritonnn.restore(model)
    assert [type(m) for m in model[:3]] == [nn.Conv2d, nn.SyncBatchNorm, nn.ReLU]


# Hooks


def test_forward_hooks():
    pytorch, swapped = twins()
    x = images()
    seen = []
    for model in (pytorch, swapped):
        outputs = []
        for layer in model:
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.5,))
            layer.register_forward_hook(lambda _, inputs, output, outputs=outputs: outputs.append(output.clone()))
        model[3].register_forward_hook(lambda _, inputs, output: output + 1)
        outputs.append(model(x))
        seen.append(outputs)
    assert len(seen[0]) == len(pytorch) + 1
    assert_same(seen[1], seen[0])


def test_backward_hooks():
    x = images()
    seen = []
    for model in twins(training=True):
        model[2].inplace = False  # PyTorch: a full backward hook and an in-place layer exclude each other
        gradients = []
        for layer in model:
            layer.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 0.5,))
            layer.register_full_backward_hook(
                lambda _, grads_in, grads_out, g=gradients: g.append((grads_in, grads_out))
            )
        model[0].weight.register_hook(lambda grad, g=gradients: g.append(grad))
        model[1].bias.register_post_accumulate_grad_hook(lambda p, g=gradients: g.append(p.grad))
        model(x.requires_grad_()).square().sum().backward()
        seen.append(gradients)
    assert len(seen[0]) == len(model) + 2
    assert_same(seen[1], seen[0])


def test_in_place_relu_under_a_full_backward_hook_is_pytorchs_error():
    errors = []
    for model in twins(training=True):
        model[2].register_full_backward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace") as error:
            model(images())
        errors.append(str(error.value))
    assert errors[0] == errors[1]
