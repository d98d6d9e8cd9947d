"""What a run found, and its JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tritonnn.clocks import Timing

OK, WRONG, FAILED, MISSING = "ok", "wrong", "failed", "unavailable"


@dataclass
class Measured:
    """What was measured of one peer in one case. There is no `timing` unless `status` is "ok".

    Errors are against float64, in units of the reference's root mean square: the largest and the root mean square.
    """

    status: str
    timing: Timing | None = None
    max_error: float | None = None
    rms_error: float | None = None
    note: str = ""


@dataclass
class NetworkResult:
    """One forward pass of a network; `peers` by name."""

    case: str
    task: str
    dtype: str
    batch_size: int
    layout: str
    peers: dict[str, Measured]
    seconds: float = 0.0


@dataclass
class LayerShape:
    """One distinct layer of a network: `count` times in it; operations and compulsory bytes of one call."""

    kind: str
    label: str
    count: int
    flop: int
    bytes: int
    cold: bool
    """Whether the tensors it rotates among exceed twice the L2 cache."""
    peers: dict[str, Measured] = field(default_factory=dict)


@dataclass
class LayersResult:
    """Every distinct layer of a network, alone."""

    case: str
    task: str
    dtype: str
    batch_size: int
    layers: list[LayerShape]
    seconds: float = 0.0


@dataclass
class Results:
    environment: dict[str, str]
    settings: dict[str, str]
    ceilings: dict[str, float]
    networks: list[NetworkResult] = field(default_factory=list)
    layers: list[LayersResult] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Cases for which no time was left."""
    notes: list[str] = field(default_factory=list)


def save(results: Results, path: Path) -> None:
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")


def load(path: Path) -> Results:
    found = json.loads(path.read_text())
    for network in found["networks"]:
        network["peers"] = _peers(network["peers"])
    for case in found["layers"]:
        case["layers"] = [LayerShape(**(layer | {"peers": _peers(layer["peers"])})) for layer in case["layers"]]
    found["networks"] = [NetworkResult(**network) for network in found["networks"]]
    found["layers"] = [LayersResult(**case) for case in found["layers"]]
    return Results(**found)


def _peers(found: dict) -> dict[str, Measured]:
    return {
        name: Measured(**(peer | {"timing": peer["timing"] and Timing(**peer["timing"])}))
        for name, peer in found.items()
    }
