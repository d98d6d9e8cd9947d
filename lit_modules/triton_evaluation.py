"""The callback that swaps Triton's layers into a network under test, proves that nothing changed and times them."""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import Metric, MetricCollection

import tritonnn
from lit_modules import dashboard, report
from lit_modules.agreement import AgreementMeter, QualityMeter, judge
from lit_modules.checkpoint import weights_digest
from lit_modules.environment import environment, flags, is_exact, strict_float32
from lit_modules.evaluation_result import Evaluated, EvaluationResult, Proof, Variant
from lit_modules.float64_errors import Float64Errors, float64_errors
from lit_modules.measurement import measure
from lit_modules.progress import Progress
from lit_modules.traces import how_to_open_traces, write_traces
from tritonnn.latency import twin

PIPED_WIDTH = 140
COMPARED_TOGETHER = 1024
"""Samples, in batches as the last: one by one the metrics of small batches would take as long as the networks."""


class TritonEvaluation(Callback):
    """Compares and times PyTorch's and Triton's layers in `Trainer.test`; the module is left as it was.

    The module's `forward(images)` gives logits [N, C], and its test batches are `(images, labels)` with images [N, ...]
    and labels [N]. Every batch goes through PyTorch's layers, through the same in the other memory format as a
    yardstick, and through each variant of swapped layers; in lower precision also through PyTorch's in strict float32,
    to tell how far off each side is. The timing follows the last batch, on the images of the
    first. Under DDP all ranks compare; rank 0 times and writes.

    Afterwards `result` holds the `EvaluationResult`, on rank 0, and the log folder `results.json`, `results.md` and the
    TensorBoard runs `pytorch` and `triton`, in place of those of an earlier evaluation. They are written in the end,
    all of them or, on an error or Ctrl-C, none; a dry run (`fast_dev_run`) writes none.

    Args:
        layers: "all", "none", kinds to swap together, or "each" for every kind of the network alone, then all.
        latency: whether to time.
        channels_last: evaluate in channels_last, the module and the images; else in the format that the module has.
        fuse: prove and time the network fused by `tritonnn.fuse` too, as one more variant.
        cuda_graph: run that one in CUDA graphs.
        tune: first tune the convolutions of all variants on the first batch (`tritonnn.tune`), on each rank.
        time_interpreter: time Triton's side also where it runs in its interpreter, which says nothing about its speed.
        trace: write a batch of each side as a file for Perfetto, too.
        progress: draw bars in a terminal; for a Trainer that draws none.
        log_dir: folder to write to; None takes the logger's, and writes nothing where the Trainer has none.
        budget_s: seconds to time one layer on one clock; the network as a whole gets twenty times that.

    Raises:
        ValueError: an unknown kind, or "all", "none" or "each" mixed with others; `cuda_graph` without `fuse`.
    """

    def __init__(
        self,
        layers: str | Sequence[str] = "all",
        latency: bool = True,
        channels_last: bool = False,
        fuse: bool = False,
        cuda_graph: bool = False,
        tune: bool = False,
        log_dir: str | Path | None = None,
        budget_s: float = 0.1,
        time_interpreter: bool = False,
        trace: bool = False,
        progress: bool = False,
    ) -> None:
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        check_layers(self.layers)
        self.latency = latency
        self.channels_last = channels_last
        if cuda_graph and not fuse:
            raise ValueError("cuda_graph is for the fused network: it needs fuse")
        self.fuse = fuse
        self.cuda_graph = cuda_graph
        self.tune = tune
        self.log_dir = log_dir
        self.budget_s = budget_s
        self.time_interpreter = time_interpreter
        self.trace = trace
        self.progress = progress
        self.result: EvaluationResult | None = None
        self._checkpoint: Evaluated | None = None
        self._made: Path | None = None
        self._training: dict[nn.Module, bool] = {}
        self._was_contiguous = False
        self._fused: dict[str, tritonnn.FusedNetwork] = {}
        self._progress: Progress | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "test":
            return
        self._checkpoint = None
        self._made = None
        self._training = {module: module.training for module in pl_module.modules()}
        self._was_contiguous = _memory_format(pl_module) == torch.contiguous_format
        if self.channels_last:
            pl_module.to(memory_format=torch.channels_last)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        weights = weights_digest(checkpoint["state_dict"])
        self._checkpoint = Evaluated(str(trainer.ckpt_path), checkpoint.get("epoch"), weights)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.result = None
        if self._checkpoint is None:
            path = str(trainer.ckpt_path) if trainer.ckpt_path else None
            self._checkpoint = Evaluated(path, None, weights_digest(pl_module.state_dict()))
        self._format = _memory_format(pl_module)
        self._other_format = torch.contiguous_format if self._format == torch.channels_last else torch.channels_last
        self._other_parameters = {
            name: tensor.contiguous(memory_format=self._other_format)
            for name, tensor in pl_module.named_parameters()
            if tensor.dim() == 4
        }
        self._folder = self._folder_to_write(trainer)
        with trainer.precision_plugin.forward_context():
            self._exact = is_exact(pl_module, pl_module.device)
        self._float32_state = {} if self._exact else _in_float32(pl_module)
        self._variants = _variants(self.layers, pl_module)
        if self.fuse:
            name = "fused, CUDA graph" if self.cuda_graph else "fused"
            self._fused = {name: tritonnn.fuse(pl_module, cuda_graph=self.cuda_graph)}
        self._qualities: dict[str, QualityMeter] = {}
        self._agreements: dict[str, AgreementMeter] = {}
        self._errors: dict[str, AgreementMeter] = {}
        self._reports: dict[str, tritonnn.SwapReport] = {}
        self._fallbacks: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
        self._loaders = CombinedLoader(trainer.test_dataloaders, "sequential").flattened
        self._seen: Counter[int] = Counter()
        self._images: Tensor | None = None
        self._float64: Float64Errors | None = None
        self._console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
        self._progress = Progress(self._console, self.progress and trainer.is_global_zero)
        batches = sum(trainer.num_test_batches)
        self._batches = None if math.isinf(batches) else int(batches)
        self._pending: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        images, labels = batch
        places, counted = self._places(len(labels), dataloader_idx)
        if not counted.all():
            images, labels, places = images[counted], labels[counted], places[counted]
        if not len(labels):
            return
        places = places.to(labels.device)
        images = _in_format(images, self._format)
        if self._images is None:
            self._images = images
            if self.tune:
                self._tune(trainer, pl_module)
        first = images is self._images

        logits = {}
        if not self._exact:
            with strict_float32(images.device):
                logits["float32"] = functional_call(pl_module, self._float32_state, (images.float(),))
        with trainer.precision_plugin.forward_context():
            logits["pytorch"] = pl_module(images)
            others = _in_format(images, self._other_format)
            logits["yardstick"] = functional_call(pl_module, self._other_parameters, (others,))
            for index, (name, layers) in enumerate(self._variants.items()):
                if first:
                    self._tell_compiling(name, index)
                with tritonnn.swapped(pl_module, layers=layers) as swap_report:
                    logits[name] = pl_module(images)
                    for layer, reasons in swap_report.fallbacks.items():
                        self._fallbacks[name][layer].update(reasons)
                self._reports[name] = swap_report
            for name, network in self._fused.items():
                if first:
                    self._tell_compiling(name, len(self._variants))
                logits[name] = network(images)
            if first:
                self._tell_compiling("", len(self._variants) + len(self._fused))
                self._float64 = float64_errors(pl_module, (images,), logits)
            self._pending.append((logits, labels, places))
            if len(self._pending) * len(labels) >= COMPARED_TOGETHER:
                self._compare()
        self._progress.tell("proving", "", batch_idx + 1, self._batches)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with trainer.precision_plugin.forward_context():
            proof = self._proof(pl_module)  # on every rank: it reduces over them
            if trainer.is_global_zero:
                self._report(trainer, pl_module, proof)
        trainer.strategy.barrier("triton_evaluation")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)
        if self._made:
            with suppress(OSError):  # it is not empty
                self._made.rmdir()

    def _restore(self, pl_module: LightningModule) -> None:
        for module, training in self._training.items():
            module.training = training
        if self._training and self.channels_last and self._was_contiguous:
            pl_module.to(memory_format=torch.contiguous_format)
        if self._progress:
            self._progress.stop()
        self._training = {}
        self._images = None
        self._pending = []
        self._fused = {}
        self._other_parameters = {}
        self._float32_state = {}

    def _places(self, size: int, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """A batch's places in the (concatenated) test sets; which of them are not padding of a DistributedSampler."""
        sampler = _sampler(self._loaders[dataloader_idx])
        places = torch.arange(size) + self._seen[dataloader_idx]
        self._seen[dataloader_idx] += size
        counted = torch.ones_like(places, dtype=torch.bool)
        if isinstance(sampler, DistributedSampler):  # rank r has the places r, r + R, r + 2R, ...
            places = places * sampler.num_replicas + sampler.rank
            counted = places < len(sampler.dataset)  # type: ignore[arg-type]
        before = (_samples(loader, self._seen[index]) for index, loader in enumerate(self._loaders[:dataloader_idx]))
        return places + sum(before), counted

    def _quality(self, name: str, logits: Tensor) -> QualityMeter:
        if name not in self._qualities:
            self._qualities[name] = QualityMeter(logits.shape[1], logits.device)
        return self._qualities[name]

    def _tune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report = tritonnn.TuningReport()
        with trainer.precision_plugin.forward_context():
            for layers in self._variants.values():
                report += tritonnn.tune(pl_module, self._images, layers, progress=trainer.is_global_zero)
            for network in self._fused.values():
                report += tritonnn.tune(network, self._images, progress=trainer.is_global_zero)
        if trainer.is_global_zero:
            print(f"Tuning: {report.summary}")

    def _compare(self) -> None:
        """Meters what the pending batches gave."""
        if not self._pending:
            return
        of_batches, all_labels, all_places = zip(*self._pending)
        self._pending = []
        labels, places = torch.cat(all_labels), torch.cat(all_places)
        logits = {name: torch.cat([batch[name] for batch in of_batches]) for name in of_batches[0]}
        pytorch, float32 = logits["pytorch"], logits.get("float32")
        for name, other in logits.items():
            self._quality(name, other).update(other, labels)
            if name != "pytorch":
                self._meter(self._agreements, name, other).update(pytorch, other, labels, places)
            if float32 is not None and name in (*self._variants, *self._fused):
                self._meter(self._errors, name, other).update(float32, other, labels, places)

    def _tell_compiling(self, name: str, done: int) -> None:
        self._progress.tell("compiling", name, done, len(self._variants) + len(self._fused))

    @staticmethod
    def _meter(meters: dict[str, AgreementMeter], name: str, logits: Tensor) -> AgreementMeter:
        if name not in meters:
            meters[name] = AgreementMeter().to(logits.device)
        return meters[name]

    def _proof(self, pl_module: LightningModule) -> Proof:
        self._compare()
        qualities = {name: meter.compute() for name, meter in self._qualities.items()}
        agreements = {name: meter.agreement() for name, meter in self._agreements.items()}
        errors = {name: meter.agreement() for name, meter in self._errors.items()}
        float32 = agreements.get("float32")

        def variant(name: str, **changes) -> Variant:
            return Variant(
                name=name,
                quality=qualities[name],
                agreement=agreements[name],
                float32=errors.get(name),
                verdict=judge(
                    qualities["pytorch"],
                    qualities[name],
                    agreements[name],
                    agreements["yardstick"],
                    None if self._exact else (float32, errors[name]),
                ),
                **changes,
            )

        variants = [
            variant(
                name,
                swapped=dict(Counter(self._reports[name].swapped.values())),
                stayed=_by_reason(_without_metrics(self._reports[name].stayed, pl_module)),
                fallbacks={layer: dict(reasons) for layer, reasons in self._fallbacks[name].items()},
            )
            for name in self._variants
        ]
        for name, network in self._fused.items():
            fusion = network.report
            untraced = {part: f"not traced: {reason}" for part, reason in fusion.untraced.items()}
            variants.append(
                variant(
                    name,
                    swapped=dict(Counter([*fusion.fused.values(), *fusion.swapped.values()])),
                    stayed=_by_reason(fusion.stayed | untraced),
                    fallbacks=fusion.fallbacks,
                    fused=True,
                )
            )
        return Proof(
            samples=agreements["yardstick"].samples,
            exact=self._exact,
            pytorch=qualities["pytorch"],
            yardstick=qualities["yardstick"],
            yardstick_format=_name(self._other_format),
            yardstick_agreement=agreements["yardstick"],
            float32=qualities.get("float32"),
            float32_agreement=float32,
            variants=variants,
            passed=all(variant.verdict.passed for variant in variants),
            float64=self._float64,
        )

    def _report(self, trainer: Trainer, pl_module: LightningModule, proof: Proof) -> None:
        if trainer.progress_bar_callback:  # it stays above the tables
            trainer.progress_bar_callback.teardown(trainer, pl_module, "test")
        timing = (self._variants, self._fused, self.budget_s, self.time_interpreter, self._progress.tell)
        latency = measure(pl_module, self._images, *timing) if self.latency else None
        self._progress.stop()
        self.result = EvaluationResult(
            checkpoint=self._checkpoint,
            environment=environment(pl_module.device),
            flags=flags(),
            triton_layers=", ".join([" ".join(self.layers), *self._fused]),
            precision=trainer.precision,
            memory_format=_name(self._format),
            batch_size=len(self._images),
            processes=trainer.world_size,
            parameters={k: v for k, v in pl_module.hparams.items() if isinstance(v, str | int | float | bool)},
            proof=proof,
            latency=latency,
            network=name_of_network(pl_module),
        )
        report.print_to(self._console, self.result)
        if self._folder is None:
            message = "Nothing was written: this was a dry run, or the Trainer has no logger and log_dir is None."
            self._console.print(message)
            return
        with TemporaryDirectory(dir=self._folder) as new:
            self.result.write_json(Path(new, "results.json"))
            Path(new, "results.md").write_text(report.markdown(self.result))
            dashboard.write(self.result, Path(new))
            if self.trace:
                write_traces(Path(new), self._calls(pl_module))
            _replace(Path(new), self._folder)
        opened = [dashboard.how_to_open(self._folder), *([how_to_open_traces(self._folder)] if self.trace else [])]
        self._console.print("\n".join(opened), markup=False, highlight=False, soft_wrap=True)

    def _calls(self, pl_module: LightningModule) -> dict[str, Callable[[], Tensor]]:
        """A batch through PyTorch's layers, through the last variant of Triton's, and through the fused network."""
        calls = {"pytorch": partial(pl_module, self._images)}
        for layers in list(self._variants.values())[-1:]:
            swapped = twin(pl_module)
            tritonnn.swap(swapped, layers=layers)
            calls["triton"] = partial(swapped, self._images)
        return calls | {name: partial(network, self._images) for name, network in self._fused.items()}

    def _folder_to_write(self, trainer: Trainer) -> Path | None:
        """Made now, so that it is known before any work that it can be; None where nothing is to be written."""
        logged = trainer.log_dir if trainer.loggers else None  # on every rank: it is broadcast
        if trainer.fast_dev_run or not (self.log_dir or logged):
            return None
        folder = Path(self.log_dir or logged)
        if trainer.is_global_zero and not folder.is_dir():
            folder.mkdir(parents=True)
            self._made = folder
        return folder


def _replace(new: Path, folder: Path) -> None:
    """Moves an evaluation's files to the folder, where those of an earlier one go first; anything else there stays."""
    dashboard.remove(folder)
    files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: file.suffix == ".json"):  # last: where it stands, all does
        (folder / file).parent.mkdir(exist_ok=True)
        (new / file).replace(folder / file)


def name_of_network(module: LightningModule) -> str:
    """The class of the one part that has all the parameters, else, or where that is a mere container, the module's."""
    number = sum(1 for _ in module.parameters())
    parts = [part for part in module.children() if sum(1 for _ in part.parameters()) == number]
    named = len(parts) == 1 and not isinstance(parts[0], nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return type(parts[0] if named else module).__name__


def check_layers(layers: Sequence[str]) -> None:
    """Raises ValueError unless `layers` is one of "all", "none" and "each" alone, or kinds of layers."""
    alone = ("all", "none", "each")
    unknown = [layer for layer in layers if layer not in (*alone, *tritonnn.KINDS)]
    if unknown or not layers:
        raise ValueError(
            f"unknown kind of layer {', '.join(map(repr, unknown))}: expected {', '.join(alone)}, "
            f"or one or more of {', '.join(tritonnn.KINDS)}"
        )
    if len(layers) > 1 and (mixed := [layer for layer in layers if layer in alone]):
        raise ValueError(f"{mixed[0]!r} stands alone, got {' '.join(layers)}")


def _variants(layers: Sequence[str], model: nn.Module) -> Mapping[str, str | list[str]]:
    """What to swap, by name."""
    if layers == ["none"]:
        return {}
    if layers == ["each"]:
        present = {tritonnn.kind_of(module) for module in model.modules()}
        return {kind: kind for kind in tritonnn.KINDS if kind in present} | {"all": "all"}
    return {" ".join(layers): layers[0] if layers == ["all"] else list(layers)}


def _without_metrics(stayed: dict[str, str], model: nn.Module) -> dict[str, str]:
    """torchmetrics' are modules, but no layers."""
    metrics = Metric, MetricCollection
    return {name: reason for name, reason in stayed.items() if not isinstance(model.get_submodule(name), metrics)}


def _by_reason(stayed: dict[str, str]) -> dict[str, list[str]]:
    layers = defaultdict(list)
    for name, reason in stayed.items():
        layers[reason].append(name)
    return dict(layers)


def _in_float32(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors}


def _memory_format(model: nn.Module) -> torch.memory_format:
    channels_last = any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in model.parameters()
    )
    return torch.channels_last if channels_last else torch.contiguous_format


def _in_format(images: Tensor, memory_format: torch.memory_format) -> Tensor:
    return images.contiguous(memory_format=memory_format) if images.dim() == 4 else images


def _name(memory_format: torch.memory_format) -> str:
    return "channels_last" if memory_format == torch.channels_last else "contiguous"


def _samples(loader: Any, seen: int) -> int:
    """Of a loader's data set; of one that does not know its length those that were seen."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return seen


def _sampler(loader: Any) -> Any:
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)
