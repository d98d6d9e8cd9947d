"""What is measured: the cases by importance, those that a user selects, and PyTorch's flags for each."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product

import torch

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "default": torch.float32,
}
"""tf32: allowed in convolutions and products; fp32: in neither; default: in convolutions only, as PyTorch starts."""

TASKS = ("cifar", "imagenet", "layers")
BATCH_SIZES = (1, 8, 128, 1024)
IMAGENET_BATCH_SIZE = 128
# Seconds, most of which is compilation, where nothing was compiled ahead.
ESTIMATES = {"cifar": 40.0, "imagenet": 45.0, "layers": 40.0}
MAX_AUTOTUNE_ESTIMATE = 150.0


@dataclass(frozen=True)
class Case:
    """A network (`cifar`: ResNet18 at 32x32, `imagenet`: at 224x224), or `layers`: the cifar network's, each alone.

    `max_autotune`: the case is about torch.compile's "max-autotune", which takes minutes to compile.
    """

    task: str
    dtype: str
    batch_size: int
    max_autotune: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}-{self.dtype}-{self.batch_size}" + ("-max-autotune" if self.max_autotune else "")

    @property
    def layout(self) -> str:
        """The memory format of the images, for peers whose name says none."""
        return "nchw" if self.dtype == "default" else "channels-last"

    @property
    def estimate_s(self) -> float:
        return MAX_AUTOTUNE_ESTIMATE if self.max_autotune else ESTIMATES[self.task]


DEFAULT_CASES = (
    Case("cifar", "bf16", 1024),
    Case("cifar", "tf32", 1024),
    Case("cifar", "fp32", 1024),
    Case("cifar", "bf16", 128),
    Case("cifar", "bf16", 1),
    Case("cifar", "fp32", 1),
    Case("imagenet", "default", IMAGENET_BATCH_SIZE),
    Case("layers", "bf16", 1024),
    Case("layers", "tf32", 1024),
    Case("layers", "bf16", 128),
    Case("layers", "tf32", 128),
    Case("layers", "fp32", 1024),
    Case("cifar", "bf16", 1024, max_autotune=True),
    Case("cifar", "tf32", 1),
    Case("cifar", "tf32", 128),
    Case("cifar", "fp32", 128),
    Case("cifar", "bf16", 8),
    Case("cifar", "fp16", 1024),
)


def every_case(batch_sizes: Sequence[int] = BATCH_SIZES, dtypes: Sequence[str] = tuple(DTYPES)) -> list[Case]:
    """All cases of these batch sizes and types, the default ones first, the others from large batches to small."""
    cases = {Case(task, dtype, n) for task, dtype, n in product(("cifar", "layers"), dtypes, batch_sizes)}
    if IMAGENET_BATCH_SIZE in batch_sizes:
        cases |= {Case("imagenet", dtype, IMAGENET_BATCH_SIZE) for dtype in dtypes}
    cases |= {Case(case.task, case.dtype, case.batch_size, True) for case in cases if case.task != "layers"}

    def importance(case: Case) -> tuple:
        default = DEFAULT_CASES.index(case) if case in DEFAULT_CASES else len(DEFAULT_CASES)
        return default, case.max_autotune, TASKS.index(case.task), -case.batch_size, list(DTYPES).index(case.dtype)

    return sorted(cases, key=importance)


def select(
    patterns: Sequence[str] | None,
    batch_sizes: Sequence[int] | None,
    dtypes: Sequence[str] | None,
    everything: bool = False,
) -> list[Case]:
    """The default cases if nothing is asked for; otherwise those that fit all that is, by importance.

    Args:
        patterns: names of cases, shell wildcards allowed.
        batch_sizes, dtypes: as in `every_case`.
        everything: every case instead of the default ones.

    Raises:
        ValueError: for a pattern that fits no case.
    """
    if not (patterns or batch_sizes or dtypes or everything):
        return list(DEFAULT_CASES)
    cases = every_case(batch_sizes or BATCH_SIZES, dtypes or tuple(DTYPES))
    if not patterns:
        return cases
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f"no case fits {pattern!r}: --list names them, cifar-bf16-1024 and layers-* are examples")
    return [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in patterns)]


def affordable(cases: Sequence[Case], budget_s: float, now: Callable[[], float]) -> Iterator[tuple[Case, bool]]:
    """Each case in turn and whether it still fits the budget, which starts now; the first always does.

    A case is expected to last as long as those of its task did so far, the first its estimate.
    """
    start, durations = now(), defaultdict(list)
    for index, case in enumerate(cases):
        before = durations[case.task]
        expected = sum(before) / len(before) if before and not case.max_autotune else case.estimate_s
        began = now()
        fits = index == 0 or began - start + expected <= budget_s
        yield case, fits
        if fits and not case.max_autotune:
            before.append(now() - began)


@contextmanager
def flags(dtype: str) -> Iterator[None]:
    """PyTorch's switches for a case of this type; PyTorch's defaults afterwards.

    Both generations of them: Inductor reads `torch.backends.cudnn.fp32_precision`, cuDNN's convolutions the other.
    """
    try:
        _allow_tf32(*{"tf32": ("tf32", True, True), "fp32": ("ieee", False, False)}.get(dtype, ("none", True, False)))
        yield
    finally:
        _allow_tf32("none", True, False)


def _allow_tf32(cudnn: str, convolution: bool, matmul: bool) -> None:
    torch.backends.cudnn.fp32_precision = cudnn
    torch.backends.cudnn.allow_tf32 = convolution
    torch.backends.cuda.matmul.allow_tf32 = matmul
