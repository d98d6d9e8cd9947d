"""What an evaluation does next, and how much of it is done: bars in a terminal, lines elsewhere."""

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

STEPS = {
    "ahead": "Compiling the kernels of swapped layers beside each other",
    "compiling": "The first batch, which compiles what is left",
    "proving": "Proving: every batch through each network",
    "layers": "Timing each layer alone, PyTorch's and Triton's in turns",
    "kernels": "Timing each kernel of the fused network alone",
    "networks": "Timing the whole network, all versions in turns",
}
"""By name, what a step does."""


class Progress:
    """A bar for each of `STEPS` that has begun; on a console that is no terminal a line, from the first process.

    Args:
        console: where they are drawn.
        bars: whether to draw bars in a terminal; the Trainer's own would be in their way.
    """

    def __init__(self, console: Console, bars: bool) -> None:
        self.console = console
        self._tasks: dict[str, TaskID] = {}
        self._bars: Bars | None = None
        if bars and console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self._bars = Bars(*columns, TextColumn("{task.fields[now]}", style="dim"), console=console)
            self._bars.start()

    def tell(self, step: str, now: str, done: int, total: int | None) -> None:
        """Tells what a step does now, how much of it has been done and how much there is."""
        if step not in self._tasks:
            self._tasks[step] = TaskID(len(self._tasks))
            if self._bars:
                self._tasks[step] = self._bars.add_task(STEPS[step], total=total, now="")
            elif step != "compiling" and rank_zero_only.rank == 0:
                self.console.print(f"{STEPS[step]} ...", highlight=False)
        if self._bars:
            self._bars.update(self._tasks[step], completed=done, total=total, now=now)

    def stop(self) -> None:
        """The bars stay as they are; what is printed follows them."""
        if self._bars:
            self._bars.stop()
            self._bars = None
