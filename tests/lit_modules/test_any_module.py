"""The evaluation callback with modules for many tasks: what is found out, compared, and told where it cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import any_modules
from helpers.any_modules import MODULES, SAMPLES, AnyModule, batches
from helpers.tiny_classifier import evaluation_trainer

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


def break_linear(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = tritonnn.TritonLinear.forward
    monkeypatch.setattr(tritonnn.TritonLinear, "forward", lambda self, x: right(self, x) * factor)


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
        if module is not any_modules.Regression:  # whose steps draw other numbers each time
            assert proof.sides["pytorch"].metrics == pytest.approx(logged, rel=1e-6)
        for name in ("all", "fused"):
            assert proof.sides[name].metrics == pytest.approx(proof.sides["pytorch"].metrics, rel=1e-4)
            for numbers in proof.sides[name].outputs.values():
                assert numbers.difference < 1e-6
                assert numbers.error is None if proof.notes else 0 < numbers.error < 1e-6
        assert bool(proof.notes) == (module is any_modules.Regression)
        json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)

    @pytest.mark.parametrize("function", ["test", "validate", "predict"])
    def test_a_wrong_layer_fails(self, module, function, tmp_path, monkeypatch):
        if function == "predict" and module not in (any_modules.ThreeTuple, any_modules.MultiLabel):
            pytest.skip("its forward does not take the batch")
        break_linear(monkeypatch, -1 if module is any_modules.ThreeTuple else 1.001)
        if module is any_modules.Segmentation:
            right = tritonnn.TritonConv2d.forward
            monkeypatch.setattr(tritonnn.TritonConv2d, "forward", lambda self, x: right(self, x) * 1.001)
        if function == "predict":
            monkeypatch.setattr(module, "predict_step", lambda self, batch, batch_idx: self(batch[0]))
        result = evaluate(module(), tmp_path, function, fuse=False)
        assert not result.passed

    def test_is_timed(self, module, tmp_path):
        result = evaluate(module(), tmp_path, latency=True, budget_s=0, time_interpreter=True)
        calls = 2 if module in (any_modules.SeveralInputs, any_modules.WithoutForward) else 1
        kinds = [row.kind for row in result.latency.layers]
        assert kinds.count("batch_norm2d") == calls and {"conv2d", "relu"} <= set(kinds)
        assert list(result.latency.networks) == ["all", "fused"]
        assert "FAIL" not in (tmp_path / "results.md").read_text()
