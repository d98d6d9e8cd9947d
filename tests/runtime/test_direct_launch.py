"""Launches past the Python of Triton's launcher give a kernel what the launcher gives it.

A driver that does nothing (benchmarks/idle_driver.py) tells what that is, behind the launchers that Triton compiles.
"""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import idle_driver
from tritonnn.runtime import capabilities, direct_launch, replay
from tritonnn.runtime.recording import Recording

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="its launchers would be Triton's for this process"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]
GRID, STREAM = (7, 3, 1), 0xBEEF
DESCRIPTOR = [128, 4, 4, 8, 8]
"""Bytes of the parameters of a descriptor in two dimensions: encoded, sizes, strides."""
SCRATCH = [8, 8]


def kernel(*names: str) -> SimpleNamespace:
    return SimpleNamespace(arg_names=list(names), __name__="_".join(names))


def bfloat16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def box(x: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [16, 32])


CASES = {
    "pointers and numbers": (
        lambda x, y: (x, 5, 0.5, y[2:], x, 2**40),
        [8, 4, 4, 8, 8, 8],
    ),
    "equal numbers and addresses": (lambda x, y: (y, 1, 1.0, y, 1, y), [8, 4, 4, 8, 4, 8]),
    "without a bias": (lambda x, y: (x, None, y), [8, 8]),
    "descriptors": (lambda x, y: (box(x), y, 5, box(y[16:]), x), [*DESCRIPTOR, 8, 4, *DESCRIPTOR, 8]),
    "descriptors alone": (lambda x, y: (box(x), box(y)), 2 * DESCRIPTOR),
}


def recorded(arguments: tuple, tensors: list[torch.Tensor], **constants) -> replay.Launch:
    """The launch of a kernel of these arguments as it is noted for a plan."""
    names = [f"arg{i}" for i in range(len(arguments))]
    of = kernel(*names, *constants)
    compiled = idle_driver.compiled(of, *arguments, grid=GRID, **constants)
    recording = Recording(tensors)
    recording.note_launch(of, compiled, GRID, arguments, constants)
    assert recording.complete
    return recording.launches[0]


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", idle_driver.driver())


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_given_what_tritons_launcher_gives_it(name):
    make, sizes = CASES[name]
    tensors = [bfloat16(64, 64), bfloat16(64, 64)]
    launch = recorded(make(*tensors), tensors, BLOCK=16)
    direct = launch.directly([t.data_ptr() for t in tensors])
    assert direct is not launch
    others = [bfloat16(64, 64), bfloat16(64, 64)]
    for x, y in (tensors, others, others[::-1], tensors):
        for stream in (STREAM, 0):
            calls = [partial(each, stream, [x.data_ptr(), y.data_ptr()]) for each in (launch, direct)]
            expected, actual = (idle_driver.launched([*sizes, *SCRATCH], call) for call in calls)
            assert any(expected) and actual == expected


def test_a_dependent_launch_stays_one():
    tensors = [bfloat16(64, 64)]
    launches = [recorded((tensors[0],), tensors, **options) for options in ({}, {"launch_pdl": True})]
    assert [launch.run.launch_pdl for launch in launches] == [False, True]
    assert all(launch.directly([tensors[0].data_ptr()]) is not launch for launch in launches)


def test_descriptors_are_encoded_once_for_each_address(monkeypatch):
    monkeypatch.setattr(direct_launch, "MOST_ENCODED", 4)
    tensors = [bfloat16(64, 64) for _ in range(6)]
    direct = recorded((box(tensors[0]),), tensors[:1]).directly([tensors[0].data_ptr()])

    def encoded(*chosen: torch.Tensor) -> int:
        before = idle_driver.encodings()
        for t in chosen:
            direct(STREAM, [t.data_ptr()])
        return idle_driver.encodings() - before

    assert encoded(*tensors[:4]) == 4
    assert encoded(*tensors[:4], *tensors[:4]) == 0
    assert encoded(*tensors, *tensors[4:]) == 2  # the fifth makes room
    assert encoded(tensors[0]) == 1


@pytest.mark.parametrize("need", ["global_scratch_size", "profile_scratch_size", "gsan_enabled"])
def test_launchers_that_do_more_are_called(need):
    tensors = [bfloat16(64, 64)]
    launch = recorded((tensors[0], 3), tensors)
    setattr(launch.run, need, 16)
    try:
        assert launch.directly([tensors[0].data_ptr()]) is launch
    finally:
        setattr(launch.run, need, 0)


def test_unknown_launchers_are_called(monkeypatch):
    tensors = [bfloat16(64, 64)]
    launch = recorded((tensors[0], 4), tensors)
    capabilities.forget()
    monkeypatch.setitem(capabilities.CHECKS, "launchers", (lambda: False, ""))
    try:
        assert launch.directly([tensors[0].data_ptr()]) is launch
    finally:
        monkeypatch.undo()
        capabilities.forget()
