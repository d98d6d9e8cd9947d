import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.compare import DEVICE, image, network
from torch import nn

import tritonnn


def test_all_kinds():
    model = network().eval()
    x = image(2, 3, 8, 8)
    expected = model(x)
    report = tritonnn.swap(model, strict=True)
    kinds = ["conv2d", "batch_norm2d", "relu", "max_pool2d", "avg_pool2d", "avg_pool2d", "linear"]
    assert list(report.swapped.values()) == kinds
    assert report.stayed == {"6": "no Triton layer for Flatten"}
    torch.testing.assert_close(model(x), expected)
    assert not report.fallbacks
    assert "1 conv2d" in str(report) and "2 avg_pool2d" in str(report)


@pytest.mark.parametrize("kind", tritonnn.KINDS)
def test_one_kind(kind):
    model = network()
    report = tritonnn.swap(model, kind)
    assert set(report.swapped.values()) == {kind}
    triton = [name for name, m in model.named_modules() if type(m).__name__.startswith("Triton")]
    assert triton == list(report.swapped)
    assert all(tritonnn.kind_of(model.get_submodule(name)) == kind for name in triton)
    others = set(report.stayed.values()) - {"no Triton layer for Flatten"}
    assert others == {f"{other} was not asked for" for other in tritonnn.KINDS if other != kind}


def test_several_kinds_one_after_the_other():
    model = network()
    tritonnn.swap(model, ["conv2d", "linear"])
    report = tritonnn.swap(model, "relu")
    assert report.swapped == {"2": "relu"}
    assert "0" not in report.stayed
    tritonnn.restore(model)
    assert not [m for m in model.modules() if type(m).__name__.startswith("Triton")]


def strictness(model: nn.Module) -> dict[str, bool]:
    """Whether the convolution, the ReLU and the linear layer are strict, by their kinds."""
    return {tritonnn.kind_of(model[i]): model[i].strict for i in (0, 2, 7)}


def test_strict_applies_to_layers_swapped_before():
    layer = nn.Conv2d(2, 2, 1, dtype=torch.complex64, device=DEVICE)
    x = torch.zeros(1, 2, 2, 2, dtype=torch.complex64, device=DEVICE)
    tritonnn.swap(layer)
    layer(x)
    report = tritonnn.swap(layer, strict=True)
    assert not report.swapped
    with pytest.raises(RuntimeError, match=r"TritonConv2d\(strict=True\) has no kernel for this call: dtype"):
        layer(x)
    tritonnn.swap(layer, strict=False)
    layer(x)


def test_strict_applies_to_the_kinds_asked_for():
    model = network()
    tritonnn.swap(model, ["conv2d", "relu"])
    tritonnn.swap(model, ["relu", "linear"], strict=True)
    assert strictness(model) == {"conv2d": False, "relu": True, "linear": True}
    tritonnn.swap(model, "linear")
    assert strictness(model) == {"conv2d": False, "relu": True, "linear": False}


def test_strict_applies_to_a_layer_whose_class_has_been_derived_from():
    layer = nn.Linear(4, 3)
    tritonnn.swap(layer)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    tritonnn.swap(layer, strict=True)
    assert layer.strict


def test_strict_leaves_layers_built_as_triton_layers_alone():
    model = nn.Sequential(tritonnn.TritonReLU(), nn.ReLU())
    tritonnn.swap(model)
    tritonnn.swap(model, strict=True)
    assert [layer.strict for layer in model] == [False, True]


@pytest.mark.parametrize("strict", [False, True])
def test_swapped_restores_how_strict_layers_were(strict):
    model = network()
    tritonnn.swap(model, ["conv2d", "relu"], strict=strict)
    with tritonnn.swapped(model, strict=not strict):
        assert set(strictness(model).values()) == {not strict}
        tritonnn.restore(model[2])
    assert model[0].strict is strict
    assert type(model[2]) is nn.ReLU and "strict" not in model[2].__dict__


@pytest.mark.parametrize("change", [tritonnn.swap, tritonnn.fuse])
@pytest.mark.parametrize(
    ("model", "message"),
    [(None, "got NoneType"), (nn.Conv2d, "got the class Conv2d"), ([nn.ReLU()], "got list"), ("resnet18", "got str")],
)
def test_what_is_no_module(change, model, message):
    with pytest.raises(TypeError, match=f"expected a torch.nn.Module, {message}"):
        change(model)


def test_unknown_kind_lists_the_kinds_and_changes_nothing():
    model = network()
    with pytest.raises(ValueError, match=r"unknown layer kind 'conv3d': choose from avg_pool2d, .*, relu, all"):
        tritonnn.swap(model, ["conv2d", "conv3d"])
    assert type(model[0]) is nn.Conv2d


def test_restore_leaves_nothing_behind():
    model = network()
    modules = list(model.modules())
    attributes = [set(m.__dict__) for m in modules]
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    tritonnn.swap(model, strict=True)
    model(image(2, 3, 8, 8))
    tritonnn.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in network().modules()]
    assert all(a is b for a, b in zip(model.modules(), modules))
    assert [set(m.__dict__) for m in modules] == attributes
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters


def test_layers_built_as_triton_layers_stay():
    model = nn.Sequential(tritonnn.TritonReLU(), nn.ReLU())
    report = tritonnn.swap(model)
    assert report.swapped == {"1": "relu"} and not report.stayed
    tritonnn.restore(model)
    assert [type(m) for m in model] == [tritonnn.TritonReLU, nn.ReLU]


def test_swapped_restores_on_exit_and_on_error():
    model = network()
    tritonnn.swap(model, "relu")
    with tritonnn.swapped(model, "conv2d") as report:
        assert report.swapped == {"0": "conv2d"}
        assert type(model[0]) is tritonnn.TritonConv2d
    assert type(model[0]) is nn.Conv2d
    assert type(model[2]) is tritonnn.TritonReLU
    with pytest.raises(KeyError), tritonnn.swapped(model):
        raise KeyError
    assert type(model[0]) is nn.Conv2d


def test_subclass_stays_and_the_report_says_why():
    class MyConv2d(nn.Conv2d):
        pass

    report = tritonnn.swap(nn.Sequential(MyConv2d(3, 4, 1)))
    assert report.stayed == {"0": "MyConv2d is a subclass of Conv2d, with behaviour of its own"}
    assert "stayed PyTorch: 0: MyConv2d is a subclass of Conv2d" in str(report)
    of_the_same_name = type("Linear", (nn.Linear,), {"__module__": "timm.layers.linear"})
    (reason,) = tritonnn.swap(of_the_same_name(3, 4)).stayed.values()
    assert reason == "timm.layers.linear.Linear is a subclass of Linear, with behaviour of its own"


def test_equal_reasons_are_told_once_and_what_does_nothing_not_at_all():
    model = nn.Sequential(*(nn.Tanh() for _ in range(5)), nn.Identity(), nn.Dropout(), nn.Dropout2d(), nn.GELU())
    assert list(tritonnn.swap(model).stayed) == list("01234678")  # in training, dropout does something
    report = tritonnn.swap(model.eval())
    assert list(report.stayed) == list("012348")
    assert [line for line in str(report).splitlines() if line.startswith("stayed")] == [
        "stayed PyTorch: 0, 1, 2 and 2 more: no Triton layer for Tanh",
        "stayed PyTorch: 8: no Triton layer for GELU",
    ]


def test_the_model_itself_and_a_shared_module():
    layer = nn.ReLU()
    assert tritonnn.swap(layer).swapped == {"": "relu"}
    assert type(layer) is tritonnn.TritonReLU
    tritonnn.restore(layer)
    shared = nn.Sequential(layer, nn.Flatten(), layer)
    tritonnn.swap(shared)
    assert shared[0] is shared[2] and type(shared[2]) is tritonnn.TritonReLU


@pytest.mark.parametrize("recorded", [False, True])
def test_inputs_by_name(recorded):
    pytorch = network()
    swapped = copy.deepcopy(pytorch)
    tritonnn.swap(swapped)
    expected = actual = image(4, 3, 8, 8)
    with torch.set_grad_enabled(recorded):
        for theirs, ours in zip(pytorch, swapped):
            expected, actual = theirs(input=expected), ours(input=actual)
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_hooks_and_checkpoints_do_not_notice():
    model = network()
    before = copy.deepcopy(model.state_dict())
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    tritonnn.swap(model)
    assert list(model.state_dict()) == list(before)
    model.load_state_dict(before, strict=True)
    network().load_state_dict(model.state_dict(), strict=True)
    model(image(2, 3, 8, 8))
    assert calls == [1]


def test_copies_of_a_swapped_model():
    model = network().eval()
    tritonnn.swap(model)
    x = image(2, 3, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is tritonnn.TritonConv2d
        assert torch.equal(twin(x), model(x))
        tritonnn.restore(twin)
        assert type(twin[0]) is nn.Conv2d and type(model[0]) is tritonnn.TritonConv2d


def test_swapped_network_trains_like_pytorch():
    torch.manual_seed(0)
    models = [network()]
    models.append(copy.deepcopy(models[0]))
    tritonnn.swap(models[1], strict=True)
    images, labels = image(8, 3, 8, 8), torch.arange(8, device=DEVICE) % 4
    losses = [[], []]
    for model, curve in zip(models, losses):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)


def test_fallbacks_are_reported():
    layer = nn.Conv2d(2, 2, 1, dtype=torch.complex64, device=DEVICE)
    report = tritonnn.swap(layer)
    layer(torch.zeros(1, 2, 2, 2, dtype=torch.complex64, device=DEVICE))
    assert report.fallbacks == {"": {"dtype torch.complex64": 1}}
    assert "fell back to PyTorch: (the model): dtype torch.complex64 (1 calls)" in str(report)


def test_cpu_tensor_without_the_interpreter_is_a_clear_error():
    code = "import torch, tritonnn; tritonnn.TritonReLU()(torch.zeros(1))"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "RuntimeError: tritonnn: CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1" in run.stderr
