"""A batch of each side as a file for Perfetto."""

import gzip
import json

import torch
from helpers.tiny_classifier import TinyClassifier, evaluation_trainer, loader, random_images

from lit_modules.triton_evaluation import TritonEvaluation


def test_each_side_has_a_trace_of_its_own(tmp_path, capsys):
    evaluation = TritonEvaluation("all", fuse=True, latency=False, trace=True, log_dir=tmp_path)
    evaluation_trainer(evaluation).test(TinyClassifier(), loader(random_images(4)), verbose=False)
    traces = {}
    for path in (tmp_path / "traces").iterdir():
        with gzip.open(path) as file:
            traces[path.name] = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert set(traces) == {f"{side}.pt.trace.json.gz" for side in ("pytorch", "triton", "fused")}
    assert "one batch, pytorch" in traces["pytorch.pt.trace.json.gz"]
    assert "aten::conv2d" in traces["pytorch.pt.trace.json.gz"]
    if not torch.cuda.is_available():
        assert "aten::conv2d" not in traces["triton.pt.trace.json.gz"]
    assert f"drop a file of {tmp_path}/traces on it" in capsys.readouterr().out


def test_no_trace_unless_it_is_asked_for_and_none_of_an_earlier_evaluation(tmp_path):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "pytorch.pt.trace.json.gz").write_bytes(b"")
    evaluation = TritonEvaluation("all", latency=False, log_dir=tmp_path)
    evaluation_trainer(evaluation).test(TinyClassifier(), loader(random_images(4)), verbose=False)
    assert not (tmp_path / "traces").exists()
