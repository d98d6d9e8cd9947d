"""The views of a result: they hold its figures, all the same."""

import dataclasses
import json
import re
from datetime import datetime
from pathlib import Path

import pytest
import torch
from helpers.made_up import as_on_a_gpu
from helpers.tiny_classifier import TinyClassifier, evaluation_trainer, loader, random_images
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_modules import dashboard, report, report_tables
from lit_modules.answer import answer
from lit_modules.dashboard import __main__ as command
from lit_modules.dashboard.figures import answer_figure, layers_figure, won_and_lost_figure
from lit_modules.dashboard.style import DARK, LIGHT
from lit_modules.environment import strict_float32
from lit_modules.evaluation_result import Epoch, EvaluationResult, Pair
from lit_modules.tables import Table, table_markdown, table_preformatted
from lit_modules.triton_evaluation import TritonEvaluation

in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="what is measured is Triton's interpreter")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    evaluation = TritonEvaluation(
        "each", fuse=True, log_dir=tmp_path_factory.mktemp("evaluation"), budget_s=0.01, time_interpreter=True
    )
    with strict_float32(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        evaluation_trainer(evaluation).test(TinyClassifier(), loader(random_images(6)), verbose=False)
    return evaluation.result


@pytest.fixture(scope="module")
def result(measured: EvaluationResult) -> EvaluationResult:
    """The same with times as a GPU has them, and with two validations during training."""
    epochs = [
        Epoch(epoch, {run: {"top1": 0.5 + epoch / 8} for run in ("pytorch", "triton")}, {"pytorch": 2.0, "triton": 1.0})
        for epoch in (1, 2)
    ]
    return dataclasses.replace(as_on_a_gpu(measured), epochs=epochs)


@pytest.fixture(scope="module")
def log_dir(result: EvaluationResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dashboard")
    dashboard.write(result, folder)
    return folder


@pytest.fixture(scope="module")
def runs(log_dir: Path) -> dict[str, EventAccumulator]:
    runs = {run: EventAccumulator(str(log_dir / run)) for run in dashboard.RUNS}
    for run in runs.values():
        run.Reload()
    return runs


def points(run: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, pytest.approx(point.value, rel=1e-6)) for point in run.Scalars(tag)]


def scalars(run: EventAccumulator) -> set[str]:
    return set(run.Tags()["scalars"])


class TestRuns:
    def test_all_have_the_same_scalars(self, runs):
        pytorch, triton, fused = (scalars(runs[run]) for run in dashboard.RUNS)
        assert pytorch == triton
        assert {tag for tag in pytorch if not tag.startswith("2_training/")} == fused
        assert {tag.partition("/")[0] for tag in pytorch} == {
            "2_training",
            "3_layers",
            "4_network",
            "5_kinds_ms",
            "6_layers_ms",
            "7_percentiles",
        }

    def test_curves_run_over_the_layers_in_network_order(self, runs, result):
        rows = result.latency.layers
        for run, times in (
            ("pytorch", [row.pytorch.device.median for row in rows]),
            ("triton", [row.triton.device.median for row in rows]),
        ):
            sums = [(row.index, sum(times[: row.index + 1])) for row in rows]
            assert points(runs[run], dashboard.UP_TO_LAYER) == sums
            assert points(runs[run], dashboard.OF_LAYER) == list(enumerate(times))

    def test_a_fused_kernel_stands_for_the_layers_whose_work_it_does(self, runs, result):
        """The convolution's has the batch norm and the ReLU with it, the linear layer's the pool before it."""
        of = {kernel.what: kernel.latency.device.median for kernel in result.latency.kernels}
        convolution, pool, linear = (
            of[what] for what in ("conv2d + batch_norm2d + relu", "max_pool2d", "avg_pool2d + linear")
        )
        expected = [convolution, 0, 0, pool, 0, linear]
        assert points(runs["fused"], dashboard.OF_LAYER) == list(enumerate(expected))
        assert points(runs["fused"], dashboard.UP_TO_LAYER)[-1] == (5, sum(of.values()))
        assert [kernel.layers for kernel in result.latency.kernels] == [[0, 1, 2], [3], [4, 5]]
        assert points(runs["fused"], "5_kinds_ms/conv2d up to this layer")[0] == (0, convolution)

    def test_layers_sort_in_network_order(self, runs, result):
        tags = sorted(tag for tag in scalars(runs["triton"]) if tag.startswith("6_layers_ms"))
        assert [tag.split()[-1] for tag in tags] == [row.name for row in result.latency.layers]

    def test_numbers_of_the_network(self, runs, result):
        for run, variant in (("triton", result.proof.main), ("fused", result.proof.fused)):
            values = {tag.split(" ", 1)[1]: points(runs[run], tag)[0][1] for tag in scalars(runs[run]) if "4_" in tag}
            assert values["top-1"] == variant.quality.top1
            assert values["predictions that differ from PyTorch's"] == variant.agreement.differing
            assert values["mean error against float64 x 1e6"] == result.proof.float64.errors[variant.name].mean * 1e6
            assert values["ms a batch"] == result.latency.network_timings[variant.name].device.median
            assert values["eager ms a batch"] == result.latency.network_timings[variant.name].eager.median
            logged = set(result.proof.sides["pytorch"].metrics) & values.keys()
            assert not logged & {"test/top1", "test/loss"}  # as top-1 and loss they are there already

    def test_a_single_number_is_a_level_line(self, runs):
        """Of three points, one a run, TensorBoard scales its chart to the middle one."""
        for run in runs.values():
            single = ("4_network", "5_kinds_ms", "6_layers_ms")  # the network has one layer of each kind
            for tag in (tag for tag in scalars(run) if tag.startswith(single)):
                (first, value), *others = points(run, tag)
                assert first == 0 and others == [(1, value)], tag

    def test_all_has_the_date_of_the_evaluation(self, runs, result):
        """TensorBoard shows beside each number when it came, in milliseconds, which were taken for a measurement.

        The runs have their colours in the order of their dates: PyTorch's is grey, as in the figures.
        """
        dates = []
        for name in dashboard.RUNS:
            times = {point.wall_time for tag in scalars(runs[name]) for point in runs[name].Scalars(tag)}
            dates += times
        date = datetime.fromisoformat(result.environment["date"]).timestamp()
        assert dates == sorted(set(dates)) and dates == pytest.approx([date] * 3, abs=0.01)

    def test_curves_over_training(self, runs):
        for run in ("pytorch", "triton"):
            assert points(runs[run], "2_training/top1 after each epoch") == [(1, 0.625), (2, 0.75)]
        assert points(runs["triton"], "2_training/wall-clock ms a batch") == [(1, 1.0), (2, 1.0)]

    def test_percentiles_are_a_margin(self, runs, result):
        tensor = runs["pytorch"].Tensors("custom_scalars__config__")[0].tensor_proto
        layout = Layout.FromString(tensor.string_val[0])
        charts = {chart.title: chart for category in layout.category for chart in category.chart}
        (series,) = charts["each layer, ms: median, 10th to 90th percentile"].margin.series
        assert {series.value, series.lower, series.upper} <= scalars(runs["fused"])
        row = result.latency.layers[2].triton.device
        for tag, value in ((series.lower, row.p10), (series.value, row.median), (series.upper, row.p90)):
            assert points(runs["triton"], tag)[2] == (2, value)
        shown = [tag for title in charts if "margin" not in title for tag in charts[title].multiline.tag]
        assert set(shown) <= scalars(runs["triton"])

    def test_figures_and_text_are_there_once_in_reading_order(self, runs, result):
        assert runs["pytorch"].Tags()["images"] == [
            "1_answer/1 the answer",
            "1_answer/2 every layer in network order",
            "1_answer/3 won and lost",
        ]
        pages = sorted(tag for tag in runs["pytorch"].Tags()["tensors"] if tag[0].isdigit())
        assert [page.split(" ", 1)[1] for page in pages] == [
            "The answer",
            *(table.title for table in report_tables.tables(result)),
        ]
        for run in ("triton", "fused"):
            assert not runs[run].Tags()["images"] and not any(tag[0].isdigit() for tag in runs[run].Tags()["tensors"])

    def test_tables_of_text_are_preformatted(self, runs, result):
        """In a table's cells TensorBoard breaks words at any letter."""
        for index, table in enumerate(report_tables.tables(result), 2):
            (page,) = runs["pytorch"].Tensors(f"{index} {table.title}")[0].tensor_proto.string_val
            _, text, note = page.decode().split("```")
            assert "|--" not in page.decode() and note.strip() == table.note.replace("\n", "  \n")
            rows = text.strip("\n").split("\n")[-len(table.rows) - bool(table.totals) - len(table.totals) :]
            for row, line in zip(table.rows, rows, strict=False):
                assert line.split() == " ".join(row).split()

    def test_hyperparameters_begin_with_what_was_compared(self, runs, result):
        for run in dashboard.RUNS:
            plugin = runs[run].summary_metadata
            experiment = HParamsPluginData.FromString(plugin["_hparams_/experiment"].plugin_data.content).experiment
            session = HParamsPluginData.FromString(plugin["_hparams_/session_start_info"].plugin_data.content)
            parameters = session.session_start_info.hparams
            assert sorted(parameters)[:2] == ["01 side", "02 Triton layers"]
            assert parameters["01 side"].string_value == run
            assert parameters["05 batch size"].string_value == str(result.batch_size)  # a number is shown as 3.0
            assert parameters["training.width"].string_value == "8"
            assert {info.name.tag for info in experiment.metric_infos} <= scalars(runs[run])


class TestFigures:
    @pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
    @pytest.mark.parametrize("draw", [answer_figure, layers_figure, won_and_lost_figure])
    def test_nothing_is_cut_off(self, result, draw, theme):
        figure = draw(result, theme)
        figure.canvas.draw()
        whole = figure.bbox
        texts = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]
        assert len(texts) > 5
        for text in texts:
            box = text.get_window_extent()
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0, text.get_text()

    def test_what_stands_beside_a_long_bar_is_not_cut_off(self, result):
        networks = {
            name: {clock: Pair.of(pair.pytorch, 1.04 * pair.pytorch, clock) for clock, pair in pairs.items()}
            for name, pairs in result.latency.networks.items()
        }
        latency = dataclasses.replace(result.latency, networks=networks)
        figure = answer_figure(dataclasses.replace(result, latency=latency), LIGHT)
        notes = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if "x " in text.get_text()]
        assert "1.04x slower" in {text.get_text() for text in notes}
        figure.canvas.draw()
        for text in notes:
            assert text.get_window_extent().x1 <= figure.bbox.x1, text.get_text()

    def test_the_answer_has_every_version_of_the_network(self, result):
        written = {text.get_text() for text in answer_figure(result, LIGHT).findobj(lambda a: hasattr(a, "get_text"))}
        assert {"PyTorch", "Triton conv2d", "all Triton layers", "fused"} <= written
        assert {answer(result).headline, "\N{CHECK MARK} 6 of 6 predictions identical"} <= written
        assert {"2.0x faster", "4.0x faster"} <= written and not any("%" in text for text in written)

    @in_the_interpreter
    def test_without_times_of_triton_there_is_the_proof(self, measured):
        latency = dataclasses.replace(measured.latency, networks={}, kernels=[])
        figure = answer_figure(dataclasses.replace(measured, latency=latency), LIGHT)
        written = {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}
        assert "\N{CHECK MARK} 6 of 6 predictions identical" in written and "PyTorch" in written

    def test_a_failure_is_not_ticked_off(self, result):
        wrong = dataclasses.replace(
            result.proof.variants[0], verdict=dataclasses.replace(result.proof.variants[0].verdict, passed=False)
        )
        proof = dataclasses.replace(result.proof, variants=[wrong, *result.proof.variants[1:]], passed=False)
        said = answer(dataclasses.replace(result, proof=proof))
        assert said.headline == "TinyClassifier is not the same with Triton's layers"
        assert said.proof.startswith(f"FAIL {wrong.name}: ")


class TestRedrawing:
    def test_a_results_file_is_read_as_it_was_written(self, result, tmp_path):
        result.write_json(tmp_path / "results.json")
        assert EvaluationResult.read_json(tmp_path / "results.json") == result

    def test_the_command_writes_the_runs_anew(self, result, runs, tmp_path, capsys):
        result.write_json(tmp_path / "results.json")
        (tmp_path / "pytorch").mkdir()
        (tmp_path / "pytorch" / "events.out.tfevents.old").write_bytes(b"")
        command.main([str(tmp_path / "results.json"), "--theme", "dark"])
        assert "tensorboard --logdir" in capsys.readouterr().out
        assert len(list((tmp_path / "pytorch").iterdir())) == 1
        again = EventAccumulator(str(tmp_path / "fused")).Reload()
        assert scalars(again) == scalars(runs["fused"])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            pytest.param("{}", "without batch_size", id="empty"),
            pytest.param("[]", "expected a EvaluationResult", id="a list"),
            pytest.param("{", "no result of this version", id="no JSON"),
        ],
    )
    def test_what_is_no_result_is_one_line(self, tmp_path, text, message):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(command.UserError, match=message):
            command.main([str(tmp_path / "results.json")])

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(command.UserError, match="No such file"):
            command.main([str(tmp_path / "nix.json")])


class TestReport:
    def test_the_terminal_begins_with_the_answer(self, result, capsys):
        report.print_to(Console(width=150), result)
        output = capsys.readouterr().out
        order = [answer(result).headline, "6 of 6 predictions identical", "The whole network", "Predictions on 6 test"]
        order += ["Each layer alone, in network order", "Settings", f"PASS: {answer(result).headline}"]
        places = [output.find(text, output.find(order[0]) if text == order[-1] else 0) for text in order]
        assert -1 not in places and places == sorted(places)

    def test_layers_table_has_fused_kernels_and_the_roofline(self, result):
        table = report_tables.layers_table(result)
        fused, bound = (table.columns.index(column) for column in ("fused ms", "of the roofline"))
        kernels = result.latency.kernels
        cells = [row[fused] for row in table.rows]
        assert [cells[1], cells[2], cells[5]] == ["-"] * 3
        shown = [float(cells[row]) for row in (0, 3, 4)]
        assert shown == pytest.approx([kernel.medians["device"] for kernel in kernels[:3]], abs=5e-5)
        assert table.rows[0][bound] == f"{kernels[0].bound_ms / kernels[0].medians['device']:.0%}"
        assert [row[0] for row in table.totals][-3:] == ["sum of the layers", "whole network", "unattributed"]

    def test_a_column_is_as_wide_as_its_cells_and_the_words_of_its_header(self):
        table = Table("Times", ["of which", "ms a batch"], [["conv2d", "1.5"], ["relu", "0.25"]], [])
        assert table_preformatted(table).split("```")[1].strip("\n").split("\n") == [
            "of        ms a",
            "which    batch",
            "──────────────",
            "conv2d     1.5",
            "relu      0.25",
        ]

    def test_factors_are_words(self, result):
        page = report.markdown(result)
        assert "2.0x faster" in page and "4.0x faster" in page
        assert not re.search(r"[-+]\d+(\.\d+)? ?%", page)

    @in_the_interpreter
    def test_the_interpreters_times_are_no_factor(self, measured):
        table = report_tables.layers_table(measured)
        assert "interpreter ms" in table.columns and "than PyTorch" not in table.columns
        assert "faster" not in report.markdown(measured) and "slower" not in report.markdown(measured)

    def test_json_holds_what_the_tables_print(self, result, tmp_path):
        result.write_json(tmp_path / "results.json")
        parsed = json.loads((tmp_path / "results.json").read_text())
        table = report_tables.layers_table(result)
        for row, cells in zip(parsed["latency"]["layers"], table.rows, strict=True):
            pair = row["medians"]["device"]
            assert cells[0] == row["name"]
            assert [float(cells[3]), float(cells[4])] == pytest.approx([pair["pytorch"], pair["triton"]], rel=5e-2)
            assert cells[5] == "2.0x faster" and int(cells[-1]) == row["pytorch"]["device"]["samples"]
        networks = report_tables.networks_table(result).rows
        assert [cells[-1] for cells in networks[1:]] == ["identical"] * len(parsed["latency"]["networks"])
        rows = [cells for cells in report_tables.proof_table(result).rows if cells[0].startswith("Triton")]
        for variant, cells in zip(parsed["proof"]["variants"], rows, strict=True):
            assert cells[1] == f"{variant['quality']['top1']:.2%}"
            assert int(cells[4]) == variant["agreement"]["differing"]
            assert cells[5] == f"{variant['agreement']['largest_logit_difference']:.2g}"
            assert cells[-1] == ("PASS" if variant["verdict"]["passed"] else "FAIL")

    @pytest.mark.parametrize("which", ["measured", "result"])
    def test_every_row_has_a_cell_a_column(self, which, request):
        result = request.getfixturevalue(which)
        page = report.markdown(result)
        for table in report_tables.tables(result):
            assert {len(row) for row in [*table.rows, *table.totals]} == {len(table.columns)}, table.title
            assert table_markdown(table) in page


def test_the_command_switches_smoothing_off(tmp_path):
    lines = dashboard.how_to_open(tmp_path / "a folder")
    assert f"tensorboard --logdir '{tmp_path}/a folder'" in lines
    assert f"http://localhost:6006/{dashboard.LOOK}" in lines


def test_without_triton_there_is_one_run(tmp_path):
    evaluation = TritonEvaluation("none", log_dir=tmp_path, budget_s=0)
    evaluation_trainer(evaluation).test(TinyClassifier(), loader(random_images(4)), verbose=False)
    assert (tmp_path / "pytorch").is_dir() and not (tmp_path / "triton").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_interpreter_is_timed_only_if_asked(tmp_path):
    evaluation = TritonEvaluation("all", fuse=True, log_dir=tmp_path, budget_s=0)
    evaluation_trainer(evaluation).test(TinyClassifier(), loader(random_images(4)), verbose=False)
    latency = evaluation.result.latency
    assert latency.networks == {} and latency.kernels == [] and all(row.triton is None for row in latency.layers)
    assert all(row.pytorch.eager.median > 0 for row in latency.layers)
    assert "`make dashboard`" in (tmp_path / "results.md").read_text()
