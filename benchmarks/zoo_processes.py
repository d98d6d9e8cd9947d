"""Processes of zoo.py: a case is measured in one of its own, one at a time on a GPU, while the others are stopped."""

import argparse
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.compare import command
from benchmarks.zoo_case import BEGINS, BY_VALUE, ZooCase, ZooResult
from benchmarks.zoo_report import in_a_line
from tritonnn.compiler.measured import measuring_alone

SCRIPT = Path(__file__).with_name("zoo.py")
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITONNN_CACHE_DIR")
THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
INTERRUPTED = 130
READY, TIMED = "ready to be timed", "timed"
"""What a process says of itself; after the first it waits for a line, after the second it is not needed any more."""
DRAIN_S = 0.1
"""After which a GPU has done what a process that was stopped has launched."""
TURN_S, WRITING_S = 1.0, 2.0
"""With --within, a short turn and all that goes with it, one for each case that is ready; and the end of the run."""
LEAST_BUDGET_S = 0.05


@contextmanager
def turn(device: torch.device) -> Iterator[float]:
    """While nobody else measures: waits until the parent has stopped the others. The seconds that it grants."""
    with measuring_alone(device):
        print(READY, flush=True)
        granted = sys.stdin.readline()
        if not granted:  # the parent is gone
            sys.exit(INTERRUPTED)
        yield float(granted)


@contextmanager
def interrupted_after(seconds: float | None) -> Iterator[None]:
    """KeyboardInterrupt after so many seconds, None or infinity for never, and where the process is asked to end."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, 0 if seconds in (None, math.inf) else max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """Hands the cases to processes, one at a time a GPU.

    Where its time is nearly over, all processes are timed with the peers that are ready by then.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, console: Console) -> None:
        self.args, self.folder, self.console = args, folder, console
        self.start, within = time.time(), args.within or math.inf
        self.end = self.start + within
        turns = min(args.together, math.ceil(len(args.cases) / len(devices()))) * TURN_S + WRITING_S
        self.ready_by = self.end - min(turns, within / 2)
        """When peers stop to get ready, in seconds since the epoch."""
        self.failed: list[str] = []
        self.processes: dict[subprocess.Popen, str] = {}
        """The processes that run, and their GPUs."""
        self.begun: dict[ZooCase, str] = {}
        """The peer that is getting ready, of each case."""
        self.stopped = False
        self.lock = threading.Lock()

    def say(self, line: str) -> None:
        with self.lock:
            self.console.print(f"[{time.time() - self.start:5.0f} s] {line}", markup=False, highlight=False)

    def run(self) -> int:
        """The status to end with: INTERRUPTED where cases or peers of theirs are missing as the time was up."""
        todo = [case for case in self.args.cases if self.args.again or self._lacks(case, self.args.peers)]
        done = len(self.args.cases) - len(todo)
        self.say(f"{len(todo)} cases on {len(devices())} GPU{'s' * (len(devices()) > 1)}, {done} done before")
        try:
            if self.args.ahead and not self.args.layers:
                self._compile_ahead(todo)
            if self.args.compile_only:
                return 0
            todo = [case for case in todo if self.args.again or self._lacks(case, self._peers(case))]
            self._measure(todo)
        except KeyboardInterrupt:
            self._stop()
            raise
        lacking = any(self._lacks(case, self._peers(case)) for case in todo)
        if lacking and time.time() >= self.ready_by:
            return INTERRUPTED
        return 1 if lacking or self.failed else 0

    def _lacks(self, case: ZooCase, peers: Sequence[str]) -> bool:
        """Whether the folder has no result of the case with all these peers."""
        path = self.folder / case.file
        return not path.exists() or not (self.args.layers or set(peers) <= set(ZooResult.load(path).peers))

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
        """All cases of one peer after another; where they are measured, too, in half of the time."""
        peers = sorted(filter(_compiles, self.args.peers), key=BY_VALUE.index)
        jobs = [(case, peer) for peer in peers for case in todo if not self._mark(case, peer).exists()]
        gpus = devices()

        def job(index: int) -> None:
            if self.stopped:
                return
            (case, peer), gpu = jobs[index], gpus[index % len(gpus)]
            status = self._child(case, "compile", [peer], gpu, share_of_cores(self.args.ahead), quiet=True)
            if not status:
                self._mark(case, peer).parent.mkdir(exist_ok=True)
                self._mark(case, peer).touch()
            if not self.stopped:
                self.say(f"compiled ahead: {case.name} {peer}{' failed' if status else ''}")

        until = None if self.args.compile_only or not self.args.within else (self.ready_by - self.start) / 2
        with ThreadPoolExecutor(self.args.ahead) as pool:
            try:
                futures = [pool.submit(job, index) for index in range(len(jobs))]
                for future in wait(futures, timeout=until).done:
                    future.result()
            finally:
                self._stop()  # else the pool would wait for all of them
                for peer in peers:
                    compiled = sum(self._mark(case, peer).exists() for case in todo)
                    self.say(f"compiled ahead: {peer} of {compiled} of {len(todo)} cases")
        self.stopped = False

    def _measure(self, todo: list[ZooCase]) -> None:
        cases: queue.SimpleQueue[ZooCase] = queue.SimpleQueue()
        for case in todo:
            cases.put(case)

        def work(gpu: str) -> None:
            while not self.stopped and time.time() < self.ready_by:
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
        peers = self._peers(case)
        while status := self._measured(case, peers, gpu):
            culprit = self.begun.pop(case, None)
            if status == INTERRUPTED or self.stopped:
                return
            self.failed.append(case.name)
            self.say(f"{case.name}: failed, its process ended with {status}{f' in {culprit}' if culprit else ''}")
            if culprit not in peers or len(peers) == 1:
                return
            peers.remove(culprit)  # the others are measured without it
        self.say(f"{case.name}: {in_a_line(ZooResult.load(self.folder / case.file))}")

    def _measured(self, case: ZooCase, peers: Sequence[str], gpu: str) -> int:
        with tempfile.TemporaryDirectory() as caches:
            cold = {name: f"{caches}/{name.lower()}" for name in CACHES}
            return self._child(case, "measure", peers, gpu, share_of_cores(self.args.together) if self._warm else cold)

    @property
    def _warm(self) -> bool:
        """Whether processes may find compiled what others compiled: first calls say nothing then."""
        return bool(self.args.ahead or self.args.only_compiled or self.args.together > 1)

    def _child(
        self, case: ZooCase, what: str, peers: Sequence[str], gpu: str, environment: dict[str, str], quiet: bool = False
    ) -> int:
        options = ["--networks", case.task, "--batch-sizes", str(case.batch_size), "--dtypes", case.dtype]
        options += ["--peers", *peers, "--output", str(self.folder), "--until", str(self.ready_by)]
        for name in ("layers", "kernels", "again"):
            options += [f"--{name}"] * getattr(self.args, name)
        options += ["--shared"] * (self.args.together > 1) + ["--warm"] * self._warm
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
        last, alone, done = "", ExitStack(), False
        with alone, process.stdout:
            for line in process.stdout:
                last = line.strip() or last
                if last == READY:
                    self.begun.pop(case, None)
                    alone.enter_context(self._others_stopped(process))
                    with suppress(BrokenPipeError):
                        process.stdin.write(f"{self._granted(gpu)}\n")
                        process.stdin.flush()
                elif last == TIMED and self.args.kernels:
                    alone.close()
                elif last == TIMED:
                    done = True
                    process.kill()  # to end by itself takes long where others have their turns
                    break
                elif last.startswith(BEGINS):
                    self.begun[case] = last.removeprefix(BEGINS)
                elif not quiet and line.strip():
                    self.say(f"  {case.name}: {line.rstrip()[:300]}")
        status = process.wait()
        del self.processes[process]
        if status and quiet and not self.stopped:
            self.say(f"  {case.name}: {last[:300]}")
        return 0 if done else status

    def _granted(self, gpu: str) -> float:
        """The seconds of a turn: near the end, all that are not timed yet share what is left."""
        waiting = list(self.processes.values()).count(gpu)
        left = self.end - WRITING_S - time.time()
        return max(min(self.args.budget, left / waiting - TURN_S / 2), LEAST_BUDGET_S)

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


def share_of_cores(beside: int) -> dict[str, str]:
    """Variables that give each of so many processes its share of the cores, but for what the user has set.

    Inductor would otherwise start a process a core in each of them, after another one that imports PyTorch again.
    """
    share = max(len(os.sched_getaffinity(0)) // beside, 1)
    return {name: os.environ.get(name, str(share)) for name in THREADS}


def devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU; one without a name where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]) or [""]


def command_line() -> str:
    return command(sys.argv[1:]).replace("compare.py", "zoo.py")
