"""What the command prints beside the reports: the proof, and the times."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..latency import Latency
from .proof import Proof


def proof_table(proof: Proof) -> Table:
    table = _table("Error against float64", "network", "error", "of PyTorch's", "predictions as PyTorch's")
    for side in proof.sides:
        same = "" if side.same_predictions is None else f"{side.same_predictions} of {proof.images}"
        pytorch = proof.sides[0].error
        table.add_row(side.name, f"{side.error:.2e}", f"{side.error / pytorch:.2f}x" if pytorch else "", same)
    return table


def proof_line(proof: Proof) -> str:
    return (
        f"Root mean square over {_images(proof.checked)}, relative to the output's. PyTorch's two memory formats lie "
        f"{proof.noise:.2e} apart; up to {proof.limit:.2e} counts as no worse than PyTorch."
    )


def time_table(names: Sequence[str], latencies: Sequence[Latency], images: int) -> Table:
    """The wall clock of calls from Python and the GPU's own time; a factor of 2 is half of PyTorch's time."""
    table = _table(
        f"Milliseconds for {_images(images)}", "network", "from Python", "as fast", "GPU alone", "as fast", "images/s"
    )
    pytorch = latencies[0]
    for name, latency in zip(names, latencies, strict=True):
        assert latency.device is not None and pytorch.device is not None
        eager, device = latency.eager.median, latency.device.median
        table.add_row(
            name,
            f"{eager:.3f}",
            f"{pytorch.eager.median / eager:.2f}x",
            f"{device:.3f}",
            f"{pytorch.device.median / device:.2f}x",
            f"{images / eager * 1e3:,.0f}",
        )
    return table


def _images(number: int) -> str:
    return f"{number} image{'s' * (number != 1)}"


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for header in others:
        table.add_column(header, justify="right")
    return table
