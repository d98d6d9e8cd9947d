"""One run of a test, a validation or a prediction: the sides of the comparison, what they give, and their proof."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

import tritonnn
from lit_modules.comparison import Comparison, Outputs
from lit_modules.environment import is_exact, resolution, strict_float32
from lit_modules.evaluation_result import LatencyResult, Proof, SideResult, Variant
from lit_modules.float64_errors import Float64Errors, float64_errors
from lit_modules.measurement import measure
from lit_modules.places import Places
from lit_modules.predictions import Inputs, Labels, Predictions, Uses, chosen, find_predictions
from lit_modules.progress import Progress
from lit_modules.side import STEPS, Call, Replayed, Side, in_format, modules_called, named_outputs, replay
from lit_modules.trees import batch_size, mapped, named_tensors
from lit_modules.verdict import judge_variant
from tritonnn.latency import twin


@dataclass(frozen=True)
class Options:
    """The options of `TritonEvaluation` that decide what is compared and timed; they are explained there."""

    layers: Sequence[str]
    fuse: bool
    cuda_graph: bool
    tune: bool
    latency: bool
    inputs: Inputs | None
    labels: Labels | None
    budget_s: float
    time_interpreter: bool


class EvaluationRun:
    """PyTorch's side, the variants' and the yardstick's: each a copy of the module that makes its own steps.

    For every batch `start_batch` comes before the module's own step and `end_batch` after it. Then there is a `proof`
    and, if asked for, the times and a trace of what the steps of the first batch called.

    Args:
        options: what to compare.
        trainer: the module's.
        module: left as it is.
        stage: "test", "validate" or "predict".
        dataloaders: of the stage.
        progress: is told of every step.
    """

    def __init__(
        self,
        options: Options,
        trainer: Trainer,
        module: LightningModule,
        stage: str,
        dataloaders: Any,
        progress: Progress,
    ) -> None:
        self.options, self.trainer, self.module, self.stage = options, trainer, module, stage
        self.format = memory_format_of(module)
        self._other_format = torch.contiguous_format if self.format == torch.channels_last else torch.channels_last
        with trainer.precision_plugin.forward_context():
            self._exact = is_exact(module, module.device)
            self._resolution = resolution(module, module.device)
        self._reference = _reference(module, self._exact)
        self._variants = _variants(options.layers, module)
        self._sides: dict[str, Side] = {}
        self._fused: dict[str, dict[str, nn.Module]] = {}
        self._calls: list[Call] = []
        self._reports: dict[str, tritonnn.SwapReport] = {}
        self._comparison: Comparison | None = None
        self._predictions: Predictions | None = None
        self._notes: list[str] = []
        self._places = Places(dataloaders)
        self._batch: Any = None
        self.batch_size = 0
        self._samples = 0
        batches = sum({"test": trainer.num_test_batches, "validate": trainer.num_val_batches}.get(stage, []))
        self._batches, self._all_batches = 0, int(batches) if 0 < batches < math.inf else None
        self._float64: Float64Errors | None = None
        self._progress = progress

    @property
    def fused(self) -> list[str]:
        """The names of the variants that are fused."""
        return list(self._fused)

    @property
    def has_seen_samples(self) -> bool:
        return self._comparison is not None

    @property
    def has_calls(self) -> bool:
        """Whether the steps call anything that can be timed."""
        return bool(self._calls)

    def start_batch(self, batch: Any) -> None:
        """Keeps the batch, and copies the module for each side, as they are before the module's step."""
        self._batch = mapped(torch.clone, batch)
        if self._sides:
            return

        def side(memory_format: torch.memory_format = self.format, context: Any = None) -> Side:
            context = context or self.trainer.precision_plugin.forward_context
            return Side(self.module, self.trainer, self.stage, context, memory_format)

        if self._reference:
            dtype = getattr(torch, self._reference)
            exact = side(context=lambda: strict_float32(self.module.device))
            change = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
            self._sides[self._reference] = exact.with_parameters(change, dtype)
        self._sides["pytorch"] = side()
        other = side(self._other_format)
        self._sides["yardstick"] = other.with_parameters(lambda x: in_format(x, self._other_format))
        for name, layers in self._variants.items():
            self._sides[name] = side()
            self._reports[name] = tritonnn.swap(self._sides[name].module, layers)
        if self.options.fuse:
            self._sides["fused, CUDA graph" if self.options.cuda_graph else "fused"] = side()

    def end_batch(self, indices: tuple[int, ...]) -> None:
        """Has every side make its step with the batch; `indices` are the batch's and, of several, its loader's."""
        batch, self._batch = self._batch, None
        places, counted = self._places.of(batch_size(batch), indices[1] if len(indices) > 1 else 0)
        if not counted.all():
            batch = mapped(lambda x: x[counted.to(x.device)] if x.dim() and len(x) == len(counted) else x, batch)
            places = places[counted]
        if not len(places):
            return
        with _same_random_numbers(self.module.device) as rewind:
            outputs = {}
            if first := self._comparison is None:
                outputs["pytorch"] = self._first_step(batch, indices)
                if rewind() and self._reference:
                    self._without_reference(f"the step draws random numbers, which are others in {self._reference}")
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
        self._comparison.add(outputs, labels, places.to(self.module.device))
        if first:
            self._progress.tell("compiling", "", len(self._sides), len(self._sides))
            if self._calls:
                network, inputs = self._network()
                self._float64 = float64_errors(network, inputs, outputs)
        self._batches += 1
        self._progress.tell("proving", "", self._batches, self._all_batches)

    def _first_step(self, batch: Any, indices: tuple[int, ...]) -> Outputs:
        """PyTorch's side of the first batch: finds out which modules the step calls, and what its predictions are."""
        side, own = self._sides["pytorch"], mapped(torch.clone, batch)
        side.watch([name for name, _ in side.module.named_modules()] if self.options.inputs is None else [])
        with (uses := Uses(side, own)):
            outputs = self._step("pytorch", own, indices)
        self._calls = side.calls
        step = f"{type(self.module).__name__}.{STEPS[self.stage]}"
        if not outputs and not side.logged:
            raise MisconfigurationException(
                f"{step} calls no network of the module and logs nothing, so there is nothing to compare: say what "
                "forward takes of a batch with TritonEvaluation(inputs=...)"
            )
        labels = self.options.labels if self.stage != "predict" or self.options.labels is not None else False
        self._predictions = find_predictions(uses, batch, side.calls, labels)
        self._comparison = self._comparison_for(outputs)
        self.batch_size = batch_size(batch)
        called = modules_called(side.calls)
        for other in self._sides.values():
            other.watch(called)
        self._fuse(called)
        if self.module.device.type == "cuda" and self._variants and self._calls:
            self._compile()
        if self.options.tune:
            self._tune()
        return outputs

    def _step(self, name: str, batch: Any, indices: tuple[int, ...]) -> Outputs:
        """One side's outputs for a batch of its own."""
        side = self._sides[name]
        returned = side.step(batch, indices)
        if self.options.inputs is not None:
            side.watch([""])
            side.forward(*_arguments(chosen(batch, self.options.inputs, "inputs")))
        outputs = dict(named_outputs(side.calls))
        if self.stage == "predict":
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

    def _fuse(self, called: Sequence[str]) -> None:
        """Puts the fused networks in place of those that the step calls, on their side."""
        for name in [name for name in self._sides if self.options.fuse and name.startswith("fused")]:
            side = self._sides[name]
            self._fused[name] = {part: self.module.get_submodule(part) for part in called}
            for part, module in self._fused[name].items():
                if any(tritonnn.kind_of(layer) for layer in module.modules()):
                    fused = tritonnn.fuse(module, cuda_graph=self.options.cuda_graph)
                    self._fused[name][part] = fused
                    side.module.get_submodule(part).__dict__["forward"] = fused.__call__

    def _compile(self) -> None:
        """What the swapped layers launch, beside each other; each side's step would compile one after the other."""
        done = 0

        def advance(total: int) -> None:
            nonlocal done
            done += 1
            self._progress.tell("ahead", "", done, total)

        kinds = [[layers] if isinstance(layers, str) else list(layers) for layers in self._variants.values()]
        with self.trainer.precision_plugin.forward_context():
            network, inputs = self._network()
            tritonnn.compile_swapped(
                network, *inputs, layers=sum(kinds, []), in_graphs=self.options.latency, advance=advance
            )

    def _network(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """A module with the layers of the run's, and inputs, that make the calls of the first step again."""
        (call, *more) = self._calls
        if call.name == "" and not more and not call.kwargs and all(isinstance(x, Tensor) for x in call.args):
            return self.module, call.args
        return replay(self.module, self._calls), self._any_input()

    def _any_input(self) -> tuple[Tensor, ...]:
        return (next(x for call in self._calls for _, x in named_tensors((call.args, call.kwargs))),)

    def _fused_networks(self) -> list[nn.Module]:
        """Modules that make the calls of the first step again with the fused networks."""
        return [self._calling(parts) for parts in self._fused.values()]

    def _calling(self, parts: dict[str, nn.Module]) -> nn.Module:
        """What makes the calls of the first step again with these in place of the module's parts."""
        if len(self._calls) == 1 and not self._calls[0].kwargs:
            return next(iter(parts.values()))
        return Replayed(parts, self._calls)

    def _tune(self) -> None:
        report = tritonnn.TuningReport()
        with self.trainer.precision_plugin.forward_context():
            network, inputs = self._network()
            for layers in self._variants.values():
                report += tritonnn.tune(network, inputs, layers, progress=self.trainer.is_global_zero)
            for fused in self._fused_networks():
                report += tritonnn.tune(fused, inputs, progress=self.trainer.is_global_zero)
        if self.trainer.is_global_zero:
            print(f"Tuning: {report.summary}")

    def proof(self) -> Proof:
        """After the last batch, and on all processes, over which it reduces."""
        comparison = self._comparison
        comparison.flush()
        qualities, agreements, errors = comparison.qualities(), comparison.agreements(), comparison.errors()
        numbers = comparison.numbers()
        sides = {
            name: SideResult(side.metrics() if self.stage != "predict" else {}, numbers.get(name, {}))
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
                stayed=_by_reason(_without_metrics(report.stayed, self.module)),
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
            samples=_sum_over_processes(self._samples, self.module.device),
            exact=self._exact,
            pytorch=qualities.get("pytorch"),
            yardstick=qualities.get("yardstick"),
            yardstick_format=name_of_format(self._other_format),
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

    def unwatch(self) -> None:
        """The sides are not needed any more."""
        for side in self._sides.values():
            side.unwatch()

    def times(self) -> LatencyResult:
        """Times what the steps of the first batch called."""
        network, inputs = self._network()
        parts = {}  # as the fused network has them, without CUDA graphs, into which nobody can look
        for name, part in next(iter(self._fused.values()), {}).items():
            fused = isinstance(part, tritonnn.FusedNetwork)
            parts[name] = tritonnn.fuse(self.module.get_submodule(name)) if fused else part
        return measure(
            network,
            inputs,
            self._variants,
            dict(zip(self._fused, self._fused_networks(), strict=True)),
            (self._calling(parts), parts) if parts else None,
            self.options.budget_s,
            self.options.time_interpreter,
            self._progress.tell,
        )

    def calls_to_trace(self) -> dict[str, Callable[[], object]]:
        """A batch through PyTorch's layers, through the last variant of Triton's, and through the fused network."""
        network, inputs = self._network()
        calls: dict[str, Callable[[], object]] = {"pytorch": partial(network, *inputs)}
        for layers in list(self._variants.values())[-1:]:
            swapped = twin(network)
            tritonnn.swap(swapped, layers=layers)
            calls["triton"] = partial(swapped, *inputs)
        for name, fused in zip(self._fused, self._fused_networks(), strict=True):
            calls[name] = partial(fused, *inputs)
        return calls


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
    """What was done in the fused networks, given by name, which layers stayed for what reason, and which fell back."""
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


def memory_format_of(model: nn.Module) -> torch.memory_format:
    channels_last = any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in model.parameters()
    )
    return torch.channels_last if channels_last else torch.contiguous_format


def name_of_format(memory_format: torch.memory_format) -> str:
    return "channels_last" if memory_format == torch.channels_last else "contiguous"
