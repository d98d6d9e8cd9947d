"""Writes what compatibility.md and the README say of versions and cards: what was tested, by version.

    python docs/versions.py                  # from benchmarks/results/versions.json and tests/ops/cards.json
    python docs/versions.py --suite a.xml    # first records a run of the suite by this Python: pytest --junit-xml a.xml
                                             # it replaces what is recorded of its parts, too
    python docs/versions.py --suite a.xml --of "the forms of convolution"    # or of a part of it
    python docs/versions.py --times a.json   # first records times that benchmarks/versions.py took

Of several files of a run the last one's result of a test counts. The text goes between the marks `<!-- versions -->`
and `<!-- end of versions -->`.
"""

import argparse
import datetime
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from tritonnn.runtime.hardware import GLUON_VERSIONS  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "versions.json"
CARDS_RECORD = ROOT / "tests" / "ops" / "cards.json"
BEGIN, END = "<!-- versions -->", "<!-- end of versions -->"
CARDS = {
    "8.0": ("A100", 163),
    "8.6": ("RTX 3090", 99),
    "8.9": ("RTX 4090", 99),
    "9.0": ("H100, H200", 227),
    "10.0": ("B200", 227),
    "12.0": ("RTX 5090", 99),
    "gfx942": ("MI300X", 64),
}
"""By capability: the name, and KB of shared memory that a program may have."""
RUN_ON = {"9.0"}
TYPES = {"bf16": "bfloat16", "tf32": "TF32", "fp32": "strict float32"}


def record() -> dict:
    return json.loads(RECORD.read_text())


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def listed(parts: Iterable[str]) -> str:
    """As in a sentence: a, b and c."""
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def by_version(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def counts(suite: dict) -> str:
    parts = [
        f"{suite[outcome]:,} {outcome}" for outcome in ("passed", "failed") if suite[outcome] or outcome == "passed"
    ]
    return f"torch {suite['torch']}: {suite['of']}, {', '.join(parts)}"


def runs_of(suites: list[dict], triton: str, on_gpu: bool) -> str:
    found = [s for s in suites if s["triton"] == triton and (s["device"] != "CPU") == on_gpu]
    return "; ".join((f"{s['device']}, " if on_gpu else "") + counts(s) for s in found) or "not run"


def versions(known: dict) -> list[str]:
    suites = known["suites"]
    rows = [
        [
            triton,
            runs_of(suites, triton, on_gpu=False),
            runs_of(suites, triton, on_gpu=True),
            "used on Hopper" if triton.startswith(GLUON_VERSIONS) else "not used: others run instead",
        ]
        for triton in sorted({suite["triton"] for suite in suites}, key=by_version)
    ]
    return table(["Triton", "in its interpreter, on a CPU", "on a GPU", "kernels in Gluon"], rows)


def column(name: str) -> str:
    """Of a version, or of a second process of the first one, which has a name that is no number."""
    return f"Triton {name}" if name[0].isdigit() else name


def times(known: dict) -> list[str]:
    lines = []
    for run in known["times"]:
        note = f"; {run['note']}" if "note" in run else ""
        names = list(dict.fromkeys(name for us in run["us"].values() for name in us))
        if again := [name for name in names if not name[0].isdigit()]:
            note = f"; {listed(again)}: another process of {names[0]}{note}"
        rows = []
        for case, us in run["us"].items():
            dtype, n, what = case.split(" ", 2)
            first = us.get(names[0])
            ratios = [f"{us[name] / first:.3f}" for name in names[1:] if name in us and first]
            rows.append(
                [f"{int(n):,}, {TYPES[dtype]}, {what}", *(us.get(name, "") for name in names), ", ".join(ratios)]
            )
        lines += [
            "",
            f"ResNet18 at 32x32 in channels_last and CUDA graphs on an {run['gpu']}, torch {run['torch']},",
            f"microseconds a batch, the versions in turns ({run['date']}, `{run['command']}`{note}):",
            "",
            *table(["images, type, network", *map(column, names), f"times that of {names[0]}"], rows),
        ]
    return lines


def cards() -> list[str]:
    compiled = json.loads(CARDS_RECORD.read_text())
    rows = []
    for capability, (name, limit) in CARDS.items():
        memory = compiled.get(capability)
        kinds = f"{len(memory):,}, all" if memory else "each kernel, and one kind in thirty"
        most = f"{max(memory.values()) / 1024:.0f} of {limit} KB" if memory else f"at most {limit} KB"
        rows.append([name, capability, kinds, most, "run" if capability in RUN_ON else "only compiled"])
    return table(["card", "capability", "kinds compiled", "most shared memory of one", "there"], rows)


def section() -> list[str]:
    """The lines of compatibility.md."""
    known = record()
    return [
        BEGIN,
        "",
        "## Versions",
        "",
        "What was tested with each version of Triton. A GPU's tests are those of what depends on Triton's version: the",
        "forms of convolution, launch plans, CUDA graphs and tuning. With a version that is not listed, what relies on",
        "Triton's private parts is checked at the start, and what is unknown is not used; the reports say so.",
        "",
        *versions(known),
        *times(known),
        "",
        "## Cards",
        "",
        "Every kind of kernel that dispatch would launch for ResNet18, ResNet50 and MobileNetV2, 1, 8, 64 and 1,024",
        "images, four precisions, fused and swapped, compiled for the card with Triton 3.6.0, as of the last run of",
        "`python tests/ops/cards.py --new --write`; those that differ only in sizes or in what a fused epilogue does",
        "in registers are of a kind. The suite compiles each kernel, newer ones too, and one kind in thirty. wgmma is",
        "asked of Hopper alone, TMA of Hopper and newer. GPUs below 8.0 run PyTorch's operations, with that reason in",
        "the report.",
        "",
        *cards(),
        "",
        END,
    ]


def sentence() -> list[str]:
    """The line of the README."""
    suites = record()["suites"]
    whole = [s for s in suites if s["device"] == "CPU" and s["of"] == "all"]
    whole.sort(key=lambda s: by_version(s["triton"]))
    pairs = listed(f"Triton {s['triton']} with PyTorch {s['torch']}" for s in whole)
    on_gpus: dict[str, set[str]] = {}
    for s in suites:
        if s["device"] != "CPU" and not s["failed"]:
            on_gpus.setdefault(s["device"], set()).add(s["triton"])
    ran = "; ".join(
        f"on an {gpu} with Triton {listed(sorted(found, key=by_version))}" for gpu, found in on_gpus.items()
    )
    only = listed(name for capability, (name, _) in CARDS.items() if capability not in RUN_ON)
    gluon = f"The kernels in Gluon run on Hopper GPUs with Triton {listed(v.rstrip('.') for v in GLUON_VERSIONS)}"
    text = f"Tested on a CPU: {pairs}; {ran}. {gluon}. Only compiled: {only}."
    return [f"{BEGIN}{text} [All of it](docs/compatibility.md#versions).{END}"]


def put(page: str, lines: list[str]) -> str:
    """A page with these lines in the place of those between the marks."""
    text = "\n".join(lines)
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: text, page, flags=re.DOTALL)


PAGES = {ROOT / "docs" / "compatibility.md": section, ROOT / "README.md": sentence}


def add_suite(known: dict, runs: list[Path], of: str) -> None:
    import torch
    import triton
    from compatibility import result_of

    cases = [case for run in runs for case in ElementTree.parse(run).iter("testcase")]
    results = {(case.get("classname"), case.get("name")): result_of(case).outcome for case in cases}
    outcomes = list(results.values())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    new = dict(triton=triton.__version__, torch=torch.__version__.partition("+")[0], device=device, of=of)
    new |= {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
    same = ("triton", "torch", "device") if of == "all" else ("triton", "torch", "device", "of")
    known["suites"] = [s for s in known["suites"] if any(s[key] != new[key] for key in same)]
    known["suites"].append(new | {"date": datetime.date.today().isoformat()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", type=Path, default=[], help="results of pytest --junit-xml")
    parser.add_argument("--of", default="all", help="what part of the suite that is")
    parser.add_argument("--times", type=Path, help="what benchmarks/versions.py wrote")
    options = parser.parse_args()
    known = record()
    if options.suite:
        add_suite(known, options.suite, options.of)
    if options.times:
        run = json.loads(options.times.read_text())
        known["times"] = [r for r in known["times"] if (r["gpu"], r["us"].keys()) != (run["gpu"], run["us"].keys())] + [
            run
        ]
    RECORD.write_text(json.dumps(known, indent=1) + "\n")
    for path, lines in PAGES.items():
        path.write_text(put(path.read_text(), lines()))


if __name__ == "__main__":
    main()
