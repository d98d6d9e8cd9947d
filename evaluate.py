"""Swaps Triton layers into a trained network, proves that nothing changed, and times every layer.

    python evaluate.py --triton-layers all

Ends with 0 if the proof holds (or nothing was swapped), 1 if it does not, 2 on wrong use, 130 on Ctrl-C.
"""

from lit_modules.command_line import (
    UserError,
    interrupted_is_an_error,
    notice,
    start_command,
    user_errors_in_one_line,
)

start_command()

import logging
import sys
import warnings
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Trainer

from lit_modules.checkpoint import best_of, load_classifier, newest_run
from lit_modules.classifier import ImageClassifier
from lit_modules.data import ImageData, data_module_from_checkpoint
from lit_modules.run_folder import claimed
from lit_modules.triton_evaluation import TritonEvaluation, check_layers
from tritonnn import KINDS

Precision = Literal["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        prog="evaluate.py", description=__doc__.partition("\n")[0], exit_on_error=False, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--triton-layers",
        nargs="+",
        default=["all"],
        metavar="LAYERS",
        help=f"all, none, each, or any of {', '.join(KINDS)}",
    )
    add("--ckpt-path", type=Path, help="a checkpoint or a run's folder; default: the latest run's below checkpoints/")
    add("--batch-size", type=PositiveInt, help="default: that of the training")
    add("--limit-test-batches", type=PositiveInt, help="default: all of the test set")
    add("--precision", type=Precision, default="32-true", help="as Lightning's Trainer names them")
    add("--tf32", type=Literal["default", "on", "off"], default="default", help="convolutions and matrix products")
    add("--channels-last", action="store_true", help="network and images in the channels_last memory format")
    add("--fuse", action="store_true", help="prove and time the network fused for inference too (tritonnn.fuse)")
    add("--cuda-graph", action="store_true", help="with --fuse: the fused network in CUDA graphs")
    add("--tune", action="store_true", help="first tune the convolutions for this GPU (tritonnn.tune)")
    add("--no-latency", action="store_true", help="only the proof")
    add("--time-interpreter", action="store_true", help="without a GPU: time Triton's interpreter too")
    add("--trace", action="store_true", help="write a batch of each side as a file for the viewer Perfetto")
    add("--data-root", type=Path, help="folder of the data set, if it has moved")
    add("--log-dir", type=Path, help="default: the next logs/<data>/evaluation_<number>")
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(str(error)) from error


def evaluate(args: Namespace) -> bool:
    """Returns whether the proof holds."""
    try:
        check_layers(args.triton_layers)
    except ValueError as error:
        raise UserError(f"--triton-layers: {error}") from error
    if args.cuda_graph and not args.fuse:
        raise UserError("--cuda-graph is for the fused network: add --fuse")
    if args.cuda_graph and not torch.cuda.is_available():
        raise UserError("--cuda-graph needs a CUDA GPU")
    if args.tune and not torch.cuda.is_available():
        raise UserError("--tune needs a CUDA GPU: in Triton's interpreter there is nothing to tune")
    if args.precision == "16-mixed" and not torch.cuda.is_available():
        raise UserError("--precision 16-mixed needs a GPU: on a CPU PyTorch has bf16-mixed")
    if args.log_dir and args.log_dir.is_file():
        raise UserError(f"--log-dir {args.log_dir} is a file")
    path = checkpoint_file(args.ckpt_path)
    classifier, checkpoint = load_classifier(path)
    overrides = {"batch_size": args.batch_size, "root": args.data_root and str(args.data_root)}
    data = data_module_from_checkpoint(checkpoint, **{k: v for k, v in overrides.items() if v is not None})
    if data.num_classes != classifier.hparams.num_classes:
        raise UserError(f"{path} tells {classifier.hparams.num_classes} classes apart, the data has {data.num_classes}")
    if args.log_dir:
        return test(args, classifier, data, path, args.log_dir)
    with claimed(Path("logs", data.name), "evaluation_") as (log_dir, _):
        return test(args, classifier, data, path, log_dir)


def checkpoint_file(given: Path | None) -> Path:
    """The checkpoint to evaluate; says which that is, unless it was named."""
    if given and not given.is_dir():
        return given
    folder = given or Path("checkpoints")
    path = best_of(newest_run(folder))
    notice(f"Evaluating {path}, of the latest run in {folder}/.")
    return path


def test(args: Namespace, classifier: ImageClassifier, data: ImageData, path: Path, log_dir: Path) -> bool:
    """Returns whether the proof holds."""
    evaluation = TritonEvaluation(
        args.triton_layers,
        latency=not args.no_latency,
        channels_last=args.channels_last,
        fuse=args.fuse,
        cuda_graph=args.cuda_graph,
        tune=args.tune,
        log_dir=log_dir,
        time_interpreter=args.time_interpreter,
        trace=args.trace,
        progress=True,
    )
    trainer = Trainer(
        devices=1,
        precision=args.precision,
        limit_test_batches=args.limit_test_batches,
        benchmark=True,
        callbacks=evaluation,
        logger=False,
        enable_progress_bar=False,  # the evaluation has bars of its own
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    allow_tf32(args.tf32)
    try:
        with interrupted_is_an_error(trainer, lambda: "nothing was written"):
            trainer.test(classifier, data, ckpt_path=path, weights_only=True, verbose=False)
    except OSError as error:
        raise UserError(str(error)) from error
    return evaluation.result.passed


def allow_tf32(switch: str) -> None:
    if switch != "default":
        torch.backends.cudnn.conv.fp32_precision = "tf32" if switch == "on" else "ieee"
        # Both of PyTorch's switches for this one: Lightning asks for the older, which is an error where they differ.
        torch.backends.cuda.matmul.allow_tf32 = switch == "on"


def main(arguments: list[str] | None = None) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", ".*(LeafSpec|does not have many workers|callbacks used to create the checkpoint).*"
    )
    with user_errors_in_one_line():
        passed = evaluate(parse(arguments))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
