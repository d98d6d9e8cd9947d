"""A CUDA driver that does nothing, on a machine without one, so that Triton's launchers run and launch nothing.

Triton compiles its launchers, in C, against this library in place of libcuda. It needs gcc. `launched` tells what the
last kernel would have been given.
"""

import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from tritonnn.runtime import capabilities

SOURCE = """
#include "cuda.h"
#include <string.h>
static unsigned char last[1 << 14];
static int sizes[64], parameters;
static unsigned long long encodings;
void idle_expect(int n, const int *bytes) { parameters = n; memcpy(sizes, bytes, n * sizeof *sizes); }
unsigned char *idle_last(void) { return last; }
unsigned long long idle_encodings(void) { return encodings; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction kernel, void **params, void **extra) {
  unsigned long long head[] = {(unsigned long long)kernel, (unsigned long long)config->hStream, config->gridDimX,
                               config->gridDimY, config->gridDimZ, config->blockDimX};
  unsigned char *to = last;
  memcpy(to, head, sizeof head);
  to += sizeof head;
  for (int i = 0; i < parameters; to += sizes[i++]) memcpy(to, params[i], sizes[i]);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *dim, const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill) {
  cuuint64_t *words = (cuuint64_t *)map;
  ++encodings;
  memset(map, 0, sizeof *map);
  words[0] = (cuuint64_t)address;
  words[1] = type | rank << 8 | swizzle << 16 | fill << 24;
  for (cuuint32_t i = 0; i < rank && i < 5; ++i) { words[2 + i] = dim[i]; words[7 + i] = box[i]; }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
"""

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8"}
TYPES |= {torch.bool: "i1"}
DESCRIPTORS = tuple(capabilities.descriptors())


@functools.lru_cache
def library() -> ctypes.CDLL:
    """The driver, loaded as libcuda.so.1. From here on this process knows no other."""
    folder = Path(tempfile.mkdtemp(prefix="idle_driver"))
    backend = Path(triton.backends.nvidia.driver.__file__).parent
    ours = set(re.findall(r"CUresult (cu\w+)\(", SOURCE))
    others = sorted(set(re.findall(r"\b(cu[A-Z]\w+)\(", (backend / "driver.c").read_text())) - ours)
    (folder / "driver.c").write_text(SOURCE)
    (folder / "others.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in others))
    target = folder / "libcuda.so.1"
    command = "gcc -O1 -shared -fPIC -w -Wl,-soname,libcuda.so.1".split()
    command += [f"-I{backend / 'include'}", "-o", str(target), "driver.c", "others.c"]
    subprocess.run(command, cwd=folder, check=True)
    (folder / "libcuda.so").symlink_to(target)
    triton.knobs.nvidia.libcuda_path = str(folder)
    triton.knobs.cache.dir = str(folder / "cache")
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)


def launched(sizes: list[int], launch: Callable[[], object]) -> bytes:
    """Kernel, stream, grid, block and, of these sizes in bytes, the parameters that launch() gives a kernel."""
    idle = library()
    idle.idle_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    idle.idle_last.restype = ctypes.POINTER(ctypes.c_ubyte)
    size = 6 * 8 + sum(sizes)
    ctypes.memset(idle.idle_last(), 0, size)
    try:
        launch()
        return bytes(idle.idle_last()[:size])
    finally:
        idle.idle_expect(0, (ctypes.c_int * 1)())


def encodings() -> int:
    """How many tensor descriptors have been encoded."""
    library().idle_encodings.restype = ctypes.c_ulonglong
    return library().idle_encodings()


@functools.lru_cache
def driver() -> SimpleNamespace:
    """What Triton's launchers ask of the driver's module."""
    library()
    return SimpleNamespace(utils=CudaUtils(), launcher_cls=CudaLauncher, get_current_device=lambda: 0)


def compiled(kernel, *args, grid: tuple, warmup: bool = False, **constants) -> SimpleNamespace:
    """In place of `kernel.run`: what Triton's compiler returns for these arguments, without the kernel."""
    named = dict(zip(kernel.arg_names, args)) | constants
    arguments = [named.get(name) for name in kernel.arg_names]
    signature = {name: _type(arg, name in constants) for name, arg in zip(kernel.arg_names, arguments)}
    descriptors = [arg for arg in arguments if isinstance(arg, DESCRIPTORS)]
    source = SimpleNamespace(fn=kernel, constants={}, signature=signature)
    metadata = SimpleNamespace(
        tensordesc_meta=[_layout(arg) for arg in descriptors],
        global_scratch_size=0,
        global_scratch_align=1,
        profile_scratch_size=0,
        profile_scratch_align=1,
        launch_cooperative_grid=False,
        launch_pdl=bool(constants.get("launch_pdl")),
        num_ctas=1,
    )
    return SimpleNamespace(
        run=_launcher(kernel, source, metadata),
        function=1,
        packed_metadata=(4, 1, 0),
        launch_metadata=lambda grid, stream, *args: {"name": kernel.__name__},
    )


_launchers: dict = {}


def _launcher(kernel, source, metadata) -> CudaLauncher:
    key = kernel.__name__, tuple(source.signature.values()), repr(metadata)
    if key not in _launchers:
        _launchers[key] = CudaLauncher(source, metadata)
    return _launchers[key]


def _type(arg: object, constant: bool) -> str:
    if constant or arg is None or isinstance(arg, (str, bool)):
        return "constexpr"
    if isinstance(arg, torch.Tensor):
        return f"*{TYPES[arg.dtype]}"
    if isinstance(arg, DESCRIPTORS):
        return f"tensordesc<{TYPES[arg.base.dtype]}{list(arg.block_shape)}>"
    if isinstance(arg, float):
        return "fp32"
    return "i32" if isinstance(arg, int) and abs(arg) < 2**31 else "i64" if isinstance(arg, int) else "constexpr"


def _layout(descriptor) -> dict:
    size = descriptor.base.element_size()
    return {
        "swizzle": 3,
        "elem_size": size,
        "elem_type": 6,
        "block_size": list(descriptor.block_shape),
        "fp4_padded": False,
    }
