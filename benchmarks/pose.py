"""A machine that poses as one with another GPU, so that Triton compiles for that."""

from triton.backends.compiler import GPUTarget

from tritonnn.runtime.hardware import Gpu

HOPPER = GPUTarget("cuda", 90, 32)
H100 = Gpu((9, 0), 132, 227 * 1024)


class Pose:
    """What Triton asks of the driver of a machine with a GPU of this kind: `triton.runtime.driver.set_active`."""

    def __init__(self, target: GPUTarget = HOPPER) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
