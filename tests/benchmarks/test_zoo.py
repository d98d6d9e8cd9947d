"""`benchmarks/zoo.py`: all of it but the GPU."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import zoo, zoo_case, zoo_processes
from benchmarks.networks import cudnn_benchmark
from benchmarks.results import FAILED
from benchmarks.zoo_case import PEERS, Contest, ZooCase, ZooResult, measure_layers
from lit_modules.command_line import UserError
from tests.helpers.zoo_results import made_up, saved

CPU = torch.device("cpu")


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = made_up("resnet50", 2.0)
    [case] = saved(tmp_path, result)
    assert ZooResult.load(tmp_path / case.file) == result


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


def test_what_tells_the_most_is_compiled_first(tmp_path, children):
    """All cases of a peer, before the next peer."""
    peers = "compile-max-autotune", "swapped-graph", "graph", "compile-reduce-overhead", "fused-graph"
    assert run(tmp_path, "resnet18", "alexnet", options=("--ahead", "1", "--compile-only", "--peers", *peers)) == 0
    order = "fused-graph", "compile-reduce-overhead", "swapped-graph", "compile-max-autotune"
    assert children == [("compile", network, peer) for peer in order for network in ("resnet18", "alexnet")]


def test_compiling_leaves_half_of_the_time_to_what_is_measured(tmp_path, children, monkeypatch):
    quick = zoo_processes.Run._child

    def slow(self, case, what, *args, **kwargs):
        time.sleep(0.3 if what == "compile" else 0)
        return quick(self, case, what, *args, **kwargs)

    monkeypatch.setattr(zoo_processes.Run, "_child", slow)
    run(tmp_path, "resnet18", "alexnet", "vgg13", "vgg16", options=("--ahead", "1", "--within", "2"))
    assert [what for what, *_ in children] == ["compile"] * 2 + ["measure"] * 4


def test_no_case_begins_once_the_rest_of_the_time_is_for_turns(tmp_path, children, monkeypatch):
    """The same command goes on."""
    child = zoo_processes.Run._child

    def last(self, *args, **kwargs):
        self.ready_by = 0.0
        return child(self, *args, **kwargs)

    monkeypatch.setattr(zoo_processes, "devices", lambda: ["0"])
    with monkeypatch.context() as patch:
        patch.setattr(zoo_processes.Run, "_child", last)
        assert run(tmp_path, "resnet18", "alexnet", options=("--within", "100")) == zoo_processes.INTERRUPTED
    assert [name for _, name, _ in children] == ["resnet18"]
    assert run(tmp_path, "resnet18", "alexnet", options=("--within", "100")) == 0
    assert [name for _, name, _ in children] == ["resnet18", "alexnet"]


def test_what_waits_at_the_end_shares_the_time_that_is_left(tmp_path):
    options = ["--networks", "resnet18", "--together", "8", "--within", "100"]
    waiting = zoo_processes.Run(zoo.parse(options), tmp_path, Console(quiet=True))
    waiting.processes = dict.fromkeys(range(8), "0") | {8: "1"}
    assert waiting._granted("0") == 0.5, "there is time for all"
    waiting.end = time.time() + zoo_processes.WRITING_S + 6.4
    assert waiting._granted("0") == pytest.approx(0.3, abs=0.01) and waiting._granted("1") == 0.5
    waiting.end = 0.0
    assert waiting._granted("0") == zoo_processes.LEAST_BUDGET_S


def test_processes_beside_each_other_share_the_cores(monkeypatch):
    """What the user has set stays."""
    monkeypatch.setattr(zoo_processes.os, "sched_getaffinity", lambda pid: range(32))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    for beside, share in ((1, "32"), (10, "3"), (64, "1")):
        expected = {"OMP_NUM_THREADS": "7", "TORCHINDUCTOR_COMPILE_THREADS": share}
        assert zoo_processes.share_of_cores(beside) == expected


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
(folder / f"{name}.txt").write_text(" ".join(map(str, moments)))
print("timed", flush=True)
time.sleep(20)
(folder / "ended").touch()
"""


def test_who_is_timed_has_the_gpu_alone(tmp_path, monkeypatch):
    """Where two run together, one is stopped while the other is timed, and goes on afterwards. No end is waited for."""
    (script := tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(zoo_processes, "SCRIPT", str(script))
    monkeypatch.setattr(zoo_processes, "devices", lambda: ["0"])
    saved(tmp_path, made_up("alexnet", 2.0), made_up("vgg11", 2.0))
    assert run(tmp_path, "alexnet", "vgg11", options=("--again", "--together", "2")) == 0
    timed, other = ([*map(float, (tmp_path / f"{name}.txt").read_text().split())] for name in ("alexnet", "vgg11"))
    assert not [moment for moment in other if timed[0] < moment < timed[-1]]
    assert min(other) < timed[0] and max(other) > timed[-1] and not (tmp_path / "ended").exists()


CRASHING = """
import os, sys
for name in sys.argv[sys.argv.index("--peers") + 1 : sys.argv.index("--output")]:
    print(f"gets ready: {name}", flush=True)
    if name == "fused-graph":
        os.abort()
print("timed", flush=True)
"""


def test_a_peer_that_ends_its_process_does_not_cost_the_others(tmp_path, monkeypatch):
    (script := tmp_path / "child.py").write_text(CRASHING)
    monkeypatch.setattr(zoo_processes, "SCRIPT", str(script))
    measured, child = [], zoo_processes.Run._child

    def noting(self, case, what, peers, *args, **kwargs):
        measured.append(list(peers))
        saved(self.folder, made_up(case.task, 2.0))
        return child(self, case, what, peers, *args, **kwargs)

    monkeypatch.setattr(zoo_processes.Run, "_child", noting)
    assert run(tmp_path, "alexnet", options=("--again", "--peers", "graph", "fused-graph", "eager")) == 1
    assert measured == [["graph", "fused-graph", "eager"], ["graph", "eager"]]
    assert run(tmp_path, "alexnet", options=("--again", "--peers", "fused-graph")) == 1
    assert len(measured) == 3


def test_within_ends_as_if_interrupted():
    with pytest.raises(KeyboardInterrupt), zoo_processes.interrupted_after(0.05):
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
    contest = Contest(ZooCase("small", "fp32", 2), CPU, said.append)
    with torch.no_grad():
        contest.get_ready(["graph", "eager"])
        peers = contest.timed(0.01)
    assert peers["eager"].measured.timing and peers["eager"].first_call_s > 0
    assert peers["graph"].measured.status == "wrong" and not peers["graph"].measured.timing
    assert [*contest.calls] == ["eager"]
    assert [line.split(",")[0].split(":")[0] for line in said[1:]] == ["gets ready", "eager", "gets ready", "graph"]


@pytest.fixture
def child(small_network, monkeypatch, tmp_path) -> Callable[..., ZooResult]:
    """Measures a small network in this process, and returns what the file has then."""
    date = iter(range(100))
    monkeypatch.setattr(zoo, "settings", lambda device: {"date": str(next(date))})
    monkeypatch.setattr(zoo, "turn", lambda device: nullcontext(0.01))
    for name in ("graph", "compile-reduce-overhead", "fused-graph"):
        monkeypatch.setitem(PEERS, name, PEERS["eager"])

    def measure(*peers: str, until: float = math.inf, options: tuple[str, ...] = ()) -> ZooResult:
        arguments = ["--networks", "resnet18", "--batch-sizes", "2", "--dtypes", "fp32", "--output", str(tmp_path)]
        arguments += ["--peers", *peers, "--until", str(until), "--child", "measure", *options]
        zoo.child(zoo.parse(arguments))
        return ZooResult.load(tmp_path / "resnet18-fp32-2.json")

    return measure


def test_a_case_that_is_cut_off_keeps_what_was_ready_and_goes_on(child, monkeypatch):
    """The peer during which the time was up is missing, also if the interruption is hidden by an error."""
    peers = "graph", "fused-graph", "compile-reduce-overhead"

    def hidden(setup: object) -> None:
        try:
            time.sleep(60)
        except KeyboardInterrupt as error:
            raise RuntimeError("capture failed") from error

    for slow in (lambda setup: time.sleep(60), hidden):
        monkeypatch.setitem(PEERS, "compile-reduce-overhead", slow)
        found = child(*peers, until=time.time() + 0.5, options=("--again",))
        assert [*found.peers] == ["graph", "fused-graph"] and all(peer.measured.timing for peer in found.peers.values())
    monkeypatch.setitem(PEERS, "compile-reduce-overhead", PEERS["eager"])
    monkeypatch.setitem(PEERS, "graph", lambda setup: pytest.fail("the file has it"))
    again = child(*peers)
    assert {name: peer.taken for name, peer in again.peers.items() if peer.measured.timing} == {
        "graph": "1",
        "compile-reduce-overhead": "2",
        "fused-graph": "1",
    }


def test_with_nothing_ready_in_time_no_file_is_written(child):
    with pytest.raises(SystemExit) as end:
        child("graph", until=time.time() - 1)
    assert end.value.code == zoo_processes.INTERRUPTED


def test_times_of_another_card_or_version_are_not_kept(child, monkeypatch):
    child("eager", "graph")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    found = child("graph", "fused-graph")
    assert [*found.peers] == ["graph", "fused-graph"] and {peer.taken for peer in found.peers.values()} == {"1"}


def test_what_found_no_memory_beside_others_is_tried_again(child, monkeypatch):
    def too_large(setup: object) -> None:
        raise torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB")

    monkeypatch.setitem(PEERS, "fused-graph", too_large)
    assert [*child("eager", "fused-graph", options=("--shared", "--warm")).peers] == ["eager"]
    alone = child("eager", "fused-graph")
    assert alone.peers["fused-graph"].measured.status == FAILED and alone.peers["eager"].first_call_s is None


def test_only_cudnns_choice_waits_for_the_others(small_network, monkeypatch):
    """Batch norms are calibrated without one, and the reference is ready before."""
    alone, seen = [], {}

    @contextmanager
    def measuring_alone(device: torch.device) -> Iterator[None]:
        alone.append(device)
        yield
        alone.clear()

    def noting(name: str, function: Callable) -> Callable:
        def noted(first: object, *rest: object) -> object:
            seen[name] = bool(alone), torch.backends.cudnn.benchmark, "reference" in vars(first)
            return function(first, *rest)

        return noted

    eager = PEERS["eager"]
    monkeypatch.setattr(zoo_case, "measuring_alone", measuring_alone)
    monkeypatch.setattr(zoo_case, "calibrate", noting("calibrate", zoo_case.calibrate))
    monkeypatch.setitem(PEERS, "eager", noting("eager", eager))
    monkeypatch.setitem(PEERS, "graph", noting("graph", eager))
    with torch.no_grad(), cudnn_benchmark(True):
        Contest(ZooCase("small", "fp32", 2), CPU, print).get_ready(["graph"])
    assert seen == {"calibrate": (False, False, False), "eager": (True, True, True), "graph": (False, True, True)}


def test_layers_are_measured(small_network):
    with torch.no_grad():
        layers = measure_layers(ZooCase("small", "fp32", 2), CPU, lambda line: None, 0.001)
    kinds = ["convolution 3x3", "BatchNorm2d", "ReLU", "depthwise 3x3", "AdaptiveAvgPool2d", "Linear"]
    assert [layer.kind for layer in layers] == kinds
    assert all(layer.ours_error < 1e-6 and layer.ours_us > 0 for layer in layers)
    assert layers[3].label == "conv 3x3/1 8-8, 8 groups, 6x6"
