"""A step of training: PyTorch's layers as they are and compiled, Triton's swapped in and fused.

    python benchmarks/train.py                                   times and memory of ResNet18 and ResNet50
    python benchmarks/train.py --curves 500 --data DIR           and the loss of 500 steps of the same batches

A step is forward pass, loss, backward pass and SGD's update, in bfloat16 autocast and channels_last. "GPU" is its time
as a CUDA graph, back to back; "eager" that of a loop which launches its kernels one by one; "train.py" that of a loop
as train.py runs it: forward and backward pass as a graph, the update launched. Memory is the most that one eager step
takes, beyond parameters, gradients and momentum.

DIR has `train/<class>/*` and `test/<class>/*`; without it the curves are of scikit-learn's digits. The results go to
`--output`, a table, and as JSON.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository's root

import torch
import torchvision
from torch import Tensor, nn

import tritonnn
from benchmarks.timing import alternate, capture, clock, first_line
from lit_modules.data import Digits, ImageFolder
from lit_modules.environment import environment
from lit_modules.resnet import ResNet18
from lit_modules.training_step import Compute, GraphedStep, classification

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], int]] = {
    "ResNet18": (ResNet18, (512, 32), 10),
    "ResNet50": (torchvision.models.resnet50, (64, 224), 1000),
}
"""How to build it, images a batch and their size, classes."""
VARIANTS = ("PyTorch", "compiled", "swapped", "fused")
BUDGET_S = 2.0
MIB = 2**20


class Training:
    """A network of PyTorch's or Triton's layers, and what a step of it takes."""

    def __init__(self, name: str, variant: str, lr: float = 0.05) -> None:
        build, (batch, size), classes = NETWORKS[name]
        torch.manual_seed(0)
        self.network = build().cuda().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if variant == "swapped":
            tritonnn.swap(self.network)
        if variant == "fused":
            tritonnn.fuse_for_training(self.network)
        self.plain, self.compiled = classification(self.network, label_smoothing=0.1), variant == "compiled"
        self.compute: Compute = torch.compile(self.plain, dynamic=False) if self.compiled else self.plain
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.SGD(
            self.parameters, lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )
        self.images = torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(classes, (batch,), device="cuda")

    def eager(self, images: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """The loss of a step."""
        self.optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss, _ = self.compute(self.images if images is None else images, self.labels if labels is None else labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def as_train_py(self) -> Callable[[Tensor, Tensor], Tensor]:
        step = GraphedStep(self.plain, self.parameters, torch.channels_last, self.compiled)

        def run(images: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss, _ = step(images, labels)
            self.optimizer.step()
            return loss

        return run


def measure(name: str, variants: list[str]) -> dict[str, dict[str, float]]:
    """Milliseconds and MiB of a step, by variant."""
    device = torch.device("cuda")
    measured: dict[str, dict[str, float]] = {}
    graphs, trainings = {}, {}
    for variant in variants:
        start = time.perf_counter()
        training = trainings[variant] = Training(name, variant)
        for _ in range(3):
            training.eager()
        torch.cuda.synchronize()
        row = measured[variant] = {"first steps s": time.perf_counter() - start}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training.eager()
        torch.cuda.synchronize()
        row["memory MiB"] = (torch.cuda.max_memory_allocated() - before) / MIB
        row["eager ms"] = loop_ms(training.eager)
        try:
            graphs[variant] = clock(capture(training.eager)[0], device)
        except RuntimeError as error:
            print(f"{name} {variant}: not captured: {first_line(error)}")
        run = training.as_train_py()
        row["train.py ms"] = loop_ms(lambda run=run, training=training: run(training.images, training.labels))
        print(f"{name} {variant}: {', '.join(f'{column} {value:.4g}' for column, value in row.items())}", flush=True)
    timings, _ = alternate(graphs, BUDGET_S, device)
    for variant, timing in timings.items():
        measured[variant]["GPU ms"] = timing.median
    return measured


def loop_ms(call: Callable[[], object], repeats: int = 50) -> float:
    """The wall clock's, of so many calls after which the GPU is waited for."""
    for _ in range(6):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def curve(variant: str, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """The loss of each step of ResNet18."""
    run = Training("ResNet18", variant).as_train_py()
    return torch.stack([run(*batch) for batch in batches]).tolist()


def batches(root: Path | None, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the GPU: epoch after epoch the same images in another order."""
    data = ImageFolder(str(root)) if root else Digits()
    data.prepare_data()
    data.setup("fit")
    loader, epoch = data.train_dataloader(), 0
    while count > 0:
        loader.batch_sampler.sampler.set_epoch(epoch)
        for images, labels in islice(loader, count):
            yield images.cuda(), labels.cuda()
        count, epoch = count - len(loader), epoch + 1


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    columns = ("GPU ms", "train.py ms", "eager ms", "memory MiB", "first steps s")
    lines = ["| network | layers | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name, rows in results.items():
        for variant, row in rows.items():
            cells = (f"{row[column]:.4g}" if column in row else "-" for column in columns)
            lines.append(f"| {name} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--curves", type=int, default=0, metavar="STEPS", help="steps of which to record the loss")
    parser.add_argument("--data", type=Path, help="folder of images for the curves")
    parser.add_argument("--output", type=Path, help="folder for train.md and train.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: needs a CUDA GPU")
    torch.backends.cudnn.benchmark = True
    results = {}
    for name in args.networks:
        results[name] = measure(name, args.variants)
        gc.collect()
        print(table({name: results[name]}), flush=True)
    curves = {}
    if args.curves:
        same = list(batches(args.data, args.curves))
        curves = {variant: curve(variant, same) for variant in args.variants}
        for variant, losses in curves.items():
            tail = losses[-len(losses) // 10 :]
            print(f"{variant}: loss {losses[0]:.4f} at first, mean of the last tenth {sum(tail) / len(tail):.4f}")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(torch.device("cuda")), "steps": results, "curves": curves}
        (args.output / "train.json").write_text(json.dumps(content))
        (args.output / "train.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
