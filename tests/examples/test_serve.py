"""The example of a server: right answers in collected batches, errors of the client's, and what a load test sees."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.compare import DEVICE
from PIL import Image

pytest.importorskip("litserve", reason="needs litserve: pip install 'tritonnn[serve]'")

from examples.load_test import load, random_jpeg
from examples.serve import MEAN, STD, Classifier, main
from tritonnn.command.networks import build

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
NETWORK, SIZE, LARGEST_BATCH = "network_to_serve:Tiny", 16, 4
SOURCE = """
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
        )
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """What both the server and this process import."""
    folder = tmp_path_factory.mktemp("network")
    (folder / "network_to_serve.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        yield folder


@pytest.fixture(scope="module")
def url(network, tmp_path_factory):
    """The address of a server whose network has the weights of a file."""
    folder = tmp_path_factory.mktemp("server")
    torch.save(weights(), folder / "weights.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--weights", str(folder / "weights.pt"), "--dtype=float32", f"--size={SIZE}", f"--port={port}"]
    batches = [f"--max-batch={LARGEST_BATCH}", "--batch-timeout=0.05"]
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), NETWORK, *options, *batches]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while server.poll() is None and time.monotonic() < until:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail((folder / "log").read_text())
        yield f"http://127.0.0.1:{port}/predict"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        name: t if "num" in name else torch.rand_like(t) - 0.3 * ("var" not in name)
        for name, t in build(NETWORK).state_dict().items()
    }


def expected(file: bytes) -> torch.Tensor:
    """PyTorch's probabilities for an image file."""
    model = build(NETWORK)
    model.load_state_dict(weights())
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))).permute(2, 0, 1) / 255
    x = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        return model(x[None])[0].softmax(0)


def post(url: str, body: bytes) -> tuple[int, dict]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def body(file: bytes) -> bytes:
    return json.dumps({"image": base64.b64encode(file).decode()}).encode()


BAD = {
    "no JSON": b"{",
    "no image": b"{}",
    "another type": b'{"image": 3}',
    "no base64": b'{"image": "%%%"}',
    "no picture": body(b"hello"),
    "a damaged picture": body(random_jpeg(SIZE)[:200]),
}


def test_each_client_gets_the_answer_to_its_own_image_and_a_bad_one_a_4xx(url):
    files = [random_jpeg(SIZE, seed) for seed in range(6)]
    with ThreadPoolExecutor(12) as clients:
        good = [clients.submit(post, url, body(file)) for file in files]
        bad = [clients.submit(post, url, request) for request in BAD.values()]
        answers, refusals = [g.result() for g in good], [b.result() for b in bad]
    for file, (status, answer) in zip(files, answers, strict=True):
        assert status == 200
        best = expected(file).topk(5)
        assert answer["classes"] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(answer["probabilities"]), best.values, rtol=1e-3, atol=1e-4)
    assert [status for status, _ in refusals] == [422] * len(BAD)
    assert "no image in JPEG, PNG or WebP" in str(refusals[-1][1]["detail"])


def test_too_much_is_refused(url):
    assert post(url, body(bytes(16_000_000)))[0] == 413


def test_load(url):
    """Bounded: eight clients for two seconds."""
    result = load(url, clients=8, seconds=2, size=SIZE)
    assert not result.failures and len(result.latencies) >= 8
    assert 0 < result.percentile(50) <= result.percentile(99)


def test_batches_are_filled_up_to_sizes_that_are_warm(network):
    api = Classifier(NETWORK, None, "float32", False, SIZE, max_batch_size=LARGEST_BATCH)
    sizes = []
    warm = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0])) if type(module).__name__ == "FusedNetwork" else None
    )
    try:
        api.setup(str(DEVICE))
        assert set(sizes) == {1, 2, 4}
        images = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8)
        together = api.predict(images)
        assert sizes[-1] == 4 and len(together) == 3
        for image, answer in zip(images, together, strict=True):
            assert api.predict(image)["classes"] == answer["classes"] and sizes[-1] == 1
    finally:
        warm.remove()


@pytest.mark.gpu
def test_each_batch_size_has_a_cuda_graph(network):
    api = Classifier(NETWORK, None, "bfloat16", False, SIZE, max_batch_size=LARGEST_BATCH)
    api.setup("cuda")
    assert len(api.model.graphs) == 3 and not api.model.graphs.refused


def test_a_wrong_network_is_one_line(network, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "network_to_serve:Tin"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: network_to_serve has no Tin: did you mean Tiny?\n"
