"""What `benchmarks/zoo.py` tells of its results, all of them or some."""

import json

from benchmarks import zoo_report
from benchmarks.zoo_case import PEERS, ZooCase
from tests.helpers.zoo_results import made_up, saved


def test_page_table_and_picture(tmp_path):
    """Worst and geometric mean are over the networks, against the best of PyTorch's ways."""
    cases = saved(tmp_path, made_up("resnet50", 2.0), made_up("timm/resnet50", 0.5))
    missing = ZooCase("vgg16_bn", "bf16", 64)
    found = zoo_report.write(tmp_path, [*cases, missing], list(PEERS), "python benchmarks/zoo.py")
    page = (tmp_path / "README.md").read_text()
    assert "Missing: vgg16_bn-bf16-64." in page and (tmp_path / "zoo.png").stat().st_size > 1000
    assert [len(json.loads((tmp_path / "results.json").read_text())), len(found)] == [2, 2]
    [times, *_] = [table for table in zoo_report.tables(found) if table.title == "Milliseconds, bf16, 64 images"]
    fused = times.columns.index("fused-graph / best of PyTorch")
    compiled = times.columns.index("compile-tritonnn / compile-reduce-overhead")
    assert [row[fused] for row in times.rows] == ["2.00", "0.50"]
    assert [total[fused] for total in times.totals] == ["0.50", "1.00"]
    assert [total[compiled] for total in times.totals] == ["1.25", "1.25"]
    assert "FAILED" in page and "out of memory" in page


def test_a_partial_run_says_of_how_many_networks_it_knows():
    """A network without the strongest of PyTorch's ways does not count where others have it."""
    results = [made_up("resnet50", 2.0), made_up("vgg16", 0.5), made_up("resnet18", 9.0), made_up("alexnet", 4.0)]
    del results[2].peers["compile-reduce-overhead"], results[3].peers["fused-graph"]
    results[0].peers["fused-graph"].taken = "yesterday"
    cases = [ZooCase(name, "bf16", 64) for name in ("resnet50", "vgg16", "resnet18", "alexnet", "googlenet")]
    [standing] = zoo_report.summary(results, cases, ["fused-graph", "swapped-graph"])
    assert standing.rows == [
        ["bf16, 64 images", "swapped-graph", "", "", "", "", "0 of 5"],
        ["bf16, 64 images", "fused-graph", "1.00", "0.50", "vgg16", "1", "2 of 5"],
        ["bf16, 64 images", "compile-tritonnn", "1.25", "1.25", "resnet50", "0", "3 of 5"],
    ]
    times = zoo_report.tables(results)[0]
    fused = times.columns.index("fused-graph")
    assert [row[fused] for row in times.rows] == ["0.500*", "2.000", "0.111", ""]
    assert times.rows[2][times.columns.index("fused-graph / best of PyTorch")] == "(9.90)"
    assert times.note.startswith("*: taken in another run") and "In brackets" in times.note
    assert zoo_report.in_a_line(results[1]).endswith("best of PyTorch's: fused-graph 0.50, compile-tritonnn 1.25")
    assert zoo_report._missing(results, cases, ["graph", "fused-graph"]) == [
        "Missing: googlenet-bf16-64.",
        "Missing of fused-graph: alexnet-bf16-64.",
    ]


def test_layers_of_a_kind(tmp_path):
    cases = saved(tmp_path, made_up("resnet50", 2.0), made_up("vgg16", 0.5))
    found = zoo_report.write(tmp_path, cases, list(PEERS), "")
    [kinds] = [table for table in zoo_report.tables(found) if table.title == "Layers alone, bf16, 64"]
    assert kinds.rows == [
        ["Linear", "1", "0.50", "0.50", "1 (100%)", "1.0e-03", "1.0e-03", "1"],
        ["convolution 1x1", "2", "1.00", "0.50", "1 (50%)", "1.0e-03", "2.0e-03", "0"],
    ]
