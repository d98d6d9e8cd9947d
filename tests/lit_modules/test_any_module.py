"""The evaluation callback with modules for many tasks: what is found out, compared, and told where it cannot be."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.any_modules import (
    CLASSES,
    MODULES,
    SAMPLES,
    AnyModule,
    DictBatch,
    MultiLabel,
    OneLogit,
    Regression,
    Segmentation,
    SeveralInputs,
    ThreeTuple,
    WithoutForward,
    batches,
    image,
    label,
)
from helpers.tiny_classifier import evaluation_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import tritonnn
from lit_modules.evaluation_result import EvaluationResult
from lit_modules.triton_evaluation import TritonEvaluation


def evaluate(
    module: AnyModule, folder: Path, function: str = "test", trainer: dict[str, Any] | None = None, **arguments
) -> EvaluationResult:
    evaluation = TritonEvaluation(**{"latency": False, "log_dir": folder, "fuse": True} | arguments)
    run = getattr(evaluation_trainer(evaluation, **trainer or {}), function)
    run(module, batches(module), **{} if function == "predict" else {"verbose": False})
    return evaluation.result


def break_layers(monkeypatch: pytest.MonkeyPatch, module: type = AnyModule) -> None:
    """By a thousandth; classes are others only where their logits are."""
    factor = -1 if module is ThreeTuple else 1.001
    for layer in (tritonnn.TritonLinear, tritonnn.TritonConv2d):
        right = layer.forward
        monkeypatch.setattr(layer, "forward", lambda self, x, right=right: right(self, x) * factor)


FOUND = {
    "DictBatch": ("forward['logits'] against batch['label']", ["forward['features']"]),
    "ThreeTuple": ("forward against batch[2]", []),
    "SeveralInputs": (
        None,
        ["forward[0].left", "forward[0].right", "forward[0].score", "forward[1][0]", "forward[1][1][0]"],
    ),
    "Segmentation": ("forward['out'] against batch[1]", ["forward['out']"]),
    "MultiLabel": (None, ["forward"]),
    "Regression": (None, ["forward"]),
    "OneLogit": (None, ["forward"]),
    "WithoutForward": ("net.head against batch[1]", ["net.backbone", "net.backbone, call 2"]),
}
"""What is compared as predictions, and which outputs as numbers."""


@pytest.mark.parametrize("module", MODULES)
class TestEachTask:
    def test_passes_and_logs_what_the_trainer_logs(self, module, tmp_path):
        evaluation = TritonEvaluation(latency=False, log_dir=tmp_path, fuse=True)
        trainer = evaluation_trainer(evaluation)
        trainer.test(module(), batches(module()), verbose=False)
        proof = evaluation.result.proof
        assert proof.passed, [variant.verdict.reason for variant in proof.variants]
        assert [variant.name for variant in proof.variants] == ["all", "fused"] and proof.samples == SAMPLES
        predictions, outputs = FOUND[module.__name__]
        assert (proof.predictions, list(proof.sides["all"].outputs)) == (predictions, outputs)
        assert proof.variants[0].swapped.keys() >= {"conv2d", "batch_norm2d", "relu"}
        assert proof.variants[1].swapped["conv2d + batch_norm2d + relu"] == 1
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert logged and logged.keys() == proof.sides["pytorch"].metrics.keys()
        if module is not Regression:  # whose steps draw other numbers each time
            assert proof.sides["pytorch"].metrics == pytest.approx(logged, rel=1e-6)
        for name in ("all", "fused"):
            assert proof.sides[name].metrics == pytest.approx(proof.sides["pytorch"].metrics, rel=1e-4)
            for numbers in proof.sides[name].outputs.values():
                assert numbers.difference < 1e-6
                assert numbers.error is None if proof.notes else 0 < numbers.error < 1e-6
        assert bool(proof.notes) == (module is Regression)
        json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)

    def test_a_wrong_layer_fails(self, module, tmp_path, monkeypatch):
        break_layers(monkeypatch, module)
        result = evaluate(module(), tmp_path, "validate", fuse=False)
        assert not result.passed and "val" in next(iter(result.proof.sides["all"].metrics))


@pytest.mark.parametrize("module", [DictBatch, ThreeTuple, SeveralInputs, WithoutForward])
def test_is_timed(module, tmp_path):
    """One module for each way in which a batch gives images."""
    result = evaluate(module(), tmp_path, latency=True, budget_s=0, time_interpreter=True)
    calls = 2 if module in (SeveralInputs, WithoutForward) else 1
    kinds = [row.kind for row in result.latency.layers]
    assert kinds.count("batch_norm2d") == calls and {"conv2d", "relu"} <= set(kinds)
    assert list(result.latency.networks) == ["all", "fused"]
    assert "FAIL" not in (tmp_path / "results.md").read_text()


class TestSegmentation:
    def test_is_compared_pixel_by_pixel(self, tmp_path, monkeypatch):
        right = tritonnn.TritonConv2d.forward

        def one_pixel(self, x):
            y = right(self, x)
            return torch.where(torch.arange(y.shape[3], device=y.device) == 3, -y, y) if y.shape[1] == CLASSES else y

        monkeypatch.setattr(tritonnn.TritonConv2d, "forward", one_pixel)
        result = evaluate(Segmentation(), tmp_path, fuse=False)
        agreement = result.proof.variants[0].agreement
        assert agreement.samples == SAMPLES * 64 and agreement.differing == SAMPLES * 8 and not result.passed
        assert {example.sample for example in agreement.examples} == set(range(SAMPLES))

    def test_pixels_to_be_ignored_do_not_count_as_wrong(self, tmp_path):
        proof = evaluate(Segmentation(), tmp_path).proof
        data = [batches(Segmentation()).dataset[i] for i in range(SAMPLES)]
        images, masks = (torch.stack(part) for part in zip(*data))
        with torch.inference_mode():
            right = Segmentation().eval()(images)["out"].argmax(1) == masks.squeeze(1)
        assert (masks == 255).any()
        assert proof.pytorch.top1 == pytest.approx(right[masks.squeeze(1) != 255].float().mean().item(), abs=1e-6)


class Plain(AnyModule):
    """Predicts as Lightning does, with the whole batch for the module's forward."""

    @staticmethod
    def sample(generator, index):
        return image(generator)


class Classes(Plain):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"class": self(batch).argmax(1)}


class OnlyClasses(Plain):
    def forward(self, images):
        return super().forward(images).argmax(1)


class TestPredict:
    @pytest.mark.parametrize(
        "module, outputs",
        [(Plain, ["forward"]), (Classes, ["forward", "predict_step['class']"]), (OnlyClasses, ["forward"])],
    )
    def test_compares_outputs_only(self, module, outputs, tmp_path):
        proof = evaluate(module(), tmp_path, "predict").proof
        assert proof.passed and proof.samples == SAMPLES and proof.predictions is None and proof.pytorch is None
        for side in ("all", "fused"):
            assert list(proof.sides[side].outputs) == outputs and not proof.sides[side].metrics
        differing = proof.sides["all"].outputs[outputs[-1]].differing
        assert differing == (None if module is Plain else 0)

    @pytest.mark.parametrize("module", [Plain, OnlyClasses])
    def test_a_wrong_layer_fails(self, module, tmp_path, monkeypatch):
        break_layers(monkeypatch, ThreeTuple if module is OnlyClasses else module)
        assert not evaluate(module(), tmp_path, "predict", fuse=False).passed

    def test_with_labels(self, tmp_path):
        proof = evaluate(PredictsPairs(), tmp_path, "predict", labels=1).proof
        assert proof.predictions == "forward against labels=1" and proof.variants[0].agreement.differing == 0


class PredictsPairs(AnyModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


class Functional(AnyModule):
    """The step calls no module at all."""

    @staticmethod
    def sample(generator, index):
        return {"a": image(generator), "b": label(generator)}

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Logits(Functional):
    """Labels are used where PyTorch's functions do not see it."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        hits = [y == c for y, c in zip(batch["b"].tolist(), self(batch["a"]).argmax(1).tolist())]
        self.log("hits", sum(hits) / len(hits))


class TestHooks:
    @pytest.mark.parametrize("inputs", ["a", ["a"], lambda batch: batch["a"], lambda batch: {"images": batch["a"]}])
    def test_inputs(self, inputs, tmp_path):
        proof = evaluate(Functional(), tmp_path, inputs=inputs).proof
        assert proof.passed and list(proof.sides["all"].outputs) == ["forward"]
        assert proof.variants[1].swapped["conv2d + batch_norm2d + relu"] == 1

    @pytest.mark.parametrize("labels, source", [("b", "labels='b'"), (lambda batch: batch["b"], "labels")])
    def test_labels(self, labels, source, tmp_path):
        assert evaluate(Logits(), tmp_path).proof.predictions is None
        proof = evaluate(Logits(), tmp_path, labels=labels).proof
        assert proof.passed and proof.predictions == f"forward against {source}"

    def test_no_labels(self, tmp_path):
        proof = evaluate(ThreeTuple(), tmp_path, labels=False).proof
        assert proof.passed and proof.predictions is None and list(proof.sides["all"].outputs) == ["forward"]


class Uncopied(ThreeTuple):
    def make(self) -> None:
        super().make()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        (Functional, {}, "Functional.test_step calls no network .* TritonEvaluation\\(inputs=...\\)"),
        (Functional, {"inputs": "c"}, "inputs='c'\\): the batch, a dict of 'a', 'b', has no such part"),
        (ThreeTuple, {"labels": 7}, "labels=7\\): the batch, a list of 3, has no such part"),
        (ThreeTuple, {"labels": 0}, "labels=0 gives a float32 tensor of \\[4, 3, 8, 8\\], but forward is a float32"),
        (OneLogit, {"labels": 1}, "labels must be integers \\[N\\] beside logits \\[N, C\\]"),
        (Uncopied, {}, "Uncopied cannot be copied .*lock.*keep such an attribute out of the module"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_compared_is_one_line(module, arguments, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message) as error:
        evaluate(module(), tmp_path, **arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


class TestSides:
    def test_the_module_is_left_as_it_was(self, tmp_path):
        module = DictBatch()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        types = [type(part) for part in module.modules()]
        evaluate(module, tmp_path, channels_last=True)
        assert [type(part) for part in module.modules()] == types and "log" not in vars(module)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())

    def test_a_compiled_module_is_compared_as_it_was_before(self, tmp_path):
        module = DictBatch()
        with torch.compiler.set_stance("force_eager"):  # the Trainer's own steps
            result = evaluate(torch.compile(module), tmp_path)
        assert result.passed and "test_step" in vars(module)

    def test_a_fit_is_left_alone(self, tmp_path):
        class Fitted(MultiLabel):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return self(batch[0]).square().mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), 0.1)

        evaluation = TritonEvaluation(latency=False, log_dir=tmp_path)
        module = Fitted()
        evaluation_trainer(evaluation, max_epochs=1).fit(module, batches(module), batches(module))
        assert evaluation.result is None and not list(tmp_path.iterdir())

    @pytest.mark.parametrize("module", [MultiLabel, Segmentation, DictBatch])
    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_in_another_precision(self, module, precision, tmp_path):
        proof = evaluate(module(), tmp_path, trainer={"precision": precision}).proof
        assert proof.passed, [variant.verdict.reason for variant in proof.variants]
        assert proof.reference == (None if precision == "64-true" else "float32")

    def test_in_another_precision_a_wrong_layer_fails(self, tmp_path, monkeypatch):
        right = tritonnn.TritonLinear.forward
        monkeypatch.setattr(tritonnn.TritonLinear, "forward", lambda self, x: right(self, x) * 1.03)
        assert not evaluate(MultiLabel(), tmp_path, trainer={"precision": "bf16-true"}, fuse=False).passed

    def test_a_step_that_does_not_run_in_float64(self, tmp_path):
        class Float32(MultiLabel):
            def forward(self, images: Any) -> Any:
                return super().forward(images.float())

        proof = evaluate(Float32(), tmp_path).proof
        assert proof.passed and proof.reference is None
        assert "the step does not run in float64" in proof.notes[0]
        assert "does not run in float64" in (tmp_path / "results.md").read_text()

    def test_outputs_whose_number_depends_on_their_values(self, tmp_path):
        class Boxes(AnyModule):
            def forward(self, images: Any) -> Any:
                scores = super().forward(images).flatten()
                return [scores[scores > 0]]

            def evaluate(self, batch: Any, stage: str) -> None:
                self.log("found", float(len(self(batch[0])[0])))

        assert evaluate(Boxes(), tmp_path).passed

    def test_several_loaders_log_under_their_own_names(self, tmp_path):
        class Several(MultiLabel):
            def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
                self.log("mean", self(batch[0]).mean())

        module = Several()
        evaluation = TritonEvaluation(latency=False, log_dir=tmp_path)
        trainer = evaluation_trainer(evaluation)
        trainer.test(module, [batches(module), batches(MultiLabel())], verbose=False)
        metrics = evaluation.result.proof.sides["all"].metrics
        assert metrics.keys() == trainer.callback_metrics.keys() and len(metrics) == 2
        assert evaluation.result.proof.samples == 2 * SAMPLES


@pytest.mark.skipif(torch.cuda.is_available(), reason="spawns processes on the CPU")
def test_two_processes_log_what_one_logs(tmp_path):
    alone = evaluate(OneLogit(), tmp_path / "one").proof.sides["all"].metrics
    evaluation = TritonEvaluation(latency=False, log_dir=tmp_path / "two")
    trainer = evaluation_trainer(evaluation, strategy="ddp_spawn", devices=2)
    trainer.test(OneLogit(), batches(OneLogit()), verbose=False)
    proof = json.loads((tmp_path / "two" / "results.json").read_text())["proof"]
    assert proof["samples"] == SAMPLES and proof["passed"]
    for name, value in alone.items():
        assert proof["sides"]["all"]["metrics"][name] == pytest.approx(value, rel=1e-5)
