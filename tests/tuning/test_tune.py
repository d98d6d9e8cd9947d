"""Tuning: what is tried, that nothing wrong is chosen, and what is told of it."""

import contextlib
from collections.abc import Callable, Iterable

import pytest
import torch
import triton
from helpers.compare import DEVICE, image
from helpers.problems import COPIED, DEFAULT, HALF, POINTERS, PROBLEMS, SLICED, pointers, problem
from helpers.trained import trained
from torch import nn

import tritonnn
from tritonnn.ops.conv2d import dispatch, op, tables
from tritonnn.ops.conv2d.problem import Choice, Problem, problem_of
from tritonnn.runtime import hardware
from tritonnn.runtime.dependent_launch import launches_as_in_graphs
from tritonnn.tuning import harness as harnesses
from tritonnn.tuning import tune as tuning
from tritonnn.tuning.harness import Harness, Wrong, operands
from tritonnn.tuning.tune import Tuned, TuningReport, fastest, find_problems

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("tables_folder")
in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


class TestOperands:
    @pytest.mark.parametrize(
        "wanted",
        {
            "channels_last": problem(),
            "NCHW": problem(channels_last_x=False, channels_last_y=False),
            "TF32": problem(input_precision="tf32", epilogue=("bias", "relu", "round_y")),
            "strict float32": problem(input_precision="tf32x3"),
            "epilogue": problem(**HALF, epilogue=("scale", "bias", "residual", "relu")),
            "stride, groups": problem(stride=(2, 2), groups=2, dilation=(2, 1)),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_they_pose_the_problem(self, wanted):
        assert problem_of(operands(wanted[1], DEVICE)[0]) == wanted[1]

    def test_what_nobody_tunes(self):
        product, _ = operands(problem(), DEVICE)
        assert problem_of(product._replace(x=product.x[:, :, ::2, ::2])) is None
        assert problem_of(product._replace(x=product.x.double())) is None


def garbage(y, runs):
    y.normal_()


def unwritten(y, runs):
    y[1, 3, 2, 2] = float("nan")


def image_between(y, runs):
    y[5] *= 1.01  # neither among the first nor among the last


def one_element(y, runs):
    y[5, 3, 2, 2] += 0.1


def another_every_time(y, runs):
    y[5, 3, 2, 2] *= 1 + 3e-7 * len(runs)


def less_precise(y, runs):
    y *= 1 + 4e-7


def crash(y, runs):
    raise triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")


@in_the_interpreter
class TestChoosing:
    """`fastest`, with a clock that is told what to say."""

    def choose(self, times: dict[Choice, float], harness: Harness | None = None) -> Tuned:
        harness = harness or Harness(problem(10, size=4, taps=1), CPU)
        return fastest(harness, list(times), lambda choice: lambda: times[choice])

    @pytest.mark.parametrize("epilogue", [(), ("scale", "bias", "residual", "relu")], ids=["plain", "epilogue"])
    def test_the_fastest(self, epilogue):
        harness = Harness(problem(10, size=4, taps=1, epilogue=epilogue), CPU)
        tuned = self.choose({DEFAULT: 9.0, POINTERS: 8.0, SLICED: 5.0, COPIED: 7.0}, harness)
        assert tuned.rejected == {}
        assert (tuned.choice, tuned.us, tuned.default, tuned.default_us, tuned.tried) == (SLICED, 5.0, DEFAULT, 9.0, 4)

    def test_the_default_stays_where_the_gain_is_noise(self):
        assert self.choose({DEFAULT: 9.0, POINTERS: 8.9}).choice == DEFAULT

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (garbage, "wrong: error"),
            (unwritten, "wrong: not all of y"),
            (image_between, "wrong: an image differs"),
            (one_element, "wrong: an image differs"),
            (another_every_time, "wrong: two runs differ"),
            (less_precise, "wrong: error"),
            (crash, "OutOfResources"),
        ],
    )
    def test_what_is_wrong_is_never_chosen(self, change, reason, monkeypatch):
        runs = []

        def run(product, choice):
            dispatch.run(product, choice)
            if choice == POINTERS:
                runs.append(choice)
                change(product.y, runs)

        monkeypatch.setattr(harnesses, "run", run)
        tuned = self.choose({DEFAULT: 9.0, POINTERS: 1.0, SLICED: 5.0})
        assert tuned.choice == SLICED
        assert list(tuned.rejected) == [POINTERS] and tuned.rejected[POINTERS].startswith(reason)
        assert len(tuned.wrong) == reason.startswith("wrong")

    def test_a_wrong_default_is_replaced(self, monkeypatch):
        def run(product, choice):
            dispatch.run(product, choice)
            product.y.mul_(1.01 if choice == DEFAULT else 1)

        monkeypatch.setattr(harnesses, "run", run)
        assert self.choose({DEFAULT: 1.0, POINTERS: 8.0}).choice == POINTERS
        with pytest.raises(Wrong, match="error"):
            self.choose({DEFAULT: 1.0})


PLAIN, BIASED, WHOLE = (problem(10, size=4, taps=1, epilogue=steps) for steps in ((), ("bias",), ("bias", "relu")))
ELSEWHERE = problem(10, size=4, taps=1, k=16)


@in_the_interpreter
class TestFamilies:
    """`tune`, on a CPU that poses as a GPU, with a clock that is told what to say."""

    @pytest.fixture(autouse=True)
    def posing(self, monkeypatch):
        self.compiled: list[dict[Problem, list[Choice]]] = []
        times = {DEFAULT: 9.0, POINTERS: 8.0, SLICED: 5.0}
        monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        monkeypatch.setattr(tuning, "_check", lambda inputs: torch.device("cpu", 0))
        monkeypatch.setattr(tuning, "candidates", lambda product, gpu: list(times))
        monkeypatch.setattr(tuning, "default_choice", lambda product: DEFAULT)
        monkeypatch.setattr(tuning, "compile_ahead", self.compile_ahead)
        monkeypatch.setattr(Harness, "clock", lambda self, choice: lambda: times[choice])

    def compile_ahead(self, calls: Iterable[Callable[[], object]], advance: Callable[[int], None]) -> None:
        """Notes the choices that the calls run, by their problems."""
        compiled: dict[Problem, list[Choice]] = {}
        for product, choice in [call.args for call in calls]:
            compiled.setdefault(problem_of(product), []).append(choice)
        if compiled:
            self.compiled.append(compiled)
        total = sum(map(len, compiled.values()))
        for _ in range(total):
            advance(total)

    def tune(self, problems: list[Problem], **options: bool) -> TuningReport:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "find_problems", lambda *_: problems)
            return tritonnn.tune(nn.Identity(), torch.zeros(1), **options)

    def test_the_longest_epilogue_stands_for_the_others(self):
        report = self.tune([PLAIN, WHOLE, ELSEWHERE, BIASED])
        every, two = [DEFAULT, POINTERS, SLICED], [DEFAULT, SLICED]
        assert self.compiled == [{WHOLE: every, ELSEWHERE: every}, {PLAIN: two, BIASED: two}]
        assert {t.problem: t.choice for t in report.tuned} == dict.fromkeys([WHOLE, ELSEWHERE, PLAIN, BIASED], SLICED)

    def test_a_choice_from_the_tables_stands_for_others_too(self):
        self.tune([WHOLE])
        report = self.tune([WHOLE, PLAIN])
        assert report.known == {WHOLE} and self.compiled[1:] == [{PLAIN: [DEFAULT, SLICED]}]
        self.tune([WHOLE, PLAIN], again=True)
        assert self.compiled[2:] == [{WHOLE: [DEFAULT, POINTERS, SLICED]}, {PLAIN: [DEFAULT, SLICED]}]

    def test_what_was_tuned_on_another_gpu_is_tuned_again(self, monkeypatch):
        monkeypatch.setitem(tables.SAME_CHIP, "GPU", "another")
        tables.add(tables.SHIPPED / tables.file_name("another"), {WHOLE: tables.Entry(POINTERS, 1.0, 2.0)})
        assert tables.tuned_choices(0) == {WHOLE: POINTERS}
        report = self.tune([WHOLE])
        assert report.known == set() and [(t.problem, t.choice) for t in report.tuned] == [(WHOLE, SLICED)]
        assert tables.tuned_choices(0)[WHOLE] == SLICED

    def test_where_that_fails_the_others_keep_their_default(self, monkeypatch):
        def run(product, choice):
            dispatch.run(product, choice)
            product.y.mul_(1.1 if product.epilogue.activation == "relu" else 1)

        monkeypatch.setattr(harnesses, "run", run)
        report = self.tune([WHOLE, PLAIN])
        assert list(report.failed) == [WHOLE] and [(t.problem, t.choice) for t in report.tuned] == [(PLAIN, DEFAULT)]

    def test_a_bar_starts_again_for_the_others(self, monkeypatch):
        bars = []
        monkeypatch.setattr("rich.progress.Progress.stop", lambda bar: bars.extend(bar.tasks))
        self.tune([WHOLE, ELSEWHERE, PLAIN], progress=True)
        told = {task.description.partition(", ")[2]: (task.completed, task.total) for task in bars}
        assert told == {"compiling": (2, 2), "timing": (1, 1)}


@in_the_interpreter
class TestFinding:
    def model(self) -> nn.Module:
        layers = (
            nn.Conv2d(4, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        return nn.Sequential(*layers, nn.Dropout(0.5))

    def test_the_model_is_left_as_it_was(self):
        model = self.model()
        model[2].eval()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        found = find_problems(model, (image(2, 4, 6, 6),))
        assert [p.c for p in found] == [4, 8]  # the two that are alike count once
        assert [type(layer) for layer in model] == [type(layer) for layer in self.model()]
        assert [layer.training for layer in model] == [True, True, False, True, True, True]
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])

    def test_after_an_error_too(self):
        model = self.model()
        with pytest.raises(RuntimeError, match="channels"):
            find_problems(model, (image(2, 5, 6, 6),))
        assert type(model[0]) is nn.Conv2d and model[0].training
        assert [p.c for p in find_problems(model, (image(2, 4, 6, 6),))] == [4, 8]

    def test_kinds(self):
        assert find_problems(self.model(), (image(2, 4, 6, 6),), "relu") == []

    def test_fused(self):
        network = tritonnn.fuse(trained(self.model(), torch.float32), cuda_graph=True)
        graphs = network.graphs
        graphs.refused["before",] = "it was captured with other choices"
        assert [p.epilogue for p in find_problems(network, (image(2, 4, 6, 6),))] == [("bias", "relu"), ("bias",)]
        assert network.graphs is graphs and not graphs.refused

    def test_float64_is_left_to_the_defaults(self):
        assert find_problems(self.model().double(), (image(2, 4, 6, 6).double(),)) == []


class TestRefusals:
    @pytest.fixture
    def with_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)

    @in_the_interpreter
    def test_without_a_gpu(self):
        with pytest.raises(RuntimeError, match="needs a CUDA GPU"):
            tritonnn.tune(nn.Conv2d(4, 4, 3), image(1, 4, 5, 5))

    def test_under_deterministic_algorithms(self, with_gpu):
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(RuntimeError, match="use_deterministic_algorithms"):
                tritonnn.tune(nn.Conv2d(4, 4, 3), torch.zeros(1, 4, 5, 5))
        finally:
            torch.use_deterministic_algorithms(False)

    def test_in_a_capture(self, with_gpu, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            tritonnn.tune(nn.Conv2d(4, 4, 3), torch.zeros(1, 4, 5, 5))

    def test_an_example_on_the_cpu(self, with_gpu):
        with pytest.raises(RuntimeError, match="got one on cpu"):
            tritonnn.tune(nn.Conv2d(4, 4, 3), torch.zeros(1, 4, 5, 5))


OTHER = problem(**HALF, n=4, epilogue=("bias", "relu"))


class TestReport:
    tuned = Tuned(OTHER, DEFAULT, 9.0, SLICED, 5.0, 8, {POINTERS: "wrong: error 1.0", COPIED: "OutOfResources: ..."})

    def test_table(self):
        lines = str(TuningReport([self.tuned], {problem()}, seconds=12.3)).splitlines()
        assert len(lines) == 4
        cells = [cell.strip() for cell in lines[1].split("  ") if cell]
        assert cells[:1] + cells[-1:] == [str(OTHER), str(SLICED)] and cells[-5:-1] == ["9.0", "5.0", "8", "1"]
        assert lines[2] == f"{OTHER}: {POINTERS}: wrong: error 1.0"
        assert "1 convolutions tuned in 12 s: 5.0 us together, by default 9.0" in lines[3]
        assert "8 candidates, 1 of them wrong, 1 were in the tables" in lines[3]

    def test_nothing(self):
        assert TuningReport().summary == "no convolution was tuned"

    def test_sum_counts_what_the_first_tuned_once(self):
        both = TuningReport([self.tuned], seconds=2.0) + TuningReport(known={OTHER, problem()}, seconds=1.0)
        assert (both.tuned, both.known, both.seconds) == ([self.tuned], {problem()}, 3.0)


@pytest.mark.gpu
class TestOnAGpu:
    def network(self, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        convs = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1, bias=False)
        model = trained(nn.Sequential(*convs), dtype).to(memory_format=torch.channels_last)
        return model, image(8, 64, 16, 16, dtype=dtype, channels_last=True)

    @pytest.mark.parametrize("fused", [False, True], ids=["swapped", "fused"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_launches_use_what_was_tuned(self, dtype, fused, tables_folder, monkeypatch):
        model, x = self.network(dtype)
        network = tritonnn.fuse(model, cuda_graph=True) if fused else model
        with torch.no_grad():
            expected = model.double()(x.double())
            model.to(dtype)
            report = tritonnn.tune(network, x)
            assert len(report.tuned) == 2 and not report.failed and not report.known
            assert all(t.us <= t.default_us for t in report.tuned)
            (path,) = tables_folder.iterdir()
            assert path.name == tables.file_name(torch.cuda.get_device_name())
            assert {p: e.choice for p, e in tables.read(path).items()} == {t.problem: t.choice for t in report.tuned}

            ran = []
            run = dispatch.run
            for module in (op, dispatch):  # which launch fused and swapped layers
                monkeypatch.setattr(module, "run", lambda *args: (ran.append(args[1]), run(*args)))
            tables.forget()  # as in another process
            with tritonnn.swapped(model):
                for _ in range(3):
                    y = network(x)
        assert ran[:2] == [t.choice for t in report.tuned]
        tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5
        assert float((y.double() - expected).norm() / expected.norm()) < tolerance

    def test_what_is_known_is_not_tuned_again(self):
        model, x = self.network(torch.bfloat16)
        first = tritonnn.tune(model, x)
        second = tritonnn.tune(model, x)
        assert second.tuned == [] and second.known == {t.problem for t in first.tuned}
        assert len(tritonnn.tune(model, x, again=True).tuned) == 2

    def test_a_folder_that_cannot_be_written(self, tables_folder):
        tables_folder.write_text("a file")
        model, x = self.network(torch.bfloat16)
        with pytest.warns(UserWarning, match="lost with this process"):
            report = tritonnn.tune(model, x)
        assert tables.tuned_choices(0) == {t.problem: t.choice for t in report.tuned}

    def test_a_candidate_is_compiled_once(self, tmp_path, monkeypatch):
        """For the graph in which it is timed; it is checked outside."""
        compiled = []
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **told: compiled.append(told["src"].name))
        choice = Choice(pointers(64, 32, 32, num_stages=2))
        with launches_as_in_graphs():
            harness = Harness(problem(c=40, k=56), torch.device(DEVICE.type, 0))
            compiled.clear()  # what packs the weight
            harness.check(choice)
            assert harness.clock(choice)() > 0
        assert compiled == ["conv2d_pointers_forward_kernel"]

    def test_not_in_a_capture(self):
        model, x = self.network(torch.bfloat16)
        with (
            pytest.raises(RuntimeError, match="while a CUDA graph is captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            tritonnn.tune(model, x)

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_every_candidate_is_right(self, name):
        harness = Harness(PROBLEMS[name], torch.device(DEVICE.type, 0))
        default, *choices = dispatch.candidates(harness.product, hardware.gpu(harness.device))
        rejected = {}
        with launches_as_in_graphs():
            like, _ = harness.check(default)
            for choice in choices:
                try:
                    harness.check(choice, like)
                except triton.runtime.errors.OutOfResources as error:
                    rejected[choice] = str(error)
        assert len(rejected) < (len(choices) + 1) / 2, rejected
