"""The views of a result: they hold its figures, all the same."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_classifier import TinyClassifier, evaluation_trainer, loader, random_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_modules import dashboard, report
from lit_modules.evaluation_result import EvaluationResult, timing
from lit_modules.triton_evaluation import TritonEvaluation

CLOCKS = ("device", "eager") if torch.cuda.is_available() else ("interpreter",)
CLOCK = CLOCKS[0]


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def result(log_dir: Path) -> EvaluationResult:
    evaluation = TritonEvaluation("each", log_dir=log_dir, budget_s=0.01)
    evaluation_trainer(evaluation).test(TinyClassifier(), loader(random_images(6)), verbose=False)
    return evaluation.result


@pytest.fixture(scope="module")
def runs(result: EvaluationResult, log_dir: Path) -> dict[str, EventAccumulator]:
    runs = {side: EventAccumulator(str(log_dir / side)) for side in dashboard.SIDES}
    for run in runs.values():
        run.Reload()
    return runs


def scalars(run: EventAccumulator) -> dict[str, float]:
    return {tag: run.Scalars(tag)[0].value for tag in run.Tags()["scalars"]}


def test_both_runs_have_the_same_scalars(runs):
    pytorch, triton = (set(runs[side].Tags()["scalars"]) for side in dashboard.SIDES)
    assert pytorch == triton
    assert {tag.partition("/")[0] for tag in pytorch} == {
        "1_overview",
        "2_profile",
        *(f"{group}_{clock}_ms" for group in ("3_kinds", "4_network", "5_layers") for clock in CLOCKS),
    }


def test_layers_sort_in_network_order(runs, result):
    tags = sorted(tag for tag in runs["triton"].Tags()["scalars"] if tag.startswith(f"5_layers_{CLOCK}"))
    assert [tag.split()[-1] for tag in tags] == [row.name for row in result.latency.layers]


def test_scalars_are_the_figures_of_the_result(runs, result):
    row = result.latency.layers[3]
    breakdown = result.latency.breakdowns[CLOCK]
    for side in dashboard.SIDES:
        values = scalars(runs[side])
        assert values[f"5_layers_{CLOCK}_ms/003 layers.3"] == pytest.approx(
            timing(getattr(row, side), CLOCK).median, rel=1e-6
        )
        assert values[f"1_overview/06 {CLOCK} ms, whole network"] == pytest.approx(
            getattr(breakdown.network, side), rel=1e-6
        )
        assert values[f"3_kinds_{CLOCK}_ms/relu"] == pytest.approx(getattr(breakdown.kinds["relu"], side), rel=1e-6)
    assert scalars(runs["triton"])["1_overview/00 top-1"] == pytest.approx(result.proof.variants[-1].quality.top1)


def test_the_profile_is_a_curve_over_the_layers(runs, result):
    points = runs["triton"].Scalars(f"2_profile/{CLOCK} ms over the layers")
    assert [point.step for point in points] == [row.index for row in result.latency.layers]


def test_tables_and_charts_are_there_once(runs, result):
    pages = [tag for tag in runs["pytorch"].Tags()["tensors"] if tag.endswith("/text_summary")]
    assert len(pages) == len(report.tables(result))
    assert runs["pytorch"].Tags()["images"] == [
        f"6_charts/{view}, {clock} ms" for clock in CLOCKS for view in ("1 kinds", "2 layers")
    ]
    assert not runs["triton"].Tags()["images"]


def test_hyperparameters_come_with_metrics_that_exist(runs):
    for side in dashboard.SIDES:
        plugin = runs[side].summary_metadata
        experiment = HParamsPluginData.FromString(plugin["_hparams_/experiment"].plugin_data.content).experiment
        session = HParamsPluginData.FromString(plugin["_hparams_/session_start_info"].plugin_data.content)
        assert session.session_start_info.hparams["side"].string_value == side
        assert session.session_start_info.hparams["training.width"].number_value == 8
        assert {info.name.tag for info in experiment.metric_infos} <= set(runs[side].Tags()["scalars"])


def test_json_holds_what_the_tables_print(result, log_dir):
    parsed = json.loads((log_dir / "results.json").read_text())
    table = report.layers_table(result)
    for row, cells in zip(parsed["latency"]["layers"], table.rows, strict=True):
        pair = row["medians"][CLOCK]
        assert cells[0] == row["name"]
        assert [float(cells[3]), float(cells[4])] == pytest.approx(
            [pair["pytorch"], pair["triton"]], rel=5e-2, abs=5e-5
        )
        assert cells[5] == f"{pair['increase_percent']:+.1f} %"
        assert int(cells[-1]) == row["pytorch"]["device" if CLOCK == "device" else "eager"]["samples"]
    swaps = report.swaps_table(result)
    assert [cells[0] for cells in swaps.rows] == list(parsed["latency"]["networks"])
    assert [cells[-1] for cells in swaps.rows] == ["identical"] * len(swaps.rows)
    rows = [cells for cells in report.proof_table(result).rows if cells[0].startswith("Triton")]
    for variant, cells in zip(parsed["proof"]["variants"], rows, strict=True):
        assert cells[1] == f"{variant['quality']['top1']:.2%}"
        assert int(cells[4]) == variant["agreement"]["differing"]
        assert cells[5] == f"{variant['agreement']['largest_logit_difference']:.2g}"
        assert cells[-1] == ("PASS" if variant["verdict"]["passed"] else "FAIL")


def test_markdown_has_every_table(result, log_dir):
    page = (log_dir / "results.md").read_text()
    for table in report.tables(result):
        assert report.table_markdown(table) in page
    for line in page.splitlines():
        if line.startswith("| 0") or line.startswith("| layers."):
            assert line.count(" | ") == len(report.layers_table(result).columns) - 1


def test_every_row_has_a_cell_a_column(result):
    for table in report.tables(result):
        assert {len(row) for row in [*table.rows, *table.totals]} == {len(table.columns)}


def test_the_command_switches_smoothing_off(tmp_path):
    lines = dashboard.how_to_open(tmp_path / "a folder")
    assert f"tensorboard --logdir '{tmp_path}/a folder'" in lines
    assert "http://localhost:6006/?smoothing=0#timeseries" in lines


def test_without_triton_there_is_one_run(tmp_path):
    evaluation = TritonEvaluation("none", log_dir=tmp_path, budget_s=0)
    evaluation_trainer(evaluation).test(TinyClassifier(), loader(random_images(4)), verbose=False)
    assert (tmp_path / "pytorch").is_dir() and not (tmp_path / "triton").exists()
