"""`benchmarks/compare.py`: all of it but the GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.fake_time import FakeTime

from benchmarks import ahead, compare, plots, report
from benchmarks.cases import BATCH_SIZES, DEFAULT_CASES, Case, affordable, every_case, flags, select
from benchmarks.results import (
    FAILED,
    MISSING,
    OK,
    WRONG,
    LayerShape,
    LayersResult,
    Measured,
    NetworkResult,
    Results,
    load,
    save,
)
from benchmarks.timing import DeviceLost
from lit_modules.command_line import UserError
from lit_modules.tables import rich_table, table_markdown
from tritonnn.clocks import Timing

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def right(median: float) -> Measured:
    return Measured(OK, Timing(median, 0.9 * median, 1.2 * median, 20), 1e-2, 3e-3)


def made_up() -> Results:
    networks = [
        NetworkResult(
            f"cifar-bf16-{n}",
            "cifar",
            "bf16",
            n,
            "channels-last",
            {
                "eager-channels-last": right(0.004 * n),
                "compile-reduce-overhead": right(0.003 * n),
                "swapped": Measured(WRONG, max_error=3.0, rms_error=0.5),
                "fused": Measured(MISSING, note="tritonnn has no fuse"),
                "fused-graph": right(0.002 * n),
            },
            12.5,
        )
        for n in (1, 128, 1024)
    ]
    by_peer = {"pytorch-channels-last": right(0.2), "triton-channels-last": right(0.1)}
    one_failed = by_peer | {"triton-channels-last": Measured(FAILED, note="a | b")}
    shapes = [
        LayerShape("conv2d", "conv 3x3/1 64-64, 32x32", 4, 10**11, 10**8, True, by_peer),
        LayerShape("conv2d", "conv 1x1/2 64-128, 32x32", 1, 10**9, 10**8, True, dict(by_peer)),
        LayerShape("relu", "relu 64 at 32x32", 5, 0, 10**8, False, one_failed),
    ]
    return Results(
        {"device": "NVIDIA H200", "date": "2026-11-22", "command": "python benchmarks/compare.py"},
        {"cudnn.benchmark": "on"},
        {"bf16 TFLOP/s": 790.0, "copy GB/s": 4300.0},
        networks,
        [LayersResult("layers-bf16-1024", "cifar", "bf16", 1024, shapes, 30.0)],
        ["cifar-fp16-1024"],
        ["attorch is not installed"],
    )


# Cases and the budget


def test_every_case_has_a_name_of_its_own_and_the_important_ones_come_first():
    cases = every_case()
    assert len({case.name for case in cases}) == len(cases) > len(DEFAULT_CASES)
    assert tuple(cases[: len(DEFAULT_CASES)]) == DEFAULT_CASES
    assert {case.batch_size for case in cases} == set(BATCH_SIZES)


def test_selection():
    assert select(None, None, None) == list(DEFAULT_CASES)
    layer_cases = select(["layers-bf16-*"], [128, 1024], None)
    assert [case.name for case in layer_cases] == ["layers-bf16-1024", "layers-bf16-128"]
    fp16 = select(["cifar-*"], [256], ["fp16"])
    assert [case.name for case in fp16] == ["cifar-fp16-256", "cifar-fp16-256-max-autotune"]
    assert select(None, None, None, everything=True) == every_case()


def test_cases_that_no_longer_fit_are_skipped_and_shorter_ones_still_run():
    fake = FakeTime()
    cases = [Case("cifar", "bf16", 1024), Case("cifar", "bf16", 1024, True), Case("cifar", "bf16", 1)]
    run = []
    for _, fits in affordable(cases, 100, fake.now):
        run.append(fits)
        fake.seconds += 50 * fits
    assert run == [True, False, True]


@pytest.mark.parametrize(("seconds", "fit"), [(100, [True, True, False]), (10, [True, True, True])])
def test_a_case_is_expected_to_last_as_long_as_those_before_it(seconds: int, fit: list[bool]):
    """Whatever its estimate is, 40 s."""
    fake = FakeTime()
    run = []
    for _, fits in affordable([Case("cifar", "bf16", n) for n in (1024, 128, 1)], 2.5 * seconds + 20, fake.now):
        run.append(fits)
        fake.seconds += seconds * fits
    assert run == fit


def test_what_is_compiled_ahead():
    """Networks once, whatever runs them, those of layers too; nothing that chooses by times."""
    networks = [Case("cifar", "bf16", 8), Case("cifar", "bf16", 8, max_autotune=True), Case("layers", "tf32", 1)]
    found = ahead.jobs((case, compare.names_of(case, None)) for case in networks)
    every = ["compile-reduce-overhead", "swapped-graph", "fused-graph"]
    assert found == {networks[0]: every, Case("cifar", "tf32", 1): ["swapped-graph"]}
    assert ahead.jobs([(networks[0], ["eager-nchw", "fused-graph-in-place"])]) == {networks[0]: ["fused-graph"]}
    assert ahead.jobs([(networks[0], ["eager-nchw"])]) == {}


def test_compiling_ahead_may_fail(monkeypatch: pytest.MonkeyPatch):
    commands, said = [], []

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        commands.append(command)
        if command[-2] == "1":
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, int(command[-2] == "8"))

    monkeypatch.setattr(ahead.subprocess, "run", run)
    todo = {Case("cifar", "bf16", n): ["fused-graph"] for n in (1, 8, 128)}
    ahead.compile_ahead(todo, 2, said.append)
    assert sorted(command[2:] for command in commands) == sorted(
        ["cifar", "bf16", str(n), "fused-graph"] for n in (1, 8, 128)
    )
    assert len(said) == 1 and said[0].startswith("compiled ahead: 1 of 3 networks in ")


def test_the_first_case_runs_whatever_the_budget():
    fake, run = FakeTime(), []
    for _, fits in affordable(DEFAULT_CASES[:2], 1, fake.now):
        run.append(fits)
        fake.seconds += 2
    assert run == [True, False]


@pytest.mark.parametrize(
    ("dtype", "precisions"),
    [
        ("tf32", ("tf32", "tf32", True)),
        ("fp32", ("ieee", "ieee", False)),
        ("default", ("tf32", "ieee", False)),
        ("bf16", ("tf32", "ieee", False)),
    ],
)
def test_flags_are_readable_by_either_of_their_names(dtype: str, precisions: tuple):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with flags(dtype):
        assert (cudnn.conv.fp32_precision, matmul.fp32_precision, matmul.allow_tf32) == precisions
        assert cudnn.allow_tf32 is (dtype != "fp32")
    assert (cudnn.conv.fp32_precision, matmul.allow_tf32) == ("tf32", False)


# Tables, JSON and pictures


def test_json_round_trip(tmp_path: Path):
    save(made_up(), tmp_path / "results.json")
    assert load(tmp_path / "results.json") == made_up()


def test_a_wrong_result_has_its_error_but_no_time():
    rows = {row[0]: row for row in report.network_table(made_up().networks[1]).rows}
    assert rows["swapped"][1:] == ["", "", "", "", "", "5.0e-01", "3.0e+00", "WRONG"]
    assert rows["fused"][-1] == "UNAVAILABLE tritonnn has no fuse"
    assert rows["fused-graph"][1:6] == ["0.2560", "0.2304-0.3072", "20", "500,000", "2.00"]


def test_layers_are_compared_with_the_roofline_and_summed_by_kind():
    results = made_up()
    (layer_case,) = results.layers
    shape = layer_case.layers[0]
    assert report.floor_ms(shape, results.ceilings, "bf16") == pytest.approx(10**11 / 790e12 * 1e3)
    assert report.floor_ms(layer_case.layers[2], results.ceilings, "bf16") == pytest.approx(10**8 / 4300e9 * 1e3)
    totals = report.kind_totals(layer_case)
    assert totals["conv2d"] == pytest.approx({"pytorch-channels-last": 1.0, "triton-channels-last": 0.5})
    assert totals["relu"] == {"pytorch-channels-last": pytest.approx(1.0), "triton-channels-last": None}
    table = report.layers_table(layer_case, results.ceilings)
    assert table.rows[0][3:8] == ["200.0", "180.0-240.0", "500", "500", "63%"]
    assert "relu 64 at 32x32" in table.note
    assert all(len(row) == len(table.columns) for row in table.rows + table.totals)


def test_the_fastest_of_each_side():
    assert report.summary_table(made_up()).rows[2] == [
        "cifar-bf16-1024",
        "compile-reduce-overhead",
        "3.072",
        "fused-graph",
        "2.048",
        "1.50",
    ]


def test_the_page_has_everything():
    page = report.markdown(made_up(), ["networks.png"])
    for part in (
        "NVIDIA H200",
        "python benchmarks/compare.py",
        "![networks.png](networks.png)",
        "attorch is not installed",
        "Not measured, the time was up: cifar-fp16-1024",
        "FAILED a \\| b",
        "| bf16 TFLOP/s | 790 |",
    ):
        assert part in page


def test_tables_have_as_many_cells_as_columns():
    results = made_up()
    tables = [report.summary_table(results), *report.settings_tables(results)]
    tables += [report.network_table(network) for network in results.networks]
    tables += [report.totals_table(case) for case in results.layers]
    for table in tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert table_markdown(table) and rich_table(table)


def test_pictures_are_written(tmp_path: Path):
    assert plots.save_plots(made_up(), tmp_path) == ["networks.png", "layers-bf16-1024.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("networks.png", "layers-bf16-1024.png"))


def test_nothing_to_show_is_no_picture(tmp_path: Path):
    results = made_up()
    results.networks, results.layers = [], []
    assert plots.save_plots(results, tmp_path) == []


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "cifar-int8-1"], "no case fits 'cifar-int8-1'"),
        (["--batch-sizes", "0"], "'0'"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--peers", "tensorrt"], "invalid choice: 'tensorrt'"),
        (["--minutes", "-1"], "'-1'"),
        (["--cases", "layers-*", "--peers", "fused"], "no case is left"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        compare.parse(arguments)


def test_without_a_gpu_the_command_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        compare.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no CUDA GPU: times on anything else say nothing about the kernels\n"


def test_the_page_of_an_earlier_run_is_written_again(tmp_path: Path):
    save(made_up(), tmp_path / "results.json")
    compare.main(["--report", str(tmp_path / "results.json")])
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "README.md",
        "networks.png",
        "layers-bf16-1024.png",
    }
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="results.json"):
        compare.report_again(tmp_path / "results.json")


def test_the_command_is_recorded_without_the_folder():
    arguments = ["--dtypes", "bf16", "--output", "/somewhere", "--output=else", "--all"]
    assert compare.command(arguments) == "python benchmarks/compare.py --dtypes bf16 --all"


def test_the_script_runs_from_anywhere(tmp_path: Path):
    command = [sys.executable, ROOT / "benchmarks/compare.py", "--list", "--dtypes", "bf16", "--batch-sizes", "8"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert listed == ["cifar-bf16-8", "layers-bf16-8", "cifar-bf16-8-max-autotune"]


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("", "gpu")]
)
def test_the_folder_is_named_after_the_gpu(name: str, expected: str):
    assert compare.slug(name) == expected


def test_a_run_writes_after_each_case_and_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made = made_up()

    def network_result(case: Case, *_) -> NetworkResult:
        if case.batch_size == 8:
            raise RuntimeError("out of memory")
        return next(network for network in made.networks if network.batch_size == case.batch_size)

    monkeypatch.setattr(compare, "network_result", network_result)
    args = compare.parse(["--cases", "cifar-bf16-?", "cifar-bf16-128", "cifar-bf16-1024", "--ahead", "0"])
    results, said = made_up(), []
    results.networks, results.layers, results.skipped = [], [], []
    console = compare.Console(file=open(tmp_path / "log", "w"), width=160)
    compare.run(args, CPU, results, tmp_path, said.append, console)
    written = load(tmp_path / "results.json")
    assert [network.batch_size for network in written.networks] == [1024, 128, 1]
    assert "cifar-bf16-8 failed: RuntimeError: out of memory" in results.notes
    assert (tmp_path / "README.md").exists()


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch, made: Results) -> None:
    for name, value in {"is_available": True, "current_device": 0, "get_device_name": "NVIDIA H200"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, value in {"ceilings": made.ceilings, "described": made.environment, "settings": made.settings}.items():
        monkeypatch.setattr(compare, name, lambda *_, value=value: value)
    monkeypatch.setattr(ahead, "compile_ahead", lambda todo, processes, say: say(f"ahead: {len(todo)}"))


def test_the_whole_command_but_for_the_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    made = made_up()
    pretend_a_gpu(monkeypatch, made)
    monkeypatch.setattr(compare, "network_result", lambda case, *_: made.networks[0])
    monkeypatch.setattr(compare, "layers_result", lambda case, *_: made.layers[0])
    folder = tmp_path / "new" / "compare"
    with pytest.raises(SystemExit) as ended:
        compare.main(["--cases", "cifar-bf16-1", "layers-bf16-1", "--output", str(folder)])
    assert ended.value.code == 0
    found = load(folder / "results.json")
    assert (found.networks, found.layers) == (made.networks[:1], made.layers)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".png"}
    out = capsys.readouterr().out
    assert "The fastest of each side" in out and "ahead: 1\n" in out


@pytest.mark.parametrize(
    "reason, status, said",
    [
        (DeviceLost("an illegal memory access"), 1, "error: the GPU was lost: an illegal memory access"),
        (KeyboardInterrupt(), 130, "interrupted: {folder} has the cases that were done"),
    ],
    ids=["a lost GPU", "Ctrl-C"],
)
def test_what_ends_the_run_keeps_what_was_measured(
    reason: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    made = made_up()

    def network_result(case: Case, *_) -> NetworkResult:
        if case.batch_size == 1:
            raise reason
        return made.networks[1]

    pretend_a_gpu(monkeypatch, made)
    monkeypatch.setattr(compare, "network_result", network_result)
    with pytest.raises(SystemExit) as ended:
        compare.main(["--cases", "cifar-bf16-128", "cifar-bf16-1", "--output", str(tmp_path)])
    assert ended.value.code == status
    assert capsys.readouterr().err == said.format(folder=tmp_path) + "\n"
    found = load(tmp_path / "results.json")
    assert found.networks == [made.networks[1]] and ("lost" in found.notes[-1] or "Interrupted" in found.notes[-1])


@pytest.mark.gpu
def test_compiling_ahead_on_a_gpu():
    said = []
    ahead.compile_ahead({Case("cifar", "bf16", 8): ["swapped-graph", "fused-graph"]}, 1, said.append)
    assert said[0].startswith("compiled ahead: 1 of 1 networks")
