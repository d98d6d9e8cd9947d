"""`benchmarks/zoo.py`: all of it but the GPU."""

import json
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import zoo, zoo_case, zoo_processes, zoo_report
from benchmarks.results import FAILED, OK, Measured
from benchmarks.zoo_case import Layer, Peer, ZooCase, ZooResult, measure_layers, measure_network
from lit_modules.command_line import UserError
from tritonnn.clocks import Timing

CPU = torch.device("cpu")


def peer(ms: float, first_call_s: float | None = 1.5) -> Peer:
    return Peer(Measured(OK, Timing(ms, 0.9 * ms, 1.1 * ms, 20), 1e-2, 3e-3), first_call_s)


def made_up(network: str, faster: float) -> ZooResult:
    layers = [
        Layer("convolution 1x1", f"conv 1x1/1 8-{8 * faster:.0f}, 7x7", 2, 10.0, 10.0 / faster, 1e-3, 2e-3),
        Layer("Linear", "linear 8-4, 2", 1, 10.0, 20.0, 1e-3, 1e-3, "dtype torch.int8"),
    ]
    peers = {
        "eager": peer(4.0),
        "graph": peer(2.0),
        "compile-reduce-overhead": peer(1.0, None),
        "compile-max-autotune": peer(1.1),
        "fused-graph": peer(1.0 / faster),
        "compile-tritonnn": peer(0.8),
        "swapped-graph": Peer(Measured(FAILED, note="RuntimeError: out of memory")),
    }
    return ZooResult(network, "bf16", 64, {"device": "NVIDIA H100", "command": "python zoo.py"}, peers, layers)


def saved(folder: Path, *results: ZooResult) -> list[ZooCase]:
    cases = [ZooCase(result.network, result.dtype, result.batch_size) for result in results]
    for case, result in zip(cases, results):
        result.save(folder / case.file)
    return cases


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = made_up("resnet50", 2.0)
    [case] = saved(tmp_path, result)
    assert ZooResult.load(tmp_path / case.file) == result


def test_page_table_and_picture(tmp_path):
    """Worst and geometric mean are over the networks, against the best of PyTorch's ways."""
    cases = saved(tmp_path, made_up("resnet50", 2.0), made_up("timm/resnet50", 0.5))
    missing = ZooCase("vgg16_bn", "bf16", 64)
    found = zoo_report.write(tmp_path, [*cases, missing], "python benchmarks/zoo.py")
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


def test_layers_of_a_kind(tmp_path):
    cases = saved(tmp_path, made_up("resnet50", 2.0), made_up("vgg16", 0.5))
    found = zoo_report.write(tmp_path, cases, "")
    [kinds] = [table for table in zoo_report.tables(found) if table.title == "Layers alone, bf16, 64"]
    assert kinds.rows == [
        ["Linear", "1", "0.50", "0.50", "1 (100%)", "1.0e-03", "1.0e-03", "1"],
        ["convolution 1x1", "2", "1.00", "0.50", "1 (50%)", "1.0e-03", "2.0e-03", "0"],
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--networks", "resnet5"], "torchvision has no network 'resnet5': did you mean"),
        (["--networks", "nowhere/resnet50"], "names no network"),
        (["--batch-sizes", "0"], "argument --batch-sizes"),
        (["--peers", "jax"], "invalid choice"),
    ],
)
def test_wrong_use_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        zoo.parse(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        zoo.main(["--networks", "resnet18"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: no CUDA GPU: times on anything else say nothing about the kernels\n"


@pytest.fixture
def children(monkeypatch) -> list:
    """What processes were started for; each writes a result, but that of a network called "vgg11" fails."""
    started = []

    def child(self, case, what, peers, gpu, environment, quiet=False):
        started.append((what, case.task, *(peers if what == "compile" else [gpu])))
        if what == "measure" and case.task != "vgg11":
            saved(self.folder, made_up(case.task, 2.0))
        return int(case.task == "vgg11")

    monkeypatch.setattr(zoo_processes.Run, "_child", child)
    monkeypatch.setattr(zoo_processes, "devices", lambda: ["0", "1"])
    return started


def run(folder: Path, *networks: str, options: tuple[str, ...] = ()) -> int:
    args = zoo.parse(["--networks", *networks, "--batch-sizes", "64", "--dtypes", "bf16", *options])
    return zoo_processes.Run(args, folder, Console(quiet=True)).run()


def test_it_goes_on_where_it_stopped(tmp_path, children):
    assert run(tmp_path, "resnet18") == 0
    assert run(tmp_path, "resnet18", "vgg11", "alexnet") == 1, "a case failed"
    assert sorted(name for _, name, _ in children) == ["alexnet", "resnet18", "vgg11"]
    assert run(tmp_path, "resnet18", options=("--again",)) == 0
    assert [name for _, name, _ in children].count("resnet18") == 2
    assert {"0", "1"} >= {gpu for *_, gpu in children}


def test_ahead_compiles_what_has_something_to_compile(tmp_path, children):
    run(tmp_path, "resnet18", options=("--ahead", "2", "--peers", "eager", "fused-graph", "compile-tritonnn"))
    compiled = sorted(children[:-1])
    assert compiled == [("compile", "resnet18", "compile-tritonnn"), ("compile", "resnet18", "fused-graph")]
    assert children[-1][0] == "measure"


CHILD = """
import sys, time
from pathlib import Path
name, folder = sys.argv[sys.argv.index("--networks") + 1], Path(sys.argv[sys.argv.index("--output") + 1])
end, moments = time.time() + 1.5, []
if name == "alexnet":
    time.sleep(0.4)
    print("ready to be timed", flush=True)
    assert sys.stdin.readline()
    end = time.time() + 0.4
while time.time() < end:
    time.sleep(0.005)
    moments.append(time.time())
print("timed", flush=True)
(folder / f"{name}.txt").write_text(" ".join(map(str, moments)))
"""


def test_who_is_timed_has_the_gpu_alone(tmp_path, monkeypatch):
    """Where two run together, one is stopped while the other is timed, and goes on afterwards."""
    (script := tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(zoo_processes, "SCRIPT", str(script))
    monkeypatch.setattr(zoo_processes, "devices", lambda: ["0"])
    saved(tmp_path, made_up("alexnet", 2.0), made_up("vgg11", 2.0))
    assert run(tmp_path, "alexnet", "vgg11", options=("--again", "--together", "2")) == 0
    timed, other = ([*map(float, (tmp_path / f"{name}.txt").read_text().split())] for name in ("alexnet", "vgg11"))
    assert not [moment for moment in other if timed[0] < moment < timed[-1]]
    assert min(other) < timed[0] and max(other) > timed[-1]


def test_within_ends_as_if_interrupted():
    with pytest.raises(KeyboardInterrupt), zoo.interrupted_after(0.05):
        time.sleep(5)


def test_only_what_was_compiled_is_measured_and_more_of_it_later(tmp_path, children, monkeypatch):
    """What fails to compile is left out; a case that lacks a peer is measured again once that was compiled."""
    peers, measured, child = ("graph", "fused-graph", "compile-tritonnn"), [], zoo_processes.Run._child
    failing = ["compile-tritonnn"]

    def noting(self, case, what, peers, *args, **kwargs):
        status = child(self, case, what, peers, *args, **kwargs)
        if what == "measure":
            measured.append(sorted(peers))
            result = made_up(case.task, 2.0)
            result.peers = {name: result.peers[name] for name in peers}
            saved(tmp_path, result)
        return int(peers == failing) or status

    monkeypatch.setattr(zoo_processes.Run, "_child", noting)
    options = "--ahead", "2", "--only-compiled", "--peers", *peers
    for _ in range(2):
        run(tmp_path, "resnet18", options=options)
    failing.clear()
    run(tmp_path, "resnet18", options=options)
    assert measured == [["fused-graph", "graph"], ["compile-tritonnn", "fused-graph", "graph"]]


@pytest.fixture
def small_network(monkeypatch) -> None:
    def build(name: str) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()

    monkeypatch.setattr(zoo_case, "build", build)
    monkeypatch.setattr(zoo_case, "SIZE", 8)


def test_a_network_is_measured(small_network, monkeypatch):
    """A wrong result has no time."""
    monkeypatch.setitem(zoo_case.PEERS, "graph", lambda setup: lambda: torch.zeros(2, 4))
    said = []
    with torch.no_grad():
        peers = measure_network(ZooCase("small", "fp32", 2), CPU, ["eager", "graph"], said.append, 0.01)
    assert peers["eager"].measured.timing and peers["eager"].first_call_s > 0
    assert peers["graph"].measured.status == "wrong" and not peers["graph"].measured.timing
    assert len(said) == 2


def test_layers_are_measured(small_network):
    with torch.no_grad():
        layers = measure_layers(ZooCase("small", "fp32", 2), CPU, lambda line: None, 0.001)
    kinds = ["convolution 3x3", "BatchNorm2d", "ReLU", "depthwise 3x3", "AdaptiveAvgPool2d", "Linear"]
    assert [layer.kind for layer in layers] == kinds
    assert all(layer.ours_error < 1e-6 and layer.ours_us > 0 for layer in layers)
    assert layers[3].label == "conv 3x3/1 8-8, 8 groups, 6x6"
