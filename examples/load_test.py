"""Requests a second and latency of a server: so many clients, each of which sends its next image when it has an answer.

    python examples/load_test.py --clients 1 16 128 --seconds 10

Ends with 1 if a request failed.
"""

import argparse
import asyncio
import base64
import io
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import aiohttp
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Load:
    """One number of clients: seconds of each answered request, and how often each status other than 200 came."""

    clients: int
    seconds: float
    latencies: list[float]
    failures: Counter

    @property
    def requests_per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, percent: int) -> float:
        """Milliseconds."""
        if len(self.latencies) < 2:
            return float("nan")
        return 1e3 * statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


def random_jpeg(size: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size // 8 + 1, size // 8 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


async def _clients(url: str, clients: int, seconds: float, body: bytes) -> tuple[list[float], Counter]:
    latencies: list[float] = []
    failures: Counter = Counter()
    deadline = time.perf_counter() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while (start := time.perf_counter()) < deadline:
            try:
                async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                    await response.read()
                status: object = response.status
            except aiohttp.ClientError as error:
                status = type(error).__name__
            if status == 200:
                latencies.append(time.perf_counter() - start)
            else:
                failures[status] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients)) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return latencies, failures


def _one_process(url: str, clients: int, seconds: float, body: bytes) -> tuple[list[float], Counter]:
    return asyncio.run(_clients(url, clients, seconds, body))


def load(url: str, clients: int, seconds: float, size: int = 224, processes: int = 1) -> Load:
    """Measures for so many seconds; the clients are spread over processes, as one can send some 1,000 a second."""
    image = base64.b64encode(random_jpeg(size)).decode()
    body = f'{{"image": "{image}"}}'.encode()
    shares = [clients // processes + (i < clients % processes) for i in range(min(processes, clients))]
    if len(shares) == 1:
        results = [_one_process(url, clients, seconds, body)]
    else:
        with ProcessPoolExecutor(len(shares)) as pool:
            jobs = [pool.submit(_one_process, url, share, seconds, body) for share in shares]
            results = [job.result() for job in jobs]
    latencies = [latency for result in results for latency in result[0]]
    return Load(clients, seconds, latencies, sum((result[1] for result in results), Counter()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/predict")
    add("--clients", type=int, nargs="+", default=[1, 16, 128], help="one measurement each; 1 16 128")
    add("--seconds", type=float, default=10, help="of one measurement; 10")
    add("--size", type=int, default=224, help="rows and columns of the images; 224")
    add("--processes", type=int, default=1, help="over which the clients are spread; 1")
    args = parser.parse_args()
    failed = False
    print("| clients | requests/s | p50 ms | p99 ms | failed |\n|--:|--:|--:|--:|--:|")
    for clients in args.clients:
        result = load(args.url, clients, args.seconds, args.size, args.processes)
        failures = ", ".join(f"{count} x {status}" for status, count in result.failures.items()) or "0"
        print(
            f"| {clients} | {result.requests_per_second:,.0f} | {result.percentile(50):.2f} | "
            f"{result.percentile(99):.2f} | {failures} |"
        )
        failed |= bool(result.failures) or not result.latencies
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
