"""Evaluates a fused network beside PyTorch's on a test set that is spread over processes, one a GPU, on any machines.

    torchrun --nproc-per-node 8 examples/evaluate_sharded.py torchvision:resnet50 --weights resnet50.pt --data DIR

DIR is as torchvision's ImageFolder wants it: DIR/<class>/<image>. The first of n processes takes images 0, n, 2n and so
on. Lightning's sampler would repeat some images so that all processes get as many, and would count those twice.
"""

import argparse
import os
import sys

import torch

sys.path.append(os.getcwd())  # for networks of your own
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import torch.distributed as dist
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import tritonnn
from tritonnn.command.networks import UserError, build

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@torch.inference_mode()
def evaluate(args: argparse.Namespace) -> dict[str, int]:
    """Counts over all processes: images, those that each side gets right, and those on which the sides differ."""
    rank, world = dist.get_rank(), dist.get_world_size()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    steps = [transforms.Resize((args.size, args.size)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    data = ImageFolder(args.data, transforms.Compose(steps))
    share = Subset(data, range(rank, len(data), world))

    dtype = getattr(torch, args.dtype)
    model = build(args.network)
    if args.weights:
        model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
    model = model.to(device, dtype, memory_format=torch.channels_last)
    fast = tritonnn.fuse(model, cuda_graph=True)

    counts = torch.zeros(4, dtype=torch.int64, device=device)
    for images, labels in DataLoader(share, args.batch_size, num_workers=args.workers):
        labels, images = labels.to(device), images.to(device, dtype, memory_format=torch.channels_last)
        pytorch, fused = (network(images).argmax(1) for network in (model, fast))
        found = (labels == labels, pytorch == labels, fused == labels, pytorch != fused)
        counts += torch.stack([each.sum() for each in found])
    dist.all_reduce(counts)
    return dict(zip(("images", "PyTorch right", "fused right", "differing"), counts.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("network", help="as `python -m tritonnn` names it")
    add("--weights", help="a state dict, as torch.save writes it; random weights without")
    add("--data", required=True, help="folder with a folder of images for each class")
    add("--size", type=int, default=224, help="rows and columns to which images are resized; 224")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--batch-size", type=int, default=256, help="of each process; 256")
    add("--workers", type=int, default=0, help="loading processes of each process; 0")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.exit(2, "error: start this with torchrun, as --help shows\n")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        counts = evaluate(args)
        if dist.get_rank() == 0:
            print(f"{counts} in {dist.get_world_size()} processes")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
