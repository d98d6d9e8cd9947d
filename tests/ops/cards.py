"""What dispatch would launch on cards that this machine need not have, compiled and compared with their limits.

    python tests/ops/cards.py                        # all of it, some minutes: a line for each card
    python tests/ops/cards.py --cards 8.6 --every 9  # one in nine of the kernels for one card

ResNet18, ResNet50 and MobileNetV2 at 224x224 and ResNet18 at 32x32, in batches of 1, 8, 64 and 1,024 images and four
precisions, with what the other operations launch for them. Of launches that differ in sizes only, one is compiled.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torchvision  # noqa: E402
from helpers.hopper import run  # noqa: E402
from torch import nn  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from lit_modules.resnet import ResNet18  # noqa: E402
from tritonnn.ops import (  # noqa: E402
    avg_pool2d,
    avg_pool2d_backward,
    batch_norm2d,
    batch_norm2d_relu,
    max_pool2d,
    max_pool2d_backward,
    relu,
    relu_backward,
)
from tritonnn.ops.conv2d import dispatch  # noqa: E402
from tritonnn.ops.conv2d.backward.input import run as run_input  # noqa: E402
from tritonnn.ops.conv2d.backward.weight_dispatch import run_weight  # noqa: E402
from tritonnn.ops.conv2d.epilogue import Epilogue  # noqa: E402
from tritonnn.ops.conv2d.problem import Product  # noqa: E402
from tritonnn.runtime import hardware  # noqa: E402
from tritonnn.runtime.hardware import Gpu  # noqa: E402


class Card(NamedTuple):
    """What it is called, and as what Triton and the library see it."""

    name: str
    target: GPUTarget
    gpu: Gpu


CARDS = {
    name: Card(
        what, GPUTarget("cuda", int(name.replace(".", "")), 32), Gpu(tuple(map(int, name.split("."))), count, 1024 * kb)
    )
    for name, what, count, kb in (
        ("8.0", "A100", 108, 163),
        ("8.6", "RTX 3090", 82, 99),
        ("8.9", "RTX 4090", 128, 99),
        ("9.0", "H100", 132, 227),
        ("10.0", "B200", 148, 227),
        ("12.0", "RTX 5090", 170, 99),
    )
    for major, minor in [tuple(map(int, name.split(".")))]
} | {"gfx942": Card("MI300X", GPUTarget("hip", "gfx942", 64), Gpu((0, 0), 304, 64 * 1024))}
BATCHES = 1, 8, 64, 1024
PRECISIONS = {
    "bfloat16": (torch.bfloat16, "ieee", False),
    "TF32": (torch.float32, "tf32", True),
    "strict float32": (torch.float32, "tf32x3", False),
    "float32 without tensor cores": (torch.float32, "ieee", False),
}
AMD_PRECISIONS = "bfloat16", "float32 without tensor cores"


class Pose:
    """What Triton asks of the driver of a machine with such a card."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launches:
    """Compiles, in place of launching, what was not compiled before but for its sizes; one in `every` of that."""

    def __init__(self, every: int) -> None:
        self.every, self.seen, self.compiled, self.failed = every, set(), [], []

    def __call__(self, kernel: JITFunction, *args, grid: tuple[int, ...], warmup: bool, **constants):
        named = dict(zip(kernel.arg_names, args)) | constants
        kind = (
            kernel.__name__,
            *(kind_of(name, value) for name, value in sorted(named.items(), key=lambda item: item[0])),
        )
        if kind in self.seen:
            return
        self.seen.add(kind)
        if len(self.seen) % self.every:
            return
        words = f"{kernel.__name__} {' '.join(f'{n}={v}' for n, v in named.items() if n.isupper() and type(v) is int)}"
        try:
            compiled = RUN(kernel, *args, grid=grid, warmup=True, **constants)
            self.compiled.append((compiled.metadata.shared, words))
        except Exception as error:  # whatever the compiler says
            self.failed.append(f"{words}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")


RUN = JITFunction.run
COUNTS = ("BLOCK", "TILE", "SPLITS", "SLICES", "X_SLOTS", "W_SLOTS", "STAGED", "IN_SLOT", "SWAP_AB", "HAS_", "num_")
COUNTS += ("INPUT_PRECISION", "ROUND_X", "SPAN_TAPS", "CHANNELS_LAST", "RETURN_INDICES", "STRIDE")
"""Arguments that decide how much memory a kernel takes, by how their names begin."""


def kind_of(name: str, value: object) -> object:
    """What of an argument decides how much memory a kernel takes: nothing of the sizes of images and channels."""
    if isinstance(value, torch.Tensor):
        return name, str(value.dtype)
    if hasattr(value, "block_shape"):
        return name, str(value.base.dtype), tuple(value.block_shape)
    return (name, str(value)) if name.startswith(COUNTS) else (name,)


def convolutions() -> Iterator[tuple]:
    """(C, H, W, K, kernel size, stride, padding, groups) of all convolutions and linear layers, each once."""
    networks = [(getattr(torchvision.models, name), 224) for name in ("resnet18", "resnet50", "mobilenet_v2")]
    seen: dict[tuple, None] = {}

    def note(module: nn.Module, args: tuple, y: torch.Tensor) -> None:
        if isinstance(module, nn.Linear):
            seen[module.in_features, 1, 1, module.out_features, (1, 1), (1, 1), (0, 0), 1] = None
        else:
            window = module.kernel_size, module.stride, module.padding
            seen[(*args[0].shape[1:], module.out_channels, *window, module.groups)] = None

    with torch.device("meta"):
        for network, size in [*networks, (ResNet18, 32)]:
            model = network()
            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.register_forward_hook(note)
            model(torch.empty(1, 3, size, size))
    yield from sorted(seen, key=lambda shape: -shape[0] // shape[7] * math.prod(shape[4]))  # long reductions take most


def channels_last(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that nobody touches is none."""
    return torch.empty(sizes, dtype=dtype, memory_format=torch.channels_last)


def convolve(shapes: list[tuple], precisions: dict[str, tuple]) -> None:
    for c, h, w, k, (r, s), stride, padding, groups in shapes:
        for n in BATCHES:
            for dtype, input_precision, round_x in precisions.values():
                p, q = (h + 2 * padding[0] - r) // stride[0] + 1, (w + 2 * padding[1] - s) // stride[1] + 1
                x, y = channels_last(n, c, h, w, dtype=dtype), channels_last(n, k, p, q, dtype=dtype)
                packed = torch.empty(k * (3 if input_precision == "tf32x3" else 1), r, s, c // groups, dtype=dtype)
                floats = torch.empty(k)
                for residual in (None, y):
                    epilogue = Epilogue(floats, floats, residual, "relu", False, 0.0)
                    window = tuple(stride), tuple(padding), (1, 1)
                    product = Product(x, packed, y, True, *window, groups, input_precision, round_x, epilogue)
                    dispatch.run(product, dispatch.default_choice(product))


def operate(dtypes: tuple[torch.dtype, ...]) -> None:
    """The other operations, on the images of the networks and on some in NCHW."""
    for dtype in dtypes:
        for n in BATCHES:
            for image in (channels_last(n, 64, 112, 112, dtype=dtype), torch.empty(n, 64, 56, 56, dtype=dtype)):
                floats = torch.empty(64)
                relu._launch(image)
                max_pool2d._launch(image, (3, 3), (2, 2), (1, 1), (1, 1), False, True)
                max_pool2d._launch(image, (3, 3), (2, 2), (1, 1), (1, 1), False, False)
                avg_pool2d._launch(image, (2, 2), (2, 2), (0, 0), False, True, None)
                avg_pool2d._launch_adaptive(image, (1, 1))
                batch_norm2d._launch_training(image, floats, floats, 1e-5)
                batch_norm2d.normalize(image, floats, floats, floats, floats, 1e-5)


def differentiate(precisions: dict[str, tuple]) -> None:
    """The gradients of convolutions and of the other operations."""
    for dtype, input_precision, _ in precisions.values():
        for n in BATCHES:
            for c, k, side, size, stride in (
                (64, 64, 32, 3, 1),
                (64, 128, 56, 3, 2),
                (64, 128, 56, 1, 2),
                (3, 64, 224, 7, 2),
            ):
                padding, out = (size - 1) // 2, -(-side // stride)
                x, g = channels_last(n, c, side, side, dtype=dtype), channels_last(n, k, out, out, dtype=dtype)
                weight = channels_last(k, c, size, size, dtype=dtype)
                window = (stride, stride), (padding, padding), (1, 1)
                run_weight(g, x, weight, window, 1, input_precision)
                run_input(g, weight, x, True, window, 1, input_precision)
            image, floats = channels_last(n, 64, 56, 56, dtype=dtype), torch.empty(64)
            relu_backward._launch(image, image)
            positions = torch.empty(n, 64, 56, 56, dtype=torch.uint8)
            max_pool2d_backward._launch(image, image, (3, 3), (1, 1), (1, 1), (1, 1), False, positions)
            avg_pool2d_backward._launch(image, image, (3, 3), (1, 1), (1, 1), False, True, None)
            batch_norm2d_relu._launch(image, image, floats, floats, 1e-5)
            for y in (None, image):
                batch_norm2d_relu._launch_backward(image, image, y, *[floats] * 5, 1e-5)


def check(card: Card, every: int) -> dict:
    """How many kernels were compiled, the most memory that one takes, and what does not fit or compile."""
    launches = Launches(every)
    driver.set_active(Pose(card.target))
    hardware.gpu = lambda device: card.gpu
    JITFunction.run = lambda kernel, *args, **options: launches(kernel, *args, **options)
    amd = card.target.backend == "hip"
    precisions = {name: PRECISIONS[name] for name in AMD_PRECISIONS} if amd else PRECISIONS
    convolve(list(convolutions()), precisions)
    operate((torch.bfloat16, torch.float32))
    differentiate(precisions)
    limit = card.gpu.shared_memory
    too_large = [f"{words}: {shared} bytes of {limit}" for shared, words in launches.compiled if shared > limit]
    most = max((shared for shared, _ in launches.compiled), default=0)
    kinds, compiled = len(launches.seen), len(launches.compiled)
    return dict(kinds=kinds, compiled=compiled, most=most, limit=limit, too_large=too_large, failed=launches.failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--every", type=int, default=1, help="compile one in so many kernels")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.json:
        (name,) = options.cards
        json.dump(check(CARDS[name], options.every), sys.stdout)
        return
    for name in options.cards:  # each in a process of its own, as Triton keeps the card that it saw first
        of = run("tests/ops/cards.py", "--cards", name, "--every", str(options.every), "--json")
        wrong = of["too_large"] + of["failed"]
        memory = f"at most {of['most'] // 1024} of {of['limit'] // 1024} KB"
        kernels = f"{of['compiled']} of {of['kinds']} kernels compiled"
        print(f"{CARDS[name].name} ({name}): {kernels}, {memory}; {len(wrong)} wrong")
        print("".join(f"  {line}\n" for line in wrong), end="", flush=True)


if __name__ == "__main__":
    main()
