"""The evaluation of a GPU that lies in docs/: this version reads it, and what is shown of it is drawn from it."""

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_modules import dashboard
from lit_modules.answer import answer
from lit_modules.evaluation_result import EvaluationResult

DOCS = Path(__file__).parents[2] / "docs"
RECORDED = DOCS / "recorded_run"
RESULT = EvaluationResult.read_json(RECORDED / "results.json")


def test_it_is_small():
    assert sum(path.stat().st_size for path in RECORDED.rglob("*") if path.is_file()) < 500_000


def test_pictures_of_tensorboard_are_small():
    assert sum((DOCS / f"screen-{view}.png").stat().st_size for view in ("answer", "layers")) < 250_000


def test_it_is_a_proof_on_a_gpu_with_everything_in_it():
    latency = RESULT.latency
    assert RESULT.passed and RESULT.environment["device"].startswith("NVIDIA")
    assert latency.comparable and latency.kernels and latency.roofline and RESULT.epochs
    assert {row.index for row in latency.layers} == {index for kernel in latency.kernels for index in kernel.layers}
    assert all(0 < kernel.bound_ms < kernel.medians["device"] for kernel in latency.kernels if kernel.bound_ms)


def test_the_event_files_are_those_of_the_results():
    for run in dashboard.RUNS:
        (events,) = (RECORDED / run).glob("events*")
        recorded = EventAccumulator(str(events)).Reload()
        times = [point.value for point in recorded.Scalars(dashboard.UP_TO_LAYER)]
        assert len(times) == len(RESULT.latency.layers)
        of_kind = [point.value for point in recorded.Scalars("5_kinds_ms/conv2d up to this layer")]
        assert len(of_kind) == sum(row.kind == "conv2d" for row in RESULT.latency.layers)
        assert of_kind == sorted(of_kind) and of_kind[-1] < times[-1]
        name = {"pytorch": "pytorch", "triton": RESULT.proof.main.name, "fused": RESULT.proof.fused.name}[run]
        whole = recorded.Scalars("4_network/1 ms a batch")[0]
        assert abs(whole.value / RESULT.latency.network_timings[name].device.median - 1) < 1e-5


def test_pages_say_what_was_recorded():
    factor = re.search(r"([\d.]+)x faster", answer(RESULT).headline)[1]
    top1 = f"{RESULT.proof.pytorch.top1:.1%}".replace("%", " %")
    page = (DOCS / "dashboard.md").read_text()
    assert f"runs {factor} times faster" in page and top1 in page and RESULT.environment["device"] in page
    errors = {name: error.mean for name, error in RESULT.proof.float64.errors.items()}
    told = [f"{errors[name]:.1e}".replace("e-0", "e-") for name in ("pytorch", "all", "fused, CUDA graph")]
    said = " ".join(page.split())
    assert "error against float64 is {} with PyTorch's layers, {} with Triton's and {} fused".format(*told) in said
    assert f"{factor} times as fast" in (DOCS.parent / "README.md").read_text()
