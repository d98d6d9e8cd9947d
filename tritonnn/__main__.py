"""What Triton makes of a network: which layers are swapped and fused, a proof against float64, and times."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from rich.console import Console
from torch import nn

import tritonnn

from .command.compiling import compile_networks
from .command.networks import CALIBRATION_IMAGES, UserError, build, calibrate, describe, random_images
from .command.proof import prove
from .command.report import proof_line, proof_table, time_table
from .latency import time_networks, twin

TIMING_S = 4.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXAMPLES = """\
NETWORK is one of:
  torchvision:NAME       a network of torchvision.models; torchvision.models.NAME as well
  timm/NAME              a network of timm, where that is installed
  package.module:Class   a class or function that makes a network without arguments, or a network;
                         modules are looked for in this folder too; package.module.Class as well

examples:
  python -m tritonnn torchvision:resnet50 --dtype bf16 --channels-last --fuse --cuda-graph
  python -m tritonnn timm/mobilenetv3_small_100 --fuse
  python -m tritonnn my_project.networks:SmallNet --batch 8 --size 32 --layers conv2d linear

Weights are random, batch norms have the statistics of random images, and so nothing is downloaded. Ends with 0 if
the proof holds, with 1 if it does not, and with 2 on wrong use. Without a GPU, the kernels run in Triton's
interpreter: the proof holds as well, and there are no times.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(message)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = _Parser(
        prog="python -m tritonnn",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("network", metavar="NETWORK", help="see below")
    add("--batch", type=_positive, default=64 if gpu else 2, metavar="N", help="images; 64, without a GPU 2")
    add(
        "--size",
        type=_positive,
        default=224 if gpu else 64,
        metavar="N",
        help="rows and columns; 224, without a GPU 64",
    )
    add("--dtype", choices=DTYPES, default="fp32", help="of weights and images; fp32")
    add("--tf32", choices=("on", "off"), help="TF32 in fp32; PyTorch's default is on in convolutions alone")
    kinds = ("all", *tritonnn.KINDS)
    add("--layers", nargs="+", default=["all"], choices=kinds, metavar="KIND", help=f"what to swap: {', '.join(kinds)}")
    add("--fuse", action="store_true", help="also fuse the network for inference (tritonnn.fuse)")
    add("--cuda-graph", action="store_true", help="with --fuse: the fused network in CUDA graphs")
    add("--channels-last", action="store_true", help="network and images in that memory format")
    add("--version", action="version", version=f"tritonnn {tritonnn.__version__}")
    args = parser.parse_args(arguments)
    if args.cuda_graph and not args.fuse:
        raise UserError("--cuda-graph is for the fused network: add --fuse")
    if args.cuda_graph and not gpu:
        raise UserError("--cuda-graph needs a CUDA GPU")
    return args


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return number


def run(args: argparse.Namespace, console: Console) -> bool:
    """Prints everything, and returns whether the proof holds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.dtype]
    with _flags(args.tf32), torch.no_grad():
        model = build(args.network).to(device)
        images = random_images(model, max(args.batch, CALIBRATION_IMAGES), args.size).to(device)
        try:
            calibrate(model, images[:CALIBRATION_IMAGES])
        except Exception as error:  # whatever the network's own code raises
            shape = "x".join(map(str, images.shape[1:]))
            raise UserError(
                f"{args.network} does not take a batch of images of {shape} (another --size?): {describe(error)}"
            ) from error
        model, images = model.to(dtype), images[: args.batch].to(dtype)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = images.contiguous(memory_format=torch.channels_last)
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        say(_title(args, model, images))
        networks: dict[str, nn.Module] = {"swapped": twin(model)}
        swap_report = tritonnn.swap(networks["swapped"], args.layers)
        if args.fuse:
            networks["fused"] = tritonnn.fuse(model, cuda_graph=args.cuda_graph)
        if device.type == "cuda":
            compile_networks(networks, images, args.layers, args.cuda_graph)
        with console.status("proving"):
            proof = prove(model, networks, images, strict=_is_strict(images))

        say(str(swap_report))
        if args.fuse:
            say(f"\nthe fused network:\n{networks['fused'].report}")
        console.print("", proof_table(proof))
        say(proof_line(proof))
        if device.type == "cuda":
            with console.status("timing"):
                latencies = time_networks(
                    model, images, variants=[args.layers], others=list(networks.values())[1:], budget_s=TIMING_S
                )
            console.print("", time_table(["PyTorch", *networks], latencies, len(images)))
            say("Medians of calls in turns; PyTorch's in the same memory format, cuDNN's benchmark switch on.")
        else:
            say("No times: there is no GPU, and those of Triton's interpreter say nothing about speed.")
        console.print("[bold green]PASS[/]" if proof.passed else "[bold red]FAIL[/]")
        return proof.passed


def _title(args: argparse.Namespace, model: nn.Module, images: torch.Tensor) -> str:
    on_gpu = images.is_cuda
    device = torch.cuda.get_device_name(images.device) if on_gpu else "a CPU (Triton's interpreter)"
    flags = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    tf32 = f", TF32 in convolutions {_on(flags[0])}, in matrix products {_on(flags[1])}" if args.dtype == "fp32" else ""
    parameters = sum(p.numel() for p in model.parameters())
    number = f"{parameters / 1e6:.1f} million" if parameters >= 1e6 else f"{parameters:,}"
    return (
        f"{args.network}: {number} random parameters; images of "
        f"{'x'.join(map(str, images.shape))} in {args.dtype}, {'channels_last' if args.channels_last else 'NCHW'}"
        f"{tf32 if on_gpu else ''}; on {device}\n"
    )


def _on(precision: str) -> str:
    return "on" if precision == "tf32" else "off"


def _is_strict(images: torch.Tensor) -> bool:
    """Whether both sides compute in float32 throughout."""
    flags = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    return images.dtype == torch.float32 and not (images.is_cuda and "tf32" in flags)


@contextmanager
def _flags(tf32: str | None) -> Iterator[None]:
    """PyTorch's switches as asked for, and cuDNN in search of the fastest algorithms."""
    convolution, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = convolution.fp32_precision, matmul.fp32_precision, torch.backends.cudnn.benchmark
    try:
        if tf32 is not None:
            convolution.fp32_precision = matmul.fp32_precision = "tf32" if tf32 == "on" else "ieee"
        torch.backends.cudnn.benchmark = True
        yield
    finally:
        convolution.fp32_precision, matmul.fp32_precision, torch.backends.cudnn.benchmark = before


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 where the proof holds, 1 where it does not, 2 for wrong use."""
    try:
        args = parse(arguments)
        _interpret_without_gpu()
        return 0 if run(args, Console()) else 1
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _interpret_without_gpu() -> None:
    """Starts the command again where there is no GPU: Triton decided how kernels run when it imported them."""
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
