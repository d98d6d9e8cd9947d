"""How far a trained network and each of its layers are off float64 in strict float32, with both kinds of layers.

    python benchmarks/float32_errors.py >> benchmarks/results/<gpu>/float32_errors.md

ResNet18 learns for a moment to tell noisy patterns apart, so that its weights are no random ones. "error" is the root
mean square relative to the output's; "share" the part of the output that the error is: what truncation takes of every
sum, and what adds up from layer to layer, as chance does not.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tritonnn  # noqa: E402
from lit_modules.resnet import ResNet18  # noqa: E402
from tritonnn import kind_of  # noqa: E402
from tritonnn.ops.conv2d import pack  # noqa: E402
from tritonnn.runtime.launch_plan import forget_plans  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = ("conv2d", "batch_norm2d", "avg_pool2d", "linear")
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def trained(width: int, steps: int) -> tuple[nn.Module, Iterator[tuple[Tensor, Tensor]]]:
    """The network in eval mode, and batches of 1,000 images (without a GPU 4) such as it has not seen."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    patterns = torch.randn(10, 3, 8, 8, device=DEVICE, generator=generator)

    def batches(size: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            labels = torch.randint(10, (size,), device=DEVICE, generator=generator)
            noise = torch.randn(size, 3, 32, 32, device=DEVICE, generator=generator)
            yield interpolate(patterns[labels], size=32, mode="bilinear") + 1.5 * noise, labels

    torch.manual_seed(0)
    network = ResNet18(width=width).to(DEVICE)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.3)
    for _, (images, labels) in zip(range(steps), batches(256 if DEVICE.type == "cuda" else 8)):
        loss = cross_entropy(network(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval(), batches(1000 if DEVICE.type == "cuda" else 4)


def error_and_share(y: Tensor, exact: Tensor) -> tuple[float, float]:
    difference, squares = y.double() - exact, exact.square().sum()
    return float((difference.square().sum() / squares).sqrt()), float((difference * exact).sum() / squares)


def cells(y: Tensor, exact: Tensor) -> str:
    error, share = error_and_share(y, exact)
    return f"{error:.2e} | {share:+.1e}"


def networks(network: nn.Module, images: Tensor, exact: Tensor) -> Iterator[str]:
    def row(name: str, other: nn.Module) -> str:
        y = other(images)
        return f"| {name} | {(y.double() - exact).abs().mean():.2e} | {cells(y, exact)} |"

    yield row("PyTorch", network)
    kept = pack.TRUNCATED, pack.TRUNCATED_ALONE
    for share, alone in ((0.0, 0.0), kept):
        pack.TRUNCATED, pack.TRUNCATED_ALONE = share, alone
        forget_plans()
        given_back = f"truncated share {share:.1e} given back"
        for kinds in ("conv2d", "all"):
            swapped = copy.deepcopy(network)
            tritonnn.swap(swapped, kinds)
            yield row(f"Triton {kinds}, {given_back}", swapped)
        yield row(f"fused, {given_back}", tritonnn.fuse(network))
    for kind in KINDS[1:]:
        swapped = copy.deepcopy(network)
        tritonnn.swap(swapped, kind)
        yield row(f"Triton {kind}", swapped)


def layers(network: nn.Module, in_float64: nn.Module, images: Tensor, memory_format: torch.memory_format) -> Iterator:
    """Each on the input that it has in float64, rounded."""
    inputs: dict[str, Tensor] = {}
    for name, layer in in_float64.named_modules():
        if kind_of(layer) in KINDS:
            layer.register_forward_hook(lambda layer, args, y, name=name: inputs.update({name: args[0]}))
    in_float64(images.double())
    for name, x in inputs.items():
        x = x.float().contiguous(memory_format=memory_format) if x.dim() == 4 else x.float()
        layer, exact = network.get_submodule(name), in_float64.get_submodule(name)(x.double())
        swapped = nn.Sequential(copy.deepcopy(layer))
        tritonnn.swap(swapped)
        yield f"| {name} | {'x'.join(map(str, x.shape))} | {cells(layer(x), exact)} | {cells(swapped(x), exact)} |"


@torch.inference_mode()
def report(network: nn.Module, images: Tensor) -> None:
    in_float64 = copy.deepcopy(network).double()
    exact = in_float64(images.double())
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "a CPU (Triton's interpreter)"
    print(f"On {name}, torch {torch.__version__}, strict float32, {len(images):,} images.")
    for format_name, memory_format in FORMATS.items():
        there, x = (
            copy.deepcopy(network).to(memory_format=memory_format),
            images.contiguous(memory_format=memory_format),
        )
        print(f"\n{format_name}:\n\n| network | mean error | error | share |\n|---|--:|--:|--:|", flush=True)
        for line in networks(there, x, exact):
            print(line, flush=True)
        print("\n| layer | input | PyTorch: error | share | Triton: error | share |\n|---|---|--:|--:|--:|--:|")
        for line in layers(there, copy.deepcopy(in_float64), images, memory_format):
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage; 64")
    parser.add_argument("--steps", type=int, default=150, help="of the training; 150")
    args = parser.parse_args()
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = True
    network, batches = trained(args.width, args.steps)
    report(network, next(batches)[0])


if __name__ == "__main__":
    main()
