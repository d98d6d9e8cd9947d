"""Writes the table of deploy.md: networks of torchvision, swapped and fused, and the ways to deploy them.

    python docs/deployment.py                     # all of NETWORKS
    python docs/deployment.py resnet18 googlenet  # these rows; prints them and writes nothing

Each cell loads what was saved, exported or traced with two images, and compares it with PyTorch's network on two and on
three.
"""

import copy
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import tritonnn  # noqa: E402
from tritonnn.command.networks import build, calibrate, describe, random_images  # noqa: E402

NETWORKS = {
    "resnet18": 32,
    "squeezenet1_1": 32,
    "mobilenet_v3_small": 32,
    "shufflenet_v2_x0_5": 32,
    "googlenet": 32,
    "efficientnet_b0": 32,
    "densenet121": 32,
    "convnext_tiny": 32,
}
"""Rows and columns of the images: enough for the network."""
TOLERANCE = 1e-3
"""The largest difference over the largest output, at most: what float32 does in random deep networks, with room."""
START, END = "<!-- python docs/deployment.py writes what follows -->\n", "<!-- end -->\n"

Network = Callable[[Tensor], Tensor]


def saved(network: nn.Module, x: Tensor) -> Network:
    file = io.BytesIO()
    torch.save(network, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def exported(network: nn.Module, x: Tensor) -> Network:
    """Through a file, with any number of images."""
    any_batch = {0: torch.export.Dim("batch")}
    fused = isinstance(network, tritonnn.FusedNetwork)  # whose forward takes *args, one structure of them
    program = torch.export.export(network, (x,), dynamic_shapes=((any_batch,),) if fused else (any_batch,))
    file = io.BytesIO()
    torch.export.save(program, file)
    return torch.export.load(io.BytesIO(file.getvalue())).module()


def traced(network: nn.Module, x: Tensor) -> Network:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, (x,)), file)
    return torch.jit.load(io.BytesIO(file.getvalue()))


def compiled_ahead(network: nn.Module, x: Tensor) -> Network:
    """By AOTInductor, with any number of images."""
    any_batch = {0: torch.export.Dim("batch")}
    fused = isinstance(network, tritonnn.FusedNetwork)
    program = torch.export.export(network, (x,), dynamic_shapes=((any_batch,),) if fused else (any_batch,))
    with tempfile.TemporaryDirectory() as folder:
        package = str(Path(folder) / "network.pt2")
        return torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(program, package_path=package)
        )


WAYS = {
    "`torch.save`": saved,
    "`torch.export`, any batch": exported,
    "`torch.jit.trace`": traced,
    "AOTInductor, any batch": compiled_ahead,
}


def check(model: nn.Module, way: Callable, fused: bool, images: Tensor) -> str:
    """ "yes", or the error in one line, for the model with Triton's layers or fused."""
    expected = model(images)
    network = tritonnn.fuse(model) if fused else copy.deepcopy(model)
    if not fused:
        tritonnn.swap(network)
    try:
        deployed = way(network, images[:2])
        for x, y in ((images[:2], expected[:2]), (images, expected)):
            difference = float((deployed(x) - y).abs().max() / y.abs().max())
            if not difference <= TOLERANCE:
                return f"wrong by {difference:.1e}"
    except Exception as error:  # of whatever kind: it becomes the cell
        return f"no: {describe(error)[:80]}".replace("|", "\\|")
    return "yes"


def row(name: str) -> str:
    model = build(f"torchvision:{name}").to(DEVICE)
    images = random_images(model, 16, NETWORKS.get(name, 64)).to(DEVICE)
    with torch.no_grad():
        calibrate(model, images)
        cells = []
        for fused in (False, True):
            cells += [check(model, way, fused, images[:3]) for way in WAYS.values()]
    return f"| {name} | {' | '.join(cells)} |"


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(names: list[str]) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    head = [f"{kind}: {way}" for kind in ("swapped", "fused") for way in WAYS]
    lines = [f"| network | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name in names or NETWORKS:
        start = time.perf_counter()
        lines.append(row(name))
        print(lines[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    if not names:
        page = ROOT / "docs" / "deploy.md"
        before, _, rest = page.read_text().partition(START)
        page.write_text(before + START + "\n" + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main(sys.argv[1:])
