"""What dispatch would launch on cards that this machine need not have, compiled and compared with their limits.

    python tests/ops/cards.py                   # all of it, 20 minutes of a core: a line for each card
    python tests/ops/cards.py --new --write     # compiles what cards.json does not have, and brings that up to date
    python tests/ops/cards.py --every 30        # each kernel once, and one in thirty of all, as the suite does

ResNet18, ResNet50 and MobileNetV2 at 224x224 and ResNet18 at 32x32, in batches of 1, 8, 64 and 1,024 images and four
precisions, fused and swapped, with what the other operations launch for them. Launches that differ in sizes of images,
channels and filters only are one of a kind, of which one is compiled. cards.json has the kinds that were, by card, and
the bytes of shared memory of each.
"""

import argparse
import hashlib
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

from benchmarks.pose import Pose  # noqa: E402
from lit_modules.resnet import ResNet18  # noqa: E402
from tritonnn.ops import (  # noqa: E402
    avg_pool2d,
    avg_pool2d_backward,
    batch_norm2d,
    batch_norm2d_relu,
    max_pool2d,
    max_pool2d_backward,
    pooled_linear,
    relu,
    relu_backward,
)
from tritonnn.ops.conv2d import dispatch  # noqa: E402
from tritonnn.ops.conv2d.backward.input import run as run_input  # noqa: E402
from tritonnn.ops.conv2d.backward.weight_dispatch import run_weight  # noqa: E402
from tritonnn.ops.conv2d.epilogue import Epilogue  # noqa: E402
from tritonnn.ops.conv2d.op import takes_shortcut  # noqa: E402
from tritonnn.ops.conv2d.problem import Product, Shortcut  # noqa: E402
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


RECORD = Path(__file__).with_suffix(".json")


class Launches:
    """Compiles in place of launching, one of a kind: each kernel, one in `every`; or, `new`, what is not `recorded`."""

    def __init__(self, recorded: dict[str, int], every: int, new: bool) -> None:
        self.recorded, self.every, self.new = recorded, every, new
        self.memory: dict[str, tuple[int, str]] = {}
        """By kind, the bytes of shared memory, and what kernel that is."""
        self.compiled, self.failed, self.kernels = 0, [], set()

    def __call__(self, kernel: JITFunction, *args, grid: tuple[int, ...], warmup: bool, **constants):
        named = dict(zip(kernel.arg_names, args)) | constants
        described = kernel.__name__, *(kind_of(*item) for item in sorted(named.items(), key=lambda item: item[0]))
        kind = hashlib.sha1(repr(described).encode()).hexdigest()[:10]
        if kind in self.memory:
            return
        words = f"{kernel.__name__} {' '.join(f'{n}={v}' for n, v in named.items() if n.isupper() and type(v) is int)}"
        self.memory[kind] = self.recorded.get(kind, 0), words
        sampled = kernel.__name__ not in self.kernels or len(self.memory) % self.every == 0
        if kind in self.recorded if self.new else not sampled:
            return
        self.kernels.add(kernel.__name__)
        try:
            compiled = RUN(kernel, *args, grid=grid, warmup=True, **constants)
            self.compiled += 1
            self.memory[kind] = compiled.metadata.shared, words
        except Exception as error:  # whatever the compiler says
            self.failed.append(f"{words}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")


RUN = JITFunction.run
SIZES = {"N", "M", "H", "W", "P", "Q", "C", "K", "R", "S", "PIXELS", "SHORTCUT_C", "SLOPE"}
SIZES |= {f"{name}_{axis}" for name in ("PADDING", "DILATION", "STRIDE", "SHORTCUT_STRIDE") for axis in "HW"}
"""Constants of a kernel that are sizes of images, channels and filters: they decide how often it does what it does."""
SIZES |= {"HAS_SCALE", "HAS_BIAS", "ACTIVATION"}
"""Steps of the epilogue that take no shared memory tell no kernels apart: the first one met, the fused, is compiled."""


def kind_of(name: str, value: object) -> object:
    """All of an argument but sizes: types, boxes, block sizes and every flag."""
    if isinstance(value, torch.Tensor):
        return name, str(value.dtype)
    if hasattr(value, "block_shape"):
        return name, str(value.base.dtype), tuple(value.block_shape)
    if value is None or not name[0].isupper() and name not in ("num_warps", "num_stages"):
        return name, value is None
    if name == "GROUPS":
        return name, value > 1
    return (name,) if name in SIZES else (name, str(value))


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
    """Fused, with the epilogues of the networks; swapped, in both memory formats; with a shortcut of few pixels."""
    for c, h, w, k, (r, s), stride, padding, groups in shapes:
        for n in BATCHES:
            for dtype, input_precision, round_x in precisions.values():
                p, q = (h + 2 * padding[0] - r) // stride[0] + 1, (w + 2 * padding[1] - s) // stride[1] + 1
                x, y = channels_last(n, c, h, w, dtype=dtype), channels_last(n, k, p, q, dtype=dtype)
                parts = 3 if input_precision == "tf32x3" else 1
                packed, floats = torch.empty(k * parts, r, s, c // groups, dtype=dtype), torch.empty(k)
                window = tuple(stride), tuple(padding), (1, 1)
                product = Product(x, packed, y, True, *window, groups, input_precision, round_x, Epilogue())
                fused = [Epilogue(floats, floats, residual, "relu", False, 0.0) for residual in (None, y)]
                nchw = torch.empty(n, c, h, w, dtype=dtype), torch.empty(n, k, p, q, dtype=dtype), False
                cases = [product._replace(epilogue=epilogue) for epilogue in fused]
                cases += [product, product._replace(x=nchw[0], y=nchw[1], channels_last_y=nchw[2])]
                for case in cases:
                    dispatch.run(case, dispatch.default_choice(case))
                if groups == 1 and stride[0] == 1 and takes_shortcut(x, k, (r, s), p, q, c):
                    before = channels_last(n, c, 2 * p, 2 * q, dtype=dtype)
                    of_one_tap = torch.empty(k * parts, 1, 1, c, dtype=dtype)[-k:]
                    second = before, of_one_tap, floats, floats, (2, 2), input_precision, round_x
                    case = cases[0]._replace(shortcut=Shortcut(*second))
                    dispatch.run(case, dispatch.default_choice(case))


def operate(dtypes: tuple[torch.dtype, ...]) -> None:
    """The other operations, on the images of the networks, in both memory formats."""
    for dtype in dtypes:
        for n in BATCHES:
            last = torch.empty(n, 512, 7, 7, dtype=dtype)
            pooled_linear._launch(last, torch.empty(1000, 512, dtype=dtype), torch.empty(1000, dtype=dtype))
            pooled_linear._launch(last, torch.empty(10, 512, dtype=dtype), None)
            for image in (
                channels_last(n, 64, 112, 112, dtype=dtype),
                torch.empty(n, 64, 112, 112, dtype=dtype),
                channels_last(n, 512, 7, 7, dtype=dtype),
                torch.empty(n, 512, 7, 7, dtype=dtype),
            ):
                floats = torch.empty(image.shape[1])
                relu._launch(image)
                max_pool2d._launch(image, (3, 3), (2, 2), (1, 1), (1, 1), False, True)
                max_pool2d._launch(image, (3, 3), (2, 2), (1, 1), (1, 1), False, False)
                avg_pool2d._launch(image, (2, 2), (2, 2), (0, 0), False, True, None)
                avg_pool2d._launch_adaptive(image, (1, 1))
                batch_norm2d._launch_training(image, floats, floats, 1e-5)
                batch_norm2d.launch_update(floats, floats, floats, floats, 0.1, 8)
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
            for second, y in ((None, None), (None, image), (image, image)):
                batch_norm2d_relu._launch_backward(image, second, image, y, *[floats] * 5, 1e-5)


def check(card: Card, recorded: dict[str, int], every: int = 1, new: bool = False) -> dict:
    """The kinds with their memory, how many were compiled, of which kernels, and what does not fit or compile."""
    launches = Launches(recorded, every, new)
    driver.set_active(Pose(card.target))
    hardware.gpu = lambda device: card.gpu
    JITFunction.run = lambda kernel, *args, **options: launches(kernel, *args, **options)
    amd = card.target.backend == "hip"
    precisions = {name: PRECISIONS[name] for name in AMD_PRECISIONS} if amd else PRECISIONS
    convolve(list(convolutions()), precisions)
    operate((torch.bfloat16, torch.float32))
    differentiate(precisions)
    limit = card.gpu.shared_memory
    too_large = [f"{words}: {shared} bytes of {limit}" for shared, words in launches.memory.values() if shared > limit]
    memory = {kind: shared for kind, (shared, _) in launches.memory.items()}
    wrong = dict(too_large=too_large, failed=launches.failed)
    return dict(memory=memory, compiled=launches.compiled, limit=limit, kernels=sorted(launches.kernels), **wrong)


def recorded() -> dict[str, dict[str, int]]:
    """By card, the kinds that were compiled for it, and the bytes of shared memory of each."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--new", action="store_true", help="leave out what cards.json has")
    parser.add_argument(
        "--every", type=int, default=1, help="compile each kernel once, and one in so many of the kinds"
    )
    parser.add_argument("--write", action="store_true", help="write cards.json")
    parser.add_argument("--json", action="store_true", help="print all that was found, of one card")
    options = parser.parse_args()
    if options.json:
        (name,) = options.cards
        json.dump(check(CARDS[name], recorded().get(name, {}), options.every, options.new), sys.stdout)
        return
    for name in options.cards:  # each in a process of its own, as Triton keeps the card that it saw first
        new = ["--new"] if options.new else []
        of = run("tests/ops/cards.py", "--cards", name, "--every", str(options.every), "--json", *new)
        wrong, memory = of["too_large"] + of["failed"], of["memory"]
        most = f"at most {max(memory.values()) // 1024} of {of['limit'] // 1024} KB"
        print(
            f"{CARDS[name].name} ({name}): {len(memory)} kinds, {of['compiled']} compiled, {most}; {len(wrong)} wrong"
        )
        print("".join(f"  {line}\n" for line in wrong), end="", flush=True)
        if options.write and options.every == 1 and not wrong:
            cards = recorded() | {name: memory}
            rows = [f'"{card}": {json.dumps(dict(sorted(cards[card].items())))}' for card in CARDS if card in cards]
            RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
