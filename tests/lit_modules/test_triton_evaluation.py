"""The evaluation callback: the proof, the state it leaves, and what it writes."""

import json
import math
from pathlib import Path

import pytest
import torch
import triton
from helpers.tiny_classifier import TinyClassifier, evaluation_trainer, loader, random_images
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import tritonnn
from lit_modules import comparison, measurement, triton_evaluation
from lit_modules.agreement import AgreementMeter, Quality
from lit_modules.checkpoint import weights_digest
from lit_modules.classifier import MeanLoss, accuracies
from lit_modules.evaluation_result import Evaluated, EvaluationResult, timing
from lit_modules.triton_evaluation import TritonEvaluation
from tritonnn.layers.fused.linear import FusedPooledLinear

CLOCK = "device" if torch.cuda.is_available() else "interpreter"


def evaluate(log_dir: Path, model: TinyClassifier | None = None, data: Dataset | None = None, **arguments):
    evaluation = TritonEvaluation(**{"latency": False, "log_dir": log_dir} | arguments)
    evaluation_trainer(evaluation).test(model or TinyClassifier(), loader(data or random_images(10)), verbose=False)
    return evaluation.result


def break_layer(monkeypatch: pytest.MonkeyPatch, layer: type, change) -> None:
    right = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x: change(right(self, x)))


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def strides(model: nn.Module) -> list[tuple[int, ...]]:
    return [parameter.stride() for parameter in model.parameters()]


class TestProof:
    def test_the_triton_layers_pass(self, tmp_path):
        data = random_images(10)
        result = evaluate(tmp_path, data=data)
        images, labels = data.tensors
        with torch.inference_mode():
            logits = TinyClassifier().eval()(images)
        expected = Quality(
            (logits.argmax(1) == labels).float().mean().item(),
            (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item(),
            nn.functional.cross_entropy(logits, labels).item(),
        )
        (variant,) = result.proof.variants
        assert result.passed and result.proof.exact and result.proof.samples == 10
        for quality in (result.proof.pytorch, result.proof.yardstick, variant.quality):
            assert vars(quality) == pytest.approx(vars(expected), abs=1e-5)
        assert variant.agreement.differing == 0
        assert 0 < variant.agreement.largest_logit_difference < 1e-5
        assert variant.swapped == {
            kind: 1 for kind in ("conv2d", "batch_norm2d", "relu", "max_pool2d", "avg_pool2d", "linear")
        }
        assert variant.stayed == {"no Triton layer for Flatten": ["layers.5"]}
        assert variant.fallbacks == {}

    def test_metrics_are_no_layers_that_stayed(self, tmp_path):
        class Metered(TinyClassifier):
            def __init__(self) -> None:
                super().__init__()
                self.metrics = accuracies(6)
                self.loss = MeanLoss()

        (variant,) = evaluate(tmp_path, model=Metered()).proof.variants
        assert variant.stayed == {"no Triton layer for Flatten": ["layers.5"]}

    def test_a_wrong_layer_fails_and_names_the_samples(self, tmp_path, monkeypatch):
        break_layer(monkeypatch, tritonnn.TritonLinear, lambda y: -y)
        data = random_images(10)
        result = evaluate(tmp_path, data=data)
        agreement = result.proof.variants[0].agreement
        assert not result.passed and result.proof.variants[0].verdict.reason.startswith("10 of 10 predictions differ")
        with torch.inference_mode():
            logits = TinyClassifier().eval()(data.tensors[0])
        best = logits.topk(2).values
        for example in agreement.examples:
            assert example.label == data.tensors[1][example.sample]
            assert example.pytorch == logits[example.sample].argmax()
            assert example.other == logits[example.sample].argmin()
            assert example.margin == pytest.approx((best[example.sample, 0] - best[example.sample, 1]).item(), abs=1e-5)
        assert sorted(example.sample for example in agreement.examples) == list(range(10))
        assert agreement.largest_logit_difference == pytest.approx(2 * logits.abs().max().item(), rel=1e-4)

    def test_one_wrong_kind_fails_alone(self, tmp_path, monkeypatch):
        break_layer(monkeypatch, tritonnn.TritonReLU, lambda y: -100 * y)
        result = evaluate(tmp_path, layers="each")
        passed = {variant.name: variant.verdict.passed for variant in result.proof.variants}
        assert list(passed) == [*tritonnn.KINDS, "all"]
        assert [name for name, held in passed.items() if not held] == ["relu", "all"]
        assert not result.passed

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_value_that_is_not_finite_on_one_side_fails(self, tmp_path, monkeypatch, value):
        break_layer(monkeypatch, tritonnn.TritonLinear, lambda y: y.index_fill(1, y[0].argmin(), -value))
        result = evaluate(tmp_path)
        assert not result.passed and result.proof.variants[0].agreement.non_finite == 10
        json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)

    def test_nan_on_both_sides_is_agreement(self, tmp_path):
        model = TinyClassifier()
        model.layers[-1].bias.data[0] = math.nan
        assert evaluate(tmp_path, model).passed

    def test_half_precision_is_not_exact(self, tmp_path):
        evaluation = TritonEvaluation("relu", latency=True, log_dir=tmp_path, budget_s=0)
        evaluation_trainer(evaluation, precision="bf16-mixed").test(
            TinyClassifier(), loader(random_images(8)), verbose=False
        )
        result = evaluation.result
        assert result.passed and not result.proof.exact and result.precision == "bf16-mixed"
        assert {row.kind: row.dtype for row in result.latency.layers} == {
            "conv2d": "float32",
            **dict.fromkeys(("batch_norm2d", "relu", "max_pool2d", "avg_pool2d", "linear"), "bfloat16"),
        }

    def test_none_compares_pytorch_with_itself(self, tmp_path):
        result = evaluate(tmp_path, layers="none", latency=True, budget_s=0)
        assert result.passed and result.proof.variants == []
        assert all(row.triton is None for row in result.latency.layers)

    def test_several_kinds_are_swapped_together(self, tmp_path):
        (variant,) = evaluate(tmp_path, layers=["conv2d", "relu"]).proof.variants
        assert variant.name == "conv2d relu" and variant.swapped == {"conv2d": 1, "relu": 1}

    @pytest.mark.parametrize("layers", ["none", "relu"])
    def test_the_fused_network_is_proved_and_timed(self, tmp_path, layers):
        result = evaluate(tmp_path, layers=layers, fuse=True, latency=True, budget_s=0, time_interpreter=True)
        *swapped, fused = result.proof.variants
        assert result.passed and fused.fused and fused.agreement.differing == 0
        assert fused.swapped == {"conv2d + batch_norm2d + relu": 1, "avg_pool2d + linear": 1, "max_pool2d": 1}
        assert fused.stayed == {} and fused.fallbacks == {}
        assert result.proof.main.name == ("fused" if layers == "none" else "relu")
        assert list(result.latency.networks) == [variant.name for variant in (*swapped, fused)]
        assert result.latency.networks["fused"][CLOCK].triton > 0
        kernels = [kernel.what for kernel in result.latency.kernels]
        assert kernels == ["conv2d + batch_norm2d + relu", "max_pool2d", "avg_pool2d + linear"]
        assert [kernel.layers for kernel in result.latency.kernels] == [[0, 1, 2], [3], [4, 5]]
        network = result.latency.breakdowns[CLOCK].network
        assert network.triton == (None if layers == "none" else result.latency.networks["relu"][CLOCK].triton)
        assert "| fused |" in (tmp_path / "results.md").read_text()

    def test_a_wrong_fused_network_fails(self, tmp_path, monkeypatch):
        break_layer(monkeypatch, FusedPooledLinear, lambda y: -y)
        result = evaluate(tmp_path, layers="all", fuse=True)
        assert [variant.verdict.passed for variant in result.proof.variants] == [True, False] and not result.passed

    @pytest.mark.gpu
    def test_swapped_layers_are_compiled_before_they_run(self, tmp_path, monkeypatch):
        """All of them, as in the proof and as they are timed alone, at once.

        No other test has so wide a network, whose kernels this process would have.
        """
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        compiled, ahead, compile_swapped = [], [], tritonnn.compile_swapped
        monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **of: compiled.append(of["src"].name))

        def noting(*args, **kwargs):
            compile_swapped(*args, **kwargs)
            ahead.append(len(compiled))

        monkeypatch.setattr(tritonnn, "compile_swapped", noting)
        evaluate(tmp_path, TinyClassifier(width=24), random_images(8), layers="each", latency=True, budget_s=0.01)
        assert ahead == [len(compiled)] and compiled

    @pytest.mark.gpu
    def test_the_fused_network_in_cuda_graphs(self, tmp_path):
        result = evaluate(tmp_path, layers="all", fuse=True, cuda_graph=True, latency=True, budget_s=0.01)
        assert result.passed and result.proof.variants[-1].name == "fused, CUDA graph"
        assert result.latency.networks["fused, CUDA graph"]["eager"].triton > 0

    @pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
    def test_batches_are_compared_together(self, tmp_path, monkeypatch, precision):
        updates, update = [], AgreementMeter.update
        monkeypatch.setattr(
            AgreementMeter, "update", lambda self, *of: (updates.append(of[-1].tolist()), update(self, *of))
        )
        break_layer(monkeypatch, tritonnn.TritonLinear, lambda y: -y)
        proofs = []
        for together, places in (1, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]), (5, [[*range(8)], [8, 9]]):
            monkeypatch.setattr(comparison, "COMPARED_TOGETHER", together)
            evaluation = TritonEvaluation(latency=False, log_dir=tmp_path, fuse=True)
            trainer = evaluation_trainer(evaluation, precision=precision)
            trainer.test(TinyClassifier(), loader(random_images(10)), verbose=False)
            proofs.append(evaluation.result.proof)
            meters = 3 if precision == "32-true" else 6  # yardstick, swapped, fused; also float32 and both errors
            assert sorted(updates) == sorted(places * meters)
            updates.clear()
        batch_by_batch, together = proofs
        assert together.samples == batch_by_batch.samples == 10 and not together.passed
        assert vars(together.pytorch) == pytest.approx(vars(batch_by_batch.pytorch), abs=1e-6)
        for a, b in zip(together.variants, batch_by_batch.variants, strict=True):
            assert vars(a.quality) == pytest.approx(vars(b.quality), abs=1e-6)
            assert a.agreement.examples == b.agreement.examples
            assert a.agreement.mean_logit_difference == pytest.approx(b.agreement.mean_logit_difference)

    def test_a_fallback_is_counted_over_the_batches(self, tmp_path):
        class Complex(nn.Linear):
            def __init__(self) -> None:
                super().__init__(32, 6)
                self.inner = nn.Linear(32, 6, dtype=torch.complex64)

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x.to(torch.complex64)).real

        model = TinyClassifier()
        model.layers[6] = Complex()
        (variant,) = evaluate(tmp_path, model, random_images(10)).proof.variants
        assert variant.fallbacks == {"layers.6.inner": {"dtype torch.complex64": 3}}
        assert "layers.6.inner fell back 3 times: dtype torch.complex64" in (tmp_path / "results.md").read_text()
        assert variant.stayed["Complex is a subclass of Linear, with behaviour of its own"] == ["layers.6"]

    def test_samples_of_several_loaders_are_numbered_on(self, tmp_path, monkeypatch):
        break_layer(monkeypatch, tritonnn.TritonLinear, lambda y: -y)
        evaluation = TritonEvaluation(latency=False, log_dir=tmp_path)
        loaders = [loader(random_images(5)), loader(random_images(3))]
        evaluation_trainer(evaluation).test(TinyClassifier(), loaders, verbose=False)
        examples = evaluation.result.proof.variants[0].agreement.examples
        assert sorted(example.sample for example in examples) == list(range(8))


class TestTuning:
    def test_each_variant_before_the_first_proof(self, tmp_path, monkeypatch, capsys):
        """With the layers of the variant, on the first batch as the networks get it."""
        steps = []

        def tune(model: nn.Module, inputs: tuple, layers="all", progress=False) -> tritonnn.TuningReport:
            (images,) = inputs
            last_channels = images.is_contiguous(memory_format=torch.channels_last)
            steps.append((type(model).__name__, tuple(images.shape), last_channels, layers))
            return tritonnn.TuningReport()

        def prove(*arguments) -> None:
            steps.append("proof")
            right(*arguments)

        right = comparison.Comparison.flush
        monkeypatch.setattr(tritonnn, "tune", tune)
        monkeypatch.setattr(comparison.Comparison, "flush", prove)
        monkeypatch.setattr(comparison, "COMPARED_TOGETHER", 1)
        evaluate(tmp_path, layers=["conv2d", "linear"], fuse=True, channels_last=True, tune=True)
        images = (4, 3, 8, 8), True
        assert steps[:3] == [
            ("TinyClassifier", *images, ["conv2d", "linear"]),
            ("FusedNetwork", *images, "all"),
            "proof",
        ]
        assert set(steps[3:]) == {"proof"}
        assert "Tuning: no convolution was tuned" in capsys.readouterr().out

    def test_only_where_it_is_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tritonnn, "tune", None)
        assert evaluate(tmp_path).passed


class TestRestored:
    def test_after_a_test(self, tmp_path):
        model = TinyClassifier().train()
        model.layers[1].eval()
        before = classes(model), strides(model), [module.training for module in model.modules()]
        evaluate(tmp_path, model, latency=True, budget_s=0, channels_last=True)
        assert (classes(model), strides(model), [module.training for module in model.modules()]) == before

    @pytest.mark.parametrize("where", ["forward", "timing"])
    def test_after_an_error(self, tmp_path, monkeypatch, where):
        def fail(*args, **kwargs):
            raise ZeroDivisionError

        model = TinyClassifier().train()
        before = classes(model), strides(model), [module.training for module in model.modules()]
        if where == "forward":
            monkeypatch.setattr(tritonnn.TritonLinear, "forward", fail)
        else:
            monkeypatch.setattr(measurement, "time_networks", fail)
        with pytest.raises(ZeroDivisionError):
            evaluate(tmp_path, model, latency=True, budget_s=0, channels_last=True)
        assert (classes(model), strides(model), [module.training for module in model.modules()]) == before
        assert not list(tmp_path.iterdir())

    def test_channels_last_reaches_the_layers(self, tmp_path):
        result = evaluate(tmp_path, layers="relu", latency=True, budget_s=0, channels_last=True)
        assert result.memory_format == "channels_last" and result.proof.yardstick_format == "contiguous"
        assert {row.memory_format for row in result.latency.layers[:4]} == {"channels_last"}

    def test_a_channels_last_module_stays_so(self, tmp_path):
        model = TinyClassifier().to(memory_format=torch.channels_last)
        before = strides(model)
        assert evaluate(tmp_path, model).memory_format == "channels_last"
        assert strides(model) == before


def test_nothing_is_timed_during_the_accuracy_pass(tmp_path, monkeypatch):
    seen = []

    class Watched(TinyClassifier):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(len(images))
            return super().forward(images)

    def no_time(model, images, **arguments):
        seen.append("timing")
        raise InterruptedError

    monkeypatch.setattr(measurement, "time_layers", no_time)
    with pytest.raises(InterruptedError):
        evaluate(tmp_path, Watched(), random_images(6), latency=True)
    # A batch goes through test_step, PyTorch, the yardstick and Triton, the first also through PyTorch in float64 and,
    # on a GPU, once more, to compile ahead.
    ahead = 1 if torch.cuda.is_available() else 0
    assert seen == (5 + ahead) * [4] + 4 * [2] + ["timing"]


@pytest.mark.parametrize(("rank", "places"), [(0, [0, 2, 4, 6]), (1, [1, 3, 5])])
def test_padding_of_a_distributed_sampler_does_not_count(tmp_path, monkeypatch, rank, places):
    break_layer(monkeypatch, tritonnn.TritonLinear, lambda y: -y)
    data = random_images(7)
    sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
    assert len(sampler) == 4
    evaluation = TritonEvaluation(latency=False, log_dir=tmp_path)
    evaluation_trainer(evaluation).test(TinyClassifier(), loader(data, sampler=sampler), verbose=False)
    proof = evaluation.result.proof
    assert proof.samples == len(places)
    assert sorted(example.sample for example in proof.variants[0].agreement.examples) == places
    labels = data.tensors[1][places]
    with torch.inference_mode():
        correct = TinyClassifier().eval()(data.tensors[0][places]).argmax(1) == labels
    assert proof.pytorch.top1 == pytest.approx(correct.float().mean().item())


class Stream(IterableDataset):
    """Does not know its length."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self):
        return iter(self.data)


class TestSeveralLoaders:
    @pytest.mark.parametrize(
        "loaders",
        [
            pytest.param(lambda a, b: [loader(a), loader(b)], id="list"),
            pytest.param(lambda a, b: {"a": loader(a), "b": loader(b)}, id="dictionary"),
            pytest.param(lambda a, b: {"a": loader(a), "b": [loader(b)]}, id="nested"),
            pytest.param(lambda a, b: [loader(Stream(a)), loader(Stream(b))], id="streams"),
            pytest.param(lambda a, b: {"a": loader(Stream(a)), "b": loader(b)}, id="stream and set"),
        ],
    )
    def test_are_one_test_set_after_the_other(self, tmp_path, monkeypatch, loaders):
        break_layer(monkeypatch, tritonnn.TritonLinear, lambda y: -y)
        data = random_images(10)
        parts = TensorDataset(*data[:6]), TensorDataset(*data[6:])
        evaluation = TritonEvaluation(latency=False, log_dir=tmp_path)
        evaluation_trainer(evaluation).test(TinyClassifier(), loaders(*parts), verbose=False)
        agreement = evaluation.result.proof.variants[0].agreement
        assert agreement.samples == agreement.differing == 10
        assert {example.sample: example.label for example in agreement.examples} == dict(
            enumerate(data.tensors[1].tolist())
        )


class TestWriting:
    def test_a_dry_run_writes_nothing(self, tmp_path, capsys):
        evaluation = TritonEvaluation("relu", latency=False, log_dir=tmp_path)
        trainer = evaluation_trainer(evaluation, fast_dev_run=True, default_root_dir=tmp_path)
        trainer.test(TinyClassifier(), loader(random_images(4)), verbose=False)
        assert evaluation.result.passed and not list(tmp_path.iterdir())
        assert "Nothing was written" in capsys.readouterr().out

    def test_without_a_logger_nothing_is_written_unasked(self, tmp_path):
        evaluation = TritonEvaluation("relu", latency=False)
        trainer = evaluation_trainer(evaluation, default_root_dir=tmp_path)
        trainer.test(TinyClassifier(), loader(random_images(4)), verbose=False)
        assert evaluation.result.passed and not list(tmp_path.iterdir())

    def test_an_error_while_writing_leaves_the_earlier_evaluation(self, tmp_path, monkeypatch):
        def full(result: EvaluationResult, log_dir: Path) -> None:
            raise OSError

        evaluate(tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        monkeypatch.setattr(triton_evaluation.dashboard, "write", full)
        with pytest.raises(OSError):
            evaluate(tmp_path, layers="relu")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_weights_that_came_from_no_checkpoint_are_named_by_their_digest(self, tmp_path):
        evaluated = evaluate(tmp_path).checkpoint
        assert evaluated == Evaluated(None, None, weights_digest(TinyClassifier().state_dict()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="spawns processes on the CPU")
def test_two_processes_give_what_one_gives(tmp_path):
    alone = evaluate(tmp_path / "one", data=random_images(7))
    evaluation = TritonEvaluation(latency=True, log_dir=tmp_path / "two", budget_s=0)
    trainer: Trainer = evaluation_trainer(evaluation, strategy="ddp_spawn", devices=2)
    trainer.test(TinyClassifier(), loader(random_images(7)), verbose=False)
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    assert together["processes"] == 2
    assert together["proof"]["samples"] == 7
    assert together["proof"]["pytorch"] == pytest.approx(vars(alone.proof.pytorch), abs=1e-6)
    assert len(together["latency"]["layers"]) == 6
    assert len(list((tmp_path / "two" / "triton").iterdir())) == 1


class TestResult:
    @pytest.fixture(scope="class")
    @staticmethod
    def result(tmp_path_factory) -> EvaluationResult:
        arguments = {"latency": True, "budget_s": 0.01, "time_interpreter": True}
        return evaluate(tmp_path_factory.mktemp("result"), layers="each", **arguments)

    def test_sums_add_up(self, result):
        breakdown = result.latency.breakdowns[CLOCK]
        rows = result.latency.layers
        assert breakdown.layers.pytorch == pytest.approx(sum(timing(row.pytorch, CLOCK).median for row in rows))
        assert breakdown.layers.triton == pytest.approx(sum(timing(row.triton, CLOCK).median for row in rows))
        assert sum(pair.triton for pair in breakdown.kinds.values()) == pytest.approx(breakdown.layers.triton)
        for side in ("pytorch", "triton"):
            network, layers = getattr(breakdown.network, side), getattr(breakdown.layers, side)
            assert getattr(breakdown.unattributed, side) == pytest.approx(network - layers)

    def test_the_interpreter_has_no_speed(self, result):
        pair = result.latency.networks["all"][CLOCK]
        assert pair.speedup == (pair.pytorch / pair.triton if CLOCK == "device" else None)
        assert pair.triton == timing(result.latency.network_timings["all"], CLOCK).median

    def test_layers_are_in_network_order(self, result):
        rows = result.latency.layers
        assert [row.kind for row in rows] == ["conv2d", "batch_norm2d", "relu", "max_pool2d", "avg_pool2d", "linear"]
        assert [row.index for row in rows] == list(range(6))
        assert [row.shape for row in rows][:1] == [(4, 3, 8, 8)]

    def test_the_environment_is_told(self, result):
        assert {"device", "torch", "triton", "cudnn", "lightning", "command", "date"} <= result.environment.keys()
        assert result.flags["tf32 in matmul"] == "off"
        assert result.parameters == {"width": 8} and result.batch_size == 4


def test_a_cuda_graph_of_what_is_not_fused_is_an_error():
    with pytest.raises(ValueError, match="it needs fuse"):
        TritonEvaluation(cuda_graph=True)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("conv3d", "unknown kind of layer 'conv3d': expected all, none, each, or one or more of avg_pool2d"),
        (["conv2d", "nix"], "'nix'"),
        (["all", "conv2d"], "'all' stands alone"),
        (["relu", "each"], "'each' stands alone"),
        ([], "unknown kind of layer"),
    ],
)
def test_wrong_layers_are_an_error_at_once(layers, message):
    with pytest.raises(ValueError, match=message):
        TritonEvaluation(layers)
