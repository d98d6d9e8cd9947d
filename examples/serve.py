"""A fused network behind HTTP: LitServe collects requests to batches, and each batch size has a CUDA graph.

    python examples/serve.py torchvision:resnet50 --weights resnet50.pt
    curl -s localhost:8000/predict -H 'Content-Type: application/json' -d "{\"image\": \"$(base64 -w0 cat.jpg)\"}"

The answer has the five likeliest classes and their probabilities. /health answers 200 once all batch sizes are warm.
"""

import argparse
import io
import os
import sys
from typing import Annotated, ClassVar

import torch

sys.path.append(os.getcwd())  # for networks of your own
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

try:
    import litserve
    import numpy as np
    from PIL import Image
    from pydantic import AfterValidator, Base64Bytes, BaseModel
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error.name} is not installed: pip install '.[serve]'") from error

import tritonnn
from tritonnn.command.networks import UserError, build

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGEST_IMAGE = 4096 * 4096
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""A batch is filled up with zeros to the next of these, as many as a fused network keeps CUDA graphs."""


def _pixels(file: bytes) -> bytes:
    """Red, green and blue of an image file, [size, size, 3]."""
    size = ImageRequest.size
    try:
        image = Image.open(io.BytesIO(file), formats=("JPEG", "PNG", "WEBP"))
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(
                f"the image has {image.width}x{image.height} pixels, at most {LARGEST_IMAGE:,} are allowed"
            )
        image.draft("RGB", (size, size))  # a JPEG is decoded at the next larger of its sizes
        return image.convert("RGB").resize((size, size)).tobytes()
    except (OSError, SyntaxError) as error:
        raise ValueError("this is no image in JPEG, PNG or WebP") from error


class ImageRequest(BaseModel):
    """Checked and decoded in the processes that speak HTTP: what is wrong gets a 422 before it can join a batch."""

    size: ClassVar[int] = 224
    image: Annotated[Base64Bytes, AfterValidator(_pixels)]


class Classifier(litserve.LitAPI):
    """One replica: a worker process with a GPU."""

    def __init__(self, network: str, weights: str | None, dtype: str, pytorch: bool, size: int, **options) -> None:
        super().__init__(**options)
        self.network, self.weights, self.pytorch, self.size = network, weights, pytorch, size
        self.dtype = getattr(torch, dtype)

    @torch.inference_mode()
    def setup(self, device: str) -> None:
        torch.backends.cudnn.benchmark = True
        self.on = torch.device(device)
        model = build(self.network)
        if self.weights:
            model.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True))
        model = model.to(self.on, self.dtype, memory_format=torch.channels_last)
        self.model = model if self.pytorch else tritonnn.fuse(model, cuda_graph=True, copy_output=False)
        self.mean, self.std = (torch.tensor(t, device=self.on).view(3, 1, 1) for t in (MEAN, STD))
        for batch in BATCH_SIZES[: BATCH_SIZES.index(self.max_batch_size) + 1]:
            for _ in range(3 if self.on.type == "cuda" else 1):  # the second call captures a CUDA graph
                self.predict(torch.zeros(batch, self.size, self.size, 3, dtype=torch.uint8))

    def decode_request(self, request: ImageRequest) -> torch.Tensor:
        pixels = np.frombuffer(bytearray(request.image), np.uint8)
        return torch.from_numpy(pixels.reshape(self.size, self.size, 3))

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(inputs)

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor) -> list[dict]:
        """uint8 [N, size, size, 3], or without N where batches have one image."""
        if pixels.dim() == 3:
            return self.predict(pixels[None])[0]
        n = next(size for size in BATCH_SIZES if size >= len(pixels))
        x = torch.zeros(n, *pixels.shape[1:], dtype=torch.uint8, pin_memory=self.on.type == "cuda")
        x[: len(pixels)] = pixels
        x = x.to(self.on, non_blocking=True).permute(0, 3, 1, 2) / 255  # [N, 3, size, size] in channels_last
        logits = self.model(((x - self.mean) / self.std).to(self.dtype))
        best = logits[: len(pixels)].float().softmax(1).topk(min(5, logits.shape[1]))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"classes": classes, "probabilities": probabilities} for classes, probabilities in rows]

    def unbatch(self, output: list[dict]) -> list[dict]:
        return output

    def encode_response(self, output: dict) -> dict:
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("network", help="as `python -m tritonnn` names it")
    add("--weights", help="a state dict, as torch.save writes it; random weights without")
    add("--size", type=int, default=224, help="rows and columns to which images are resized; 224")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--pytorch", action="store_true", help="PyTorch's network instead of the fused one, for comparison")
    add("--max-batch", type=int, choices=BATCH_SIZES, default=64)
    add("--batch-timeout", type=float, default=0.002, help="seconds to wait for more requests; 0.002")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; 127.0.0.1")
    add("--port", type=int, default=8000)
    add("--devices", type=int, help="GPUs, each with a replica; all")
    add("--http-processes", type=int, default=1, help="processes that speak HTTP and decode images")
    args = parser.parse_args()
    try:
        build(args.network)  # a wrong name is told here, not by every replica
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    ImageRequest.size = args.size  # the processes that speak HTTP are forked
    api = Classifier(
        args.network,
        args.weights,
        args.dtype,
        args.pytorch,
        args.size,
        max_batch_size=args.max_batch,
        batch_timeout=args.batch_timeout,
    )
    server = litserve.LitServer(
        api,
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=args.devices or ("auto" if torch.cuda.is_available() else 1),
        fast_queue=True,
        max_payload_size=20_000_000,
    )
    server.run(
        host=args.host,
        port=args.port,
        num_api_servers=args.http_processes,
        generate_client_file=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
