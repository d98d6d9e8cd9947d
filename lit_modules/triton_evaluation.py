"""The callback that swaps Triton's layers into a network under test, proves that nothing changed and times them."""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import Metric, MetricCollection

import tritonnn
from lit_modules import dashboard, report
from lit_modules.checkpoint import weights_digest
from lit_modules.comparison import Comparison, Outputs
from lit_modules.environment import environment, flags, is_exact, resolution, strict_float32
from lit_modules.epoch_comparison import EpochComparison
from lit_modules.evaluation_result import (
    Epoch,
    Evaluated,
    EvaluationResult,
    LatencyResult,
    Proof,
    SideResult,
    Variant,
)
from lit_modules.float64_errors import Float64Errors, float64_errors
from lit_modules.measurement import measure
from lit_modules.predictions import Inputs, Labels, Predictions, Uses, chosen, find_predictions
from lit_modules.progress import Progress
from lit_modules.side import STEPS, Call, Replayed, Side, in_format, modules_called, named_outputs, replay
from lit_modules.traces import how_to_open_traces, remove_traces, write_traces
from lit_modules.trees import batch_size, mapped, named_tensors
from lit_modules.verdict import judge_variant
from tritonnn.compile_swapped import compile_swapped
from tritonnn.latency import twin

PIPED_WIDTH = 140


class TritonEvaluation(Callback):
    """Compares and times PyTorch's and Triton's layers in `Trainer.test`, `validate` and `predict`.

    Any LightningModule will do. Its own step runs for every batch with PyTorch's layers, with the same in the other
    memory format as a yardstick, with each variant of swapped layers and, in lower precision, with PyTorch's in strict
    float32, to tell how far off each side is. Compared are

    - every metric that the module logs, in its steps, the hooks around them or at the end of the epoch;
    - every tensor that its forward gives, or where the step calls parts of the module instead, that these give: by its
      error, beside PyTorch's own;
    - predictions, sample by sample or pixel by pixel, where an output is logits [N, C] or [N, C, ...] and the step
      computes with integer labels of the batch, [N] or [N, ...].

    In `predict` there are outputs only, what the step returns among them. Every side is a copy of the module that
    shares its parameters; what else a step does, such as to write files, each side does again. The module is left as it
    was. The timing follows the last batch, on what the network was given in the first. Under DDP all ranks compare;
    rank 0 times and writes. In a `fit`, this callback waits for the test.

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
        log_dir: folder to write to; None takes the logger's, and writes nothing where the Trainer has none.
        budget_s: seconds to time one layer on one clock; the network as a whole gets twenty times that.
        every_n_epochs: during a training, make every n-th validation again with the layers swapped together: for curves
            of both sides, one upon the other. None: only in the test.
        time_interpreter: time Triton's side also where it runs in its interpreter, which says nothing about its speed.
        trace: write a batch of each side as a file for Perfetto, too.
        progress: draw bars in a terminal; for a Trainer that draws none.
        inputs: what the module's forward takes of a batch, where the step does not call it: a key of the batch, several
            keys, or a function of the batch that gives the input, a tuple of inputs or a dictionary of named inputs.
        labels: the integer labels of the logits, where they cannot be found: a key of the batch, or a function of it;
            False for outputs that are not to be compared as predictions.

    Raises:
        ValueError: an unknown kind, or "all", "none" or "each" mixed with others; `cuda_graph` without `fuse`.
        MisconfigurationException: in the run, where the module cannot be compared; the message says what is wanted.
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
        inputs: Inputs | None = None,
        labels: Labels | None = None,
        every_n_epochs: int | None = None,
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
        self.inputs = inputs
        self.labels = labels
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1 or None, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs
        together = "all" if self.layers in (["each"], ["none"]) else layers
        self.epochs: list[Epoch] = []
        self._curves = None
        if every_n_epochs:
            self._curves = EpochComparison(self.epochs, together, every_n_epochs, time_interpreter)
        self.time_interpreter = time_interpreter
        self.trace = trace
        self.progress = progress
        self.result: EvaluationResult | None = None
        self._stage: str | None = None
        self._checkpoint: Evaluated | None = None
        self._made: Path | None = None
        self._training: dict[nn.Module, bool] = {}
        self._was_contiguous = False
        self._sides: dict[str, Side] = {}
        self._fused: dict[str, dict[str, nn.Module]] = {}
        self._calls: list[Call] = []
        self._comparison: Comparison | None = None
        self._batch: Any = None
        self._progress: Progress | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage if stage in STEPS else None
        if self._stage is None:
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
        self._start(trainer, pl_module, trainer.test_dataloaders)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._curves and trainer.state.fn == "fit":
            self._curves.start(trainer, pl_module, _memory_format(pl_module))
        self._start(trainer, pl_module, trainer.val_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, trainer.predict_dataloaders)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *indices: int) -> None:
        self._start_batch(trainer, pl_module, batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *indices: int
    ) -> None:
        self._start_batch(trainer, pl_module, batch)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *indices: int) -> None:
        self._start_batch(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        self._end_batch(trainer, pl_module, indices)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        if self._curves and trainer.state.fn == "fit":
            self._curves.add(batch, indices, pl_module.device)
        self._end_batch(trainer, pl_module, indices)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        self._end_batch(trainer, pl_module, indices)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._curves and trainer.state.fn == "fit":
            self._curves.end(trainer, self._folder_to_write(trainer))
        self._end(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)
        if self._made:
            with suppress(OSError):  # it is not empty
                self._made.rmdir()

    def state_dict(self) -> dict[str, Any]:
        """In the checkpoints of a training: its curves go on when it is resumed, and stand in later evaluations."""
        return {"epochs": [asdict(epoch) for epoch in self.epochs]} if self.epochs else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.epochs:  # the best epoch's checkpoint knows none of those after it
            self.epochs += [Epoch(**epoch) for epoch in state_dict.get("epochs", [])]

    def _start(self, trainer: Trainer, pl_module: LightningModule, dataloaders: Any) -> None:
        if self._stage is None:
            return
        self.result = None
        if self._checkpoint is None:
            path = str(trainer.ckpt_path) if trainer.ckpt_path else None
            self._checkpoint = Evaluated(path, None, weights_digest(pl_module.state_dict()))
        self._format = _memory_format(pl_module)
        self._other_format = torch.contiguous_format if self._format == torch.channels_last else torch.channels_last
        self._folder = self._folder_to_write(trainer)
        with trainer.precision_plugin.forward_context():
            self._exact = is_exact(pl_module, pl_module.device)
            self._resolution = resolution(pl_module, pl_module.device)
        self._reference = _reference(pl_module, self._exact)
        self._variants = _variants(self.layers, pl_module)
        self._sides, self._fused, self._calls = {}, {}, []
        self._reports: dict[str, tritonnn.SwapReport] = {}
        self._comparison = None
        self._predictions: Predictions | None = None
        self._notes: list[str] = []
        self._loaders = CombinedLoader(dataloaders, "sequential").flattened
        self._seen: Counter[int] = Counter()
        self._samples = 0
        batches = sum({"test": trainer.num_test_batches, "validate": trainer.num_val_batches}.get(self._stage, []))
        self._batches, self._all_batches = 0, int(batches) if 0 < batches < math.inf else None
        self._float64: Float64Errors | None = None
        self._console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
        self._progress = Progress(self._console, self.progress and trainer.is_global_zero)

    def _start_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Keeps the batch, and copies the module for each side, as they are before the module's step."""
        if self._stage is None:
            return
        self._batch = mapped(torch.clone, batch)
        if self._sides:
            return

        def side(memory_format: torch.memory_format = self._format, context: Any = None) -> Side:
            context = context or trainer.precision_plugin.forward_context
            return Side(pl_module, trainer, self._stage, context, memory_format)

        if self._reference:
            dtype = getattr(torch, self._reference)
            exact = side(context=lambda: strict_float32(pl_module.device))
            change = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
            self._sides[self._reference] = exact.with_parameters(change, dtype)
        self._sides["pytorch"] = side()
        other = side(self._other_format)
        self._sides["yardstick"] = other.with_parameters(lambda x: in_format(x, self._other_format))
        for name, layers in self._variants.items():
            self._sides[name] = side()
            self._reports[name] = tritonnn.swap(self._sides[name].module, layers)
        if self.fuse:
            self._sides["fused, CUDA graph" if self.cuda_graph else "fused"] = side()

    def _end_batch(self, trainer: Trainer, pl_module: LightningModule, indices: tuple[int, ...]) -> None:
        if self._stage is None:
            return
        batch, self._batch = self._batch, None
        places, counted = self._places(batch_size(batch), indices[1] if len(indices) > 1 else 0)
        if not counted.all():
            batch = mapped(lambda x: x[counted.to(x.device)] if x.dim() and len(x) == len(counted) else x, batch)
            places = places[counted]
        if not len(places):
            return
        with _same_random_numbers(pl_module.device) as rewind:
            outputs = {}
            if first := self._comparison is None:
                outputs["pytorch"] = self._first_step(trainer, pl_module, batch, indices)
                if rewind() and self._reference:
                    self._without_reference(f"the step draws random numbers, which are others in {self._reference}")
                self._compile(trainer, pl_module)
            for name in [name for name in self._sides if name not in outputs]:
                rewind()
                if first:
                    self._progress.tell("compiling", name, len(outputs), len(self._sides))
                try:
                    outputs[name] = self._step(name, mapped(torch.clone, batch), indices)
                except (RuntimeError, TypeError, ValueError) as error:
                    if name != self._reference or not first:
                        raise
                    message = " ".join(f"{type(error).__name__}: {error}".split())
                    self._without_reference(f"the step does not run in {self._reference} ({message:.120})")
        labels = None
        if self._predictions and (logits := outputs["pytorch"].get(self._predictions.logits)) is not None:
            labels = self._predictions.of(batch, logits)
        self._samples += len(places)
        self._comparison.add(outputs, labels, places.to(pl_module.device))
        if first:
            self._progress.tell("compiling", "", len(self._sides), len(self._sides))
            if self._calls:
                network, inputs = self._network(pl_module)
                self._float64 = float64_errors(network, inputs, outputs)
        self._batches += 1
        self._progress.tell("proving", "", self._batches, self._all_batches)

    def _first_step(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, indices: tuple[int, ...]
    ) -> Outputs:
        """PyTorch's side of the first batch: finds out which modules the step calls, and what its predictions are."""
        side, own = self._sides["pytorch"], mapped(torch.clone, batch)
        side.watch([name for name, _ in side.module.named_modules()] if self.inputs is None else [])
        with (uses := Uses(side, own)):
            outputs = self._step("pytorch", own, indices)
        self._calls = side.calls
        step = f"{type(pl_module).__name__}.{STEPS[self._stage]}"
        if not outputs and not side.logged:
            raise MisconfigurationException(
                f"{step} calls no network of the module and logs nothing, so there is nothing to compare: say what "
                "forward takes of a batch with TritonEvaluation(inputs=...)"
            )
        labels = self.labels if self._stage != "predict" or self.labels is not None else False
        self._predictions = find_predictions(uses, batch, side.calls, labels)
        self._comparison = self._comparison_for(outputs)
        self._batch_size = batch_size(batch)
        called = modules_called(side.calls)
        for other in self._sides.values():
            other.watch(called)
        self._fuse(pl_module, called)
        if self.tune:
            self._tune(trainer, pl_module)
        return outputs

    def _step(self, name: str, batch: Any, indices: tuple[int, ...]) -> Outputs:
        """One side's outputs for a batch of its own."""
        side = self._sides[name]
        returned = side.step(batch, indices)
        if self.inputs is not None:
            side.watch([""])
            side.forward(*_arguments(chosen(batch, self.inputs, "inputs")))
        outputs = dict(named_outputs(side.calls))
        if self._stage == "predict":
            own = {id(x) for x in outputs.values()}
            outputs |= {place: x for place, x in named_tensors(returned, STEPS["predict"]) if id(x) not in own}
        return {place: x.detach().clone() for place, x in outputs.items()}

    def _comparison_for(self, outputs: Outputs) -> Comparison:
        """Images that are classified need no reference in float64: predictions have margins."""
        logits = self._predictions.logits if self._predictions else None
        plain = logits is not None and outputs[logits].dim() == 2
        if self._reference == "float64" and plain and len(outputs) == 1:
            self._reference = None
            del self._sides["float64"]
        return Comparison(logits, self._reference, errors_of_logits=not self._exact, also_numbers=not plain)

    def _without_reference(self, reason: str) -> None:
        self._notes.append(f"No errors are told: {reason}.")
        del self._sides[self._reference]
        self._reference = self._comparison.reference = None

    def _fuse(self, pl_module: LightningModule, called: Sequence[str]) -> None:
        """Puts the fused networks in place of those that the step calls, on their side."""
        for name in [name for name in self._sides if self.fuse and name.startswith("fused")]:
            side = self._sides[name]
            self._fused[name] = {part: pl_module.get_submodule(part) for part in called}
            for part, module in self._fused[name].items():
                if any(tritonnn.kind_of(layer) for layer in module.modules()):
                    fused = tritonnn.fuse(module, cuda_graph=self.cuda_graph)
                    self._fused[name][part] = fused
                    side.module.get_submodule(part).__dict__["forward"] = fused.__call__

    def _restore(self, pl_module: LightningModule) -> None:
        if self._progress:
            self._progress.stop()
        for module, training in self._training.items():
            module.training = training
        if self._training and self.channels_last and self._was_contiguous:
            pl_module.to(memory_format=torch.contiguous_format)
        self._training = {}
        self._sides, self._fused, self._calls, self._comparison, self._batch = {}, {}, [], None, None

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

    def _network(self, pl_module: LightningModule) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """A module with the layers of pl_module, and inputs, that make the calls of the first step again."""
        (call, *more) = self._calls
        if call.name == "" and not more and not call.kwargs and all(isinstance(x, Tensor) for x in call.args):
            return pl_module, call.args
        return replay(pl_module, self._calls), self._any_input()

    def _any_input(self) -> tuple[Tensor, ...]:
        return (next(x for call in self._calls for _, x in named_tensors((call.args, call.kwargs))),)

    def _fused_networks(self) -> list[nn.Module]:
        """As `_network`, of the fused networks."""
        return [self._calling(parts) for parts in self._fused.values()]

    def _calling(self, parts: dict[str, nn.Module]) -> nn.Module:
        """What makes the calls of the first step again with these in place of the module's parts."""
        if len(self._calls) == 1 and not self._calls[0].kwargs:
            return next(iter(parts.values()))
        return Replayed(parts, self._calls)

    def _compile(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the swapped layers launch for the first batch, and where they are timed alone, beside each other."""
        if pl_module.device.type != "cuda" or not self._calls or not self._variants:
            return
        self._progress.tell("compiling", "all layers", 0, len(self._sides))
        variants = [[layers] if isinstance(layers, str) else layers for layers in self._variants.values()]
        with trainer.precision_plugin.forward_context():
            network, inputs = self._network(pl_module)
            compile_swapped(network, *inputs, layers=sum(variants, []), in_graphs=self.latency, advance=lambda _: None)

    def _tune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report = tritonnn.TuningReport()
        with trainer.precision_plugin.forward_context():
            network, inputs = self._network(pl_module)
            for layers in self._variants.values():
                report += tritonnn.tune(network, inputs, layers, progress=trainer.is_global_zero)
            for fused in self._fused_networks():
                report += tritonnn.tune(fused, inputs, progress=trainer.is_global_zero)
        if trainer.is_global_zero:
            print(f"Tuning: {report.summary}")

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stage is None:
            return
        if self._comparison is None:
            raise MisconfigurationException("TritonEvaluation has seen no samples: is the data set empty?")
        proof = self._proof(pl_module)  # on every rank: it reduces over them
        for side in self._sides.values():
            side.unwatch()
        with trainer.precision_plugin.forward_context():
            if trainer.is_global_zero:
                self._report(trainer, pl_module, proof)
        trainer.strategy.barrier("triton_evaluation")

    def _proof(self, pl_module: LightningModule) -> Proof:
        comparison = self._comparison
        comparison.flush()
        qualities, agreements, errors = comparison.qualities(), comparison.agreements(), comparison.errors()
        numbers = comparison.numbers()
        sides = {
            name: SideResult(side.metrics() if self._stage != "predict" else {}, numbers.get(name, {}))
            for name, side in self._sides.items()
        }
        float32 = agreements.get("float32")

        def variant(name: str, **changes: Any) -> Variant:
            return Variant(
                name=name,
                quality=qualities.get(name),
                agreement=agreements.get(name),
                float32=errors.get(name),
                verdict=judge_variant(
                    name,
                    sides,
                    qualities,
                    agreements,
                    errors,
                    comparison.unlike[name],
                    comparison.logits,
                    self._reference,
                    self._exact,
                    self._resolution,
                ),
                **changes,
            )

        variants = [
            variant(
                name,
                swapped=dict(Counter(report.swapped.values())),
                stayed=_by_reason(_without_metrics(report.stayed, pl_module)),
                fallbacks=report.fallbacks,
            )
            for name, report in self._reports.items()
        ]
        for name, networks in self._fused.items():
            done, stayed, fallbacks = _fusions(networks)
            variants.append(
                variant(name, swapped=dict(Counter(done)), stayed=_by_reason(stayed), fallbacks=fallbacks, fused=True)
            )
        return Proof(
            samples=_sum_over_processes(self._samples, pl_module.device),
            exact=self._exact,
            pytorch=qualities.get("pytorch"),
            yardstick=qualities.get("yardstick"),
            yardstick_format=_name(self._other_format),
            yardstick_agreement=agreements.get("yardstick"),
            float32=qualities.get("float32"),
            float32_agreement=float32,
            variants=variants,
            passed=all(variant.verdict.passed for variant in variants),
            predictions=f"{self._predictions.logits} against {self._predictions.source}" if self._predictions else None,
            reference=self._reference,
            sides=sides,
            notes=self._notes,
            float64=self._float64,
        )

    def _time(self, pl_module: LightningModule) -> LatencyResult | None:
        if not self._calls:
            self._console.print("There are no times: the step calls no network of the module.")
            return None
        network, inputs = self._network(pl_module)
        parts = {}  # as the fused network has them, without CUDA graphs, into which nobody can look
        for name, part in next(iter(self._fused.values()), {}).items():
            fused = isinstance(part, tritonnn.FusedNetwork)
            parts[name] = tritonnn.fuse(pl_module.get_submodule(name)) if fused else part
        return measure(
            network,
            inputs,
            self._variants,
            dict(zip(self._fused, self._fused_networks(), strict=True)),
            (self._calling(parts), parts) if parts else None,
            self.budget_s,
            self.time_interpreter,
            self._progress.tell,
        )

    def _report(self, trainer: Trainer, pl_module: LightningModule, proof: Proof) -> None:
        if trainer.progress_bar_callback:  # it stays above the tables
            trainer.progress_bar_callback.teardown(trainer, pl_module, self._stage)
        latency = self._time(pl_module) if self.latency else None
        self._progress.stop()
        console = self._console
        self.result = EvaluationResult(
            checkpoint=self._checkpoint,
            environment=environment(pl_module.device),
            flags=flags(),
            triton_layers=", ".join([" ".join(self.layers), *self._fused]),
            precision=trainer.precision,
            memory_format=_name(self._format),
            batch_size=self._batch_size,
            processes=trainer.world_size,
            parameters={k: v for k, v in pl_module.hparams.items() if isinstance(v, str | int | float | bool)},
            proof=proof,
            latency=latency,
            network=name_of_network(pl_module),
            epochs=self.epochs,
        )
        report.print_to(console, self.result)
        if self._folder is None:
            console.print("Nothing was written: this was a dry run, or the Trainer has no logger and log_dir is None.")
            return
        with TemporaryDirectory(dir=self._folder) as new:
            self.result.write_json(Path(new, "results.json"))
            Path(new, "results.md").write_text(report.markdown(self.result))
            dashboard.write(self.result, Path(new))
            if self.trace and self._calls:
                write_traces(Path(new), self._calls_to_trace(pl_module))
            _replace(Path(new), self._folder)
        how_to_open = [dashboard.how_to_open(self._folder), *([how_to_open_traces(self._folder)] if self.trace else [])]
        console.print("\n".join(how_to_open), markup=False, highlight=False, soft_wrap=True)

    def _calls_to_trace(self, pl_module: LightningModule) -> dict[str, Callable[[], object]]:
        """A batch through PyTorch's layers, through the last variant of Triton's, and through the fused network."""
        network, inputs = self._network(pl_module)
        calls: dict[str, Callable[[], object]] = {"pytorch": partial(network, *inputs)}
        for layers in list(self._variants.values())[-1:]:
            swapped = twin(network)
            tritonnn.swap(swapped, layers=layers)
            calls["triton"] = partial(swapped, *inputs)
        for name, fused in zip(self._fused, self._fused_networks(), strict=True):
            calls[name] = partial(fused, *inputs)
        return calls

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
    remove_traces(folder)
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


def _fusions(networks: Mapping[str, nn.Module]) -> tuple[list[str], dict[str, str], dict[str, dict[str, int]]]:
    """Of fused networks by name: what was done, which layers stayed for what reason, and which fell back."""
    done: list[str] = []
    stayed: dict[str, str] = {}
    fallbacks: dict[str, dict[str, int]] = {}
    for part, network in networks.items():
        if isinstance(network, tritonnn.FusedNetwork):
            fusion = network.report
            done += [*fusion.fused.values(), *fusion.swapped.values()]
            untraced = {name: f"not traced: {reason}" for name, reason in fusion.untraced.items()}
            stayed |= {_join(part, name): reason for name, reason in (fusion.stayed | untraced).items()}
            fallbacks |= {_join(part, name): calls for name, calls in fusion.fallbacks.items()}
    return done, stayed, fallbacks


def _join(part: str, name: str) -> str:
    return ".".join(filter(None, (part, name)))


def _reference(model: nn.Module, exact: bool) -> str | None:
    """The higher precision in which errors are told."""
    if not exact:
        return "float32"
    types = {parameter.dtype for parameter in model.parameters()}
    return "float64" if torch.float64 not in types else None


def _arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[Any]:
    """Gives a function that takes the generators back to where they are now, as they are again in the end.

    It returns whether numbers had been drawn.
    """
    cpu, gpu = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> bool:
        drawn = not torch.equal(torch.get_rng_state(), cpu)
        torch.set_rng_state(cpu)
        if gpu is not None:
            drawn |= not torch.equal(torch.cuda.get_rng_state(device), gpu)
            torch.cuda.set_rng_state(gpu, device)
        return drawn

    try:
        yield rewind
    finally:
        rewind()


def _sum_over_processes(count: int, device: torch.device) -> int:
    total = torch.tensor(count, device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return int(total)


def _memory_format(model: nn.Module) -> torch.memory_format:
    channels_last = any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in model.parameters()
    )
    return torch.channels_last if channels_last else torch.contiguous_format


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
