"""The callback that swaps Triton's layers into a network under test, proves that nothing changed and times them."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn

import tritonnn
from lit_modules import dashboard, report
from lit_modules.checkpoint import weights_digest
from lit_modules.environment import environment, flags
from lit_modules.epoch_comparison import EpochComparison
from lit_modules.evaluation_result import Epoch, Evaluated, EvaluationResult, Proof
from lit_modules.evaluation_run import EvaluationRun, Options, memory_format_of, name_of_format
from lit_modules.predictions import Inputs, Labels
from lit_modules.progress import Progress
from lit_modules.side import STEPS
from lit_modules.traces import how_to_open_traces, remove_traces, write_traces

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
        kinds = [layers] if isinstance(layers, str) else list(layers)
        check_layers(kinds)
        self.channels_last = channels_last
        if cuda_graph and not fuse:
            raise ValueError("cuda_graph is for the fused network: it needs fuse")
        self.log_dir = log_dir
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1 or None, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs
        self.options = Options(kinds, fuse, cuda_graph, tune, latency, inputs, labels, budget_s, time_interpreter)
        together = "all" if kinds in (["each"], ["none"]) else layers
        self.epochs: list[Epoch] = []
        self._curves = None
        if every_n_epochs:
            self._curves = EpochComparison(self.epochs, together, every_n_epochs, time_interpreter)
        self.trace = trace
        self.progress = progress
        self.result: EvaluationResult | None = None
        self._stage: str | None = None
        self._checkpoint: Evaluated | None = None
        self._made: Path | None = None
        self._training: dict[nn.Module, bool] = {}
        self._was_contiguous = False
        self._run: EvaluationRun | None = None
        self._progress: Progress | None = None

    def check_device(self, device: torch.device) -> None:
        """Raises MisconfigurationException where what is to be evaluated cannot run on the device."""
        runs = device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret)
        if not runs and (self.options.layers != ["none"] or self.options.fuse):
            raise MisconfigurationException(
                f"Triton's layers run on a GPU, or on a CPU in Triton's interpreter, and the Trainer runs on {device}: "
                "leave the accelerator to it, or set TRITON_INTERPRET=1 before Python starts"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage if stage in STEPS else None
        if self._stage or self._curves:
            self.check_device(trainer.strategy.root_device)
        if self._stage is None:
            return
        self._checkpoint = None
        self._made = None
        self._training = {module: module.training for module in pl_module.modules()}
        self._was_contiguous = memory_format_of(pl_module) == torch.contiguous_format
        if self.channels_last:
            pl_module.to(memory_format=torch.channels_last)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        weights = weights_digest(checkpoint["state_dict"])
        self._checkpoint = Evaluated(str(trainer.ckpt_path), checkpoint.get("epoch"), weights)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, trainer.test_dataloaders)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._curves and trainer.state.fn == "fit":
            self._curves.start(trainer, pl_module, memory_format_of(pl_module))
        self._start(trainer, pl_module, trainer.val_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, trainer.predict_dataloaders)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *indices: int) -> None:
        self._start_batch(batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *indices: int
    ) -> None:
        self._start_batch(batch)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *indices: int) -> None:
        self._start_batch(batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        self._end_batch(indices)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        if self._curves and trainer.state.fn == "fit":
            self._curves.add(batch, indices, pl_module.device)
        self._end_batch(indices)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        self._end_batch(indices)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._curves and trainer.state.fn == "fit":
            self._curves.end(trainer, self._folder_to_write(trainer))
        self._end(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._curves:
            self._curves.close()
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
        self._folder = self._folder_to_write(trainer)
        self._console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
        self._progress = Progress(self._console, self.progress and trainer.is_global_zero)
        self._run = EvaluationRun(self.options, trainer, pl_module, self._stage, dataloaders, self._progress)

    def _start_batch(self, batch: Any) -> None:
        if self._run:
            self._run.start_batch(batch)

    def _end_batch(self, indices: tuple[int, ...]) -> None:
        if self._run:
            self._run.end_batch(indices)

    def _restore(self, pl_module: LightningModule) -> None:
        if self._progress:
            self._progress.stop()
        for module, training in self._training.items():
            module.training = training
        if self._training and self.channels_last and self._was_contiguous:
            pl_module.to(memory_format=torch.contiguous_format)
        self._training = {}
        self._run = None

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = self._run
        if run is None:
            return
        if not run.has_seen_samples:
            raise MisconfigurationException("TritonEvaluation has seen no samples: is the data set empty?")
        proof = run.proof()
        run.unwatch()
        with trainer.precision_plugin.forward_context():
            if trainer.is_global_zero:
                self._report(trainer, pl_module, run, proof)
        trainer.strategy.barrier("triton_evaluation")

    def _report(self, trainer: Trainer, pl_module: LightningModule, run: EvaluationRun, proof: Proof) -> None:
        if trainer.progress_bar_callback:  # it stays above the tables
            trainer.progress_bar_callback.teardown(trainer, pl_module, self._stage)
        console = self._console
        latency = run.times() if self.options.latency and run.has_calls else None
        if self.options.latency and not run.has_calls:
            console.print("There are no times: the step calls no network of the module.")
        self._progress.stop()
        self.result = EvaluationResult(
            checkpoint=self._checkpoint,
            environment=environment(pl_module.device),
            flags=flags(),
            triton_layers=", ".join([" ".join(self.options.layers), *run.fused]),
            precision=trainer.precision,
            memory_format=name_of_format(run.format),
            batch_size=run.batch_size,
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
            if self.trace and run.has_calls:
                write_traces(Path(new), run.calls_to_trace())
            _replace(Path(new), self._folder)
        how_to_open = [dashboard.how_to_open(self._folder), *([how_to_open_traces(self._folder)] if self.trace else [])]
        console.print("\n".join(how_to_open), markup=False, highlight=False, soft_wrap=True)

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
