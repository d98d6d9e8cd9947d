"""What dispatch chooses for some thousand problems, kept in a file: a change of dispatch shows there, and only there.

    python tests/ops/conv2d/golden.py --write

The problems are the convolutions and linear layers of torchvision's networks and of ResNet18 at 32x32, in batches of 1
to 1,024 images, on an H100 and an A100: all of ResNet18's; of the others one in nineteen.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.gpus import A100, H100, posing  # noqa: E402
from helpers.problems import product_of  # noqa: E402

from tritonnn.ops.conv2d.dispatch import default_choice  # noqa: E402
from tritonnn.ops.conv2d.problem import Choice, Problem  # noqa: E402

FILE = Path(__file__).with_name("golden_choices.json")
GPUS = {"H100": H100, "A100": A100}
BATCHES = (1, 2, 8, 64, 128, 256, 1024)
PRECISIONS = {
    "bfloat16": (torch.bfloat16, "ieee", False),
    "float16": (torch.float16, "ieee", False),
    "TF32, to be rounded": (torch.float32, "tf32", True),
    "TF32": (torch.float32, "tf32", False),
    "strict float32": (torch.float32, "tf32x3", False),
    "float32 without tensor cores": (torch.float32, "ieee", False),
    "float64": (torch.float64, "ieee", False),
}
LAYOUTS = {
    "channels_last": (True, True, ()),
    "channels_last, residual": (True, True, ("residual",)),
    "NCHW": (False, False, ()),
    "NCHW to channels_last": (False, True, ()),
    "NCHW to channels_last, residual": (False, True, ("residual",)),
}
OF_RESNET18 = 24
"""The first shapes of the file, at 224x224 and at 32x32."""
EVERY = 19
"""One in so many problems of other networks is kept."""


class Golden(NamedTuple):
    """Distinct choices in words, and by the number of each problem which of them it has."""

    shapes: list[list[int]]
    choices: list[str]
    chosen: list[int]

    @classmethod
    def read(cls) -> "Golden":
        return cls(**json.loads(FILE.read_text()))

    def write(self) -> None:
        shapes, choices = (",\n".join(map(json.dumps, rows)) for rows in (self.shapes, self.choices))
        chosen = ",\n".join(json.dumps(self.chosen[i : i + 40])[1:-1] for i in range(0, len(self.chosen), 40))
        FILE.write_text(f'{{"shapes": [\n{shapes}\n],\n"choices": [\n{choices}\n],\n"chosen": [\n{chosen}\n]}}\n')


def problems(shapes: list[list[int]]) -> Iterator[tuple[str, str, Problem]]:
    """The GPU, the name and the problem of each case, in the order of the file.

    A shape is (channels, rows, columns) of x, channels of y, filter, stride, padding, dilation, groups.
    """
    number = 0
    for gpu in GPUS:
        for i, (c, h, w, k, r, s, *window, groups) in enumerate(shapes):
            stride, padding, dilation = window[:2], window[2:4], window[4:]
            for n in BATCHES:
                for precision, (dtype, input_precision, round_x) in PRECISIONS.items():
                    for layout, (last_x, last_y, steps) in LAYOUTS.items():
                        number += 1
                        if i >= OF_RESNET18 and number % EVERY:
                            continue
                        sizes = n, c, h, w, k, r, s, tuple(stride), tuple(padding), tuple(dilation), groups
                        problem = Problem(*sizes, dtype, input_precision, round_x, last_x, last_y, steps)
                        filters = f"{r}x{s}, stride {stride}, padding {padding}, dilation {dilation}, {groups} groups"
                        name = f"{gpu}, {n}x{c}x{h}x{w} to {k}, {filters}, {precision}, {layout}"
                        yield gpu, name, problem


def in_words(choice: Choice) -> str:
    """A choice with all that it sets, by name."""
    sizes = " ".join(f"{name}={int(size)}" for name, size in sorted(choice.config.constants.items()))
    return f"{choice.config.form} {sizes}{' x copied' * choice.copies_x}"


def choices_now(shapes: list[list[int]]) -> Iterator[tuple[str, str]]:
    """The name of each problem, and what dispatch chooses for it, in words."""
    for gpu, name, problem in problems(shapes):
        with posing(GPUS[gpu]):
            yield name, in_words(default_choice(product_of(problem)))


def differences(golden: Golden) -> list[str]:
    """A line for each problem for which dispatch chooses otherwise than the file has it."""
    now = choices_now(golden.shapes)
    before = (golden.choices[i] for i in golden.chosen)
    return [f"{name}: {old} -> {new}" for (name, new), old in zip(now, before, strict=True) if new != old]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write what is chosen now; else only say what differs")
    golden = Golden.read()
    if parser.parse_args().write:
        chosen = [choice for _, choice in choices_now(golden.shapes)]
        choices = sorted(set(chosen))
        number = {choice: i for i, choice in enumerate(choices)}
        Golden(golden.shapes, choices, [number[choice] for choice in chosen]).write()
        print(f"{FILE}: {len(chosen)} problems, {len(choices)} choices")
    else:
        print("\n".join(differences(golden)))


if __name__ == "__main__":
    main()
