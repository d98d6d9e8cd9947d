"""What every form of convolution gives: the protocol that dispatch, tuning, tables and compiling ahead go by."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from triton.runtime.jit import JITFunction

from ....runtime.hardware import Gpu
from ..pack import channels_last, pack_weight
from ..problem import Choice, Problem, Product

MOST = {"num_warps": 16, "num_stages": 8, "STRIP": 8, "X_SLOTS": 8, "W_SLOTS": 36, "PROGRAMS": 4}
MAY_BE_0 = {"REST_N"}
ANY_NUMBER = {"num_stages", "SPLITS", "STRIP", "X_SLOTS", "W_SLOTS", "PROGRAMS"}
"""Sizes that need not be powers of 2."""

T = TypeVar("T", bound=Sequence[int])


@dataclass(frozen=True, kw_only=True)
class Config:
    """A form's configuration: sizes and flags that are constants of its kernel, by the names that they have there."""

    form: ClassVar[str]
    """The name of the form, in tables and reports."""
    shown: ClassVar[tuple[str, ...]] = ("SPLITS", "SLICES", "STRIP", "TILE", "BLOCK")
    """What the names of the sizes start with that a report says after the form's."""

    @property
    def constants(self) -> dict[str, int | bool]:
        """The kernel's constexpr arguments."""
        return dict(vars(self))

    @property
    def notes(self) -> list[str]:
        """What a report says of a configuration besides the sizes of its tiles."""
        notes = [f"{n} {word}" for word in ("warps", "stages") if (n := vars(self).get(f"num_{word}"))]
        return notes

    def __str__(self) -> str:
        sizes = [n for name, n in vars(self).items() if name.startswith(self.shown)]
        return ", ".join([f"{self.form} {'x'.join(map(str, sizes))}", *self.notes])

    def is_usable(self) -> bool:
        """Whether a kernel can be compiled with it: fields have their types, and numbers are within limits."""
        return all(map(_is_usable, *zip(*((f.name, getattr(self, f.name), f.type) for f in dataclasses.fields(self)))))


def _is_usable(name: str, value: object, wanted: object) -> bool:
    if wanted in (bool, "bool"):
        return type(value) is bool
    if value == 0 and type(value) is int and name in MAY_BE_0:
        return True
    if type(value) is not int or not 0 < value <= MOST.get(name, value):
        return False
    return name in ANY_NUMBER or value & (value - 1) == 0


class Form(ABC):
    """One way to compute a convolution. To add one: a file with a subclass, and a line of `ORDER`."""

    config: ClassVar[type[Config]]
    """The class of its configurations."""
    kernels: ClassVar[tuple[JITFunction, ...]]
    """The kernels that compiling ahead compiles."""
    packs_weight: ClassVar[bool] = True
    """Whether it wants the weight rounded or split for the precision. Without it, the weight stays as it is."""
    takes_shortcut: ClassVar[bool] = False
    takes_prologue: ClassVar[bool] = False
    loads_by_descriptor: ClassVar[bool] = False
    """Whether x is loaded by tensor descriptors, which may round it to TF32 at no cost."""
    most_candidates: ClassVar[int | None] = 6
    """How many of its candidates tuning tries."""
    most_beside_others: ClassVar[int | None] = 6
    """How many it tries if other forms have candidates too."""

    @property
    def name(self) -> str:
        return self.config.form

    def pack(self, weight: torch.Tensor, input_precision: str) -> torch.Tensor:
        """A weight [K, C / groups, R, S] as the kernel reads it, [K, R, S, C / groups] or, split, [3 * K, ...]."""
        return pack_weight(weight, input_precision) if self.packs_weight else channels_last(weight)

    @abstractmethod
    def fits(self, product: Product) -> bool:
        """Whether it can compute that product on this GPU, with x as it is or copied."""

    def takes(self, product: Product, choice: Choice) -> bool:
        """Whether it can compute a product that it `fits` with that configuration."""
        return True

    @abstractmethod
    def default(self, product: Product) -> Choice | None:
        """The choice where nothing was tuned; None where this form does not fit or is not known to be the fastest."""

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterable[Choice]:
        """Choices that tuning should try, the most promising first; `default` is that of dispatch."""
        return ()

    @abstractmethod
    def run(self, product: Product, config: Config) -> None:
        """Fills y."""


def by_waves(problem: Problem, tiles: Sequence[T], gpu: Gpu) -> list[T]:
    """Tiles (BLOCK_M, BLOCK_N, ...) no larger than the output and the GPU need.

    Those first that make about two programs a multiprocessor.
    """
    least_n, least_m = min(tile[1] for tile in tiles), min(tile[0] for tile in tiles)

    def waves(tile: T) -> float:
        return problem.programs(tile[0], tile[1]) / gpu.multiprocessors

    fitting = [
        tile
        for tile in tiles
        if (tile[1] == least_n or tile[1] < 2 * problem.k // problem.groups)
        and (tile[0] == least_m or tile[0] < 2 * problem.pixels)
        and (tile[:2] == (least_m, least_n) or waves(tile) >= 0.5)
    ]
    return sorted(fitting, key=lambda tile: abs(math.log2(waves(tile) / 2)))


def splits_of(tiles: int, steps: int, least_steps: int, programs: int) -> int:
    """The power of 2 into which a reduction is split so that there are at most so many programs.

    A part keeps at least `least_steps` of the `steps`, of about the same length.
    """
    splits = 1
    while 2 * splits * tiles <= programs and 2 * splits * least_steps <= steps:
        splits *= 2
    return splits
