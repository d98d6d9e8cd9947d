"""What an evaluation found, in a few sentences: the first thing that each of its views shows."""

from dataclasses import dataclass

from lit_modules.evaluation_result import EvaluationResult, Variant

SAME = 0.005
"""Times that differ by less than this share are the same."""


@dataclass(frozen=True)
class Answer:
    """`headline` is about speed where that was measured, `proof` about predictions, `errors` about float64, which may
    be empty; `conditions` tell on what and with what it was found."""

    headline: str
    proof: str
    errors: str
    conditions: str


def answer(result: EvaluationResult) -> Answer:
    return Answer(_headline(result), _proof(result), _errors(result), _conditions(result))


def faster(speedup: float | None) -> str:
    """A factor in words: "3.5x faster", "1.2x slower", "as fast"; nothing where none was measured."""
    if speedup is None:
        return ""
    if abs(speedup - 1) < SAME:
        return "as fast"
    return f"{_factor(speedup)}x faster" if speedup > 1 else f"{_factor(1 / speedup)}x slower"


def milliseconds(ms: float) -> str:
    """Three digits, or as many as there are before the point."""
    digits = 0 if abs(ms) >= 100 else 1 if abs(ms) >= 10 else 2 if abs(ms) >= 1 else 3 if abs(ms) >= 0.1 else 4
    return f"{ms:,.{digits}f}"


def variant_label(variant: Variant) -> str:
    """For a chart or a table that has PyTorch beside it."""
    if variant.fused:
        return variant.name
    return "all Triton layers" if variant.name == "all" else f"Triton {variant.name}"


def precision(result: EvaluationResult) -> str:
    """The type in words, and where float32 is computed in TF32."""
    types = {"32-true": "float32", "64-true": "float64", "bf16-true": "bfloat16", "16-true": "float16"}
    if result.precision == "32-true" and result.environment.get("cudnn") != "not used":
        tf32 = [what for what in ("convolution", "matmul") if result.flags.get(f"tf32 in {what}") == "on"]
        return {0: "strict float32", 1: f"float32, TF32 in {tf32[0] if tf32 else ''}", 2: "TF32"}[len(tf32)]
    return types.get(result.precision, result.precision)


def _factor(factor: float) -> str:
    return f"{factor:.0f}" if factor >= 100 else f"{factor:.1f}" if factor >= 1.1 else f"{factor:.2f}"


def _headline(result: EvaluationResult) -> str:
    variants, network = result.proof.variants, result.network or "The network"
    if not variants:
        return f"{network} with PyTorch's layers"
    if not result.passed:
        return f"{network} is not the same with Triton's layers"
    latency = result.latency
    if latency is None or not latency.comparable:
        does = "predicts" if all(variant.agreement for variant in variants) else "computes"
        return f"{network} {does} the same with Triton's layers"
    speedups = [(latency.networks[variant.name][latency.clock].speedup, variant.fused) for variant in _whole(result)]
    speedup, fused = max(speedups)
    how = "fused into Triton kernels" if fused else "with Triton's layers"
    return f"{network} {'runs' if speedup > 1 + SAME else 'is'} {faster(speedup)} {how}"


def _whole(result: EvaluationResult) -> list[Variant]:
    """The variants that a user would run: all that was asked for swapped, and fused."""
    proof = result.proof
    return [variant for variant in proof.variants if variant is proof.main or variant is proof.fused]


def _proof(result: EvaluationResult) -> str:
    proof = result.proof
    if not proof.variants:
        return "Nothing was swapped, so nothing was proved"
    failed = [variant for variant in proof.variants if not variant.verdict.passed]
    if failed:
        return f"FAIL {failed[0].name}: {failed[0].verdict.reason}"
    if not all(variant.agreement for variant in proof.variants):
        return f"{proof.samples:,} samples: outputs and metrics are as PyTorch's"
    worst = max(proof.variants, key=lambda variant: variant.agreement.differing)
    same = worst.agreement.samples - worst.agreement.differing
    line = f"{same:,} of {worst.agreement.samples:,} predictions identical"
    return line if not worst.agreement.differing else f"{line}, the others within PyTorch's own noise"


def _errors(result: EvaluationResult) -> str:
    found = result.proof.float64
    if found is None or not result.proof.variants:
        return ""
    names = {"pytorch": "PyTorch", **{variant.name: variant_label(variant) for variant in _whole(result)}}
    sides = [f"{label} {found.errors[name].mean:.1e}" for name, label in names.items() if name in found.errors]
    return f"Mean error of the outputs against float64: {' · '.join(sides)}"


def _conditions(result: EvaluationResult) -> str:
    environment = result.environment
    parts = [
        environment["device"],
        f"batch of {result.batch_size:,}",
        precision(result),
        result.memory_format,
        f"torch {environment['torch'].partition('+')[0]}",
        f"triton {environment['triton']}",
    ]
    if environment["device"].startswith("CPU"):
        parts[0] += ", Triton in its interpreter"
    return " · ".join(parts)
