"""Processes of zoo.py: a case is measured in one of its own, one at a time on a GPU, while the others are stopped."""

import argparse
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.compare import command
from benchmarks.zoo_case import ZooCase, ZooResult
from benchmarks.zoo_report import rich_tables, write
from tritonnn.compiler.measured import measuring_alone

SCRIPT = Path(__file__).with_name("zoo.py")
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITONNN_CACHE_DIR")
INTERRUPTED = 130
READY, TIMED = "ready to be timed", "timed"
"""What a process says of itself; after the first it waits for a line."""
DRAIN_S = 0.1
"""After which a GPU has done what a process that was stopped has launched."""


@contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """While nobody else measures: waits until the parent has stopped the others."""
    with measuring_alone(device):
        print(READY, flush=True)
        if not sys.stdin.readline():  # the parent is gone
            sys.exit(INTERRUPTED)
        yield


class Run:
    """Hands the cases to processes, one at a time a GPU."""

    def __init__(self, args: argparse.Namespace, folder: Path, console: Console) -> None:
        self.args, self.folder, self.console = args, folder, console
        self.start = time.perf_counter()
        self.failed: list[str] = []
        self.processes: dict[subprocess.Popen, str] = {}
        """The processes that run, and their GPUs."""
        self.stopped = False
        self.lock = threading.Lock()

    def say(self, line: str) -> None:
        with self.lock:
            self.console.print(f"[{time.perf_counter() - self.start:5.0f} s] {line}", markup=False, highlight=False)

    def run(self) -> int:
        todo = [case for case in self.args.cases if self._lacks(case, self.args.peers)]
        done = len(self.args.cases) - len(todo)
        self.say(f"{len(todo)} cases on {len(devices())} GPU{'s' * (len(devices()) > 1)}, {done} done before")
        try:
            if self.args.ahead and not self.args.layers:
                self._compile_ahead(todo)
            if not self.args.compile_only:
                self._measure([case for case in todo if self._lacks(case, self._peers(case))])
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            write(self.folder, self.args.cases, command_line())
        return 1 if self.failed else 0

    def _lacks(self, case: ZooCase, peers: Sequence[str]) -> bool:
        """Whether the folder has no result of the case with all these peers."""
        path = self.folder / case.file
        if self.args.again or not path.exists():
            return True
        return not self.args.layers and not set(peers) <= set(ZooResult.load(path).peers)

    def _peers(self, case: ZooCase) -> list[str]:
        """The peers that are to be measured."""
        ready = [peer for peer in self.args.peers if not _compiles(peer) or self._mark(case, peer).exists()]
        return ready if self.args.only_compiled else list(self.args.peers)

    def _mark(self, case: ZooCase, peer: str) -> Path:
        """The file that says that a peer was compiled."""
        return self.folder / "compiled" / case.file.replace(".json", f"-{peer}")

    def _stop(self) -> None:
        self.stopped = True
        for process in list(self.processes):
            process.kill()

    def _compile_ahead(self, todo: list[ZooCase]) -> None:
        jobs = [(case, peer) for peer in self.args.peers if _compiles(peer) for case in todo]
        jobs = [job for job in jobs if not self._mark(*job).exists()]
        gpus = devices()

        def job(index: int) -> None:
            if self.stopped:
                return
            case, peer = jobs[index]
            status = self._child(case, "compile", [peer], gpus[index % len(gpus)], {}, quiet=True)
            if not status:
                self._mark(case, peer).parent.mkdir(exist_ok=True)
                self._mark(case, peer).touch()
            self.say(f"compiled ahead: {case.name} {peer}{' failed' if status else ''}")

        with ThreadPoolExecutor(self.args.ahead) as pool:
            try:
                list(pool.map(job, range(len(jobs))))
            except KeyboardInterrupt:
                self._stop()  # else the pool would wait for all of them
                raise

    def _measure(self, todo: list[ZooCase]) -> None:
        cases: queue.SimpleQueue[ZooCase] = queue.SimpleQueue()
        for case in todo:
            cases.put(case)

        def work(gpu: str) -> None:
            while not self.stopped:
                try:
                    case = cases.get_nowait()
                except queue.Empty:
                    return
                self._measure_one(case, gpu, len(todo) - cases.qsize(), len(todo))

        workers = devices() * (1 if self.args.layers else self.args.together)
        threads = [threading.Thread(target=work, args=(gpu,), daemon=True) for gpu in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that Ctrl-C is heard

    def _measure_one(self, case: ZooCase, gpu: str, number: int, of: int) -> None:
        self.say(f"{number} of {of}: {case.name} on GPU {gpu}")
        with tempfile.TemporaryDirectory() as caches:
            warm = self.args.ahead or self.args.together > 1
            cold = {} if warm else {name: f"{caches}/{name.lower()}" for name in CACHES}
            status = self._child(case, "measure", self._peers(case), gpu, cold)
        if status and not self.stopped:
            self.failed.append(case.name)
            self.say(f"{case.name}: failed, its process ended with {status}")
        elif not status:
            times, *_ = rich_tables([ZooResult.load(self.folder / case.file)])
            with self.lock:
                self.console.print(times)

    def _child(
        self, case: ZooCase, what: str, peers: Sequence[str], gpu: str, environment: dict[str, str], quiet: bool = False
    ) -> int:
        options = ["--networks", case.task, "--batch-sizes", str(case.batch_size), "--dtypes", case.dtype]
        options += ["--peers", *peers, "--output", str(self.folder), *["--layers"] * self.args.layers]
        options += ["--budget", str(self.args.budget), *["--shared"] * (self.args.together > 1)]
        options += ["--kernels"] * self.args.kernels
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "--child", what, *options],
            env=os.environ | environment | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.processes[process] = gpu
        if self.stopped:
            process.kill()
        last, alone = "", ExitStack()
        with alone:
            for line in process.stdout:
                last = line.strip() or last
                if last == READY:
                    alone.enter_context(self._others_stopped(process))
                    with suppress(BrokenPipeError):
                        process.stdin.write("go\n")
                        process.stdin.flush()
                elif last == TIMED:
                    alone.close()
                elif not quiet and line.strip():
                    self.say(f"  {case.name}: {line.rstrip()[:300]}")
        status = process.wait()
        del self.processes[process]
        if status and quiet and not self.stopped:
            self.say(f"  {case.name}: {last[:300]}")
        return status

    @contextmanager
    def _others_stopped(self, process: subprocess.Popen) -> Iterator[None]:
        """The other processes on its GPU; `turn` sees to it that none of them is measuring."""
        others = [other for other, gpu in list(self.processes.items()) if gpu == self.processes[process]]
        others.remove(process)
        for other in others:
            other.send_signal(signal.SIGSTOP)
        try:
            time.sleep(DRAIN_S if others else 0)
            yield
        finally:
            for other in others:
                other.send_signal(signal.SIGCONT)


def _compiles(peer: str) -> bool:
    return peer.startswith(("compile", "swap", "fus"))


def devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU; one without a name where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]) or [""]


def command_line() -> str:
    return command(sys.argv[1:]).replace("compare.py", "zoo.py")
