"""The report of an evaluation, in the terminal and as a page of Markdown."""

from rich.box import ROUNDED
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lit_modules.answer import answer
from lit_modules.evaluation_result import EvaluationResult, Proof
from lit_modules.report_tables import tables
from lit_modules.tables import rich_table, table_markdown


def print_to(console: Console, result: EvaluationResult) -> None:
    """The answer, the network, its layers and the details; in the end the verdict again."""
    console.print(_panel(result))
    for table in tables(result):
        console.print(rich_table(table))
        console.print(f"{table.note}\n", markup=False, highlight=False)
    for line in swap_notes(result.proof, stayed=False):
        console.print(line, markup=False, highlight=False)
    console.print(
        Text(f"{verdict(result)}: {answer(result).headline}", style=f"bold {_colour(result)}"), highlight=False
    )


def markdown(result: EvaluationResult) -> str:
    """The whole report, as one page."""
    said = answer(result)
    title = f"# Triton layers: {result.triton_layers}: {verdict(result)}"
    lines = "  \n".join(line for line in (f"**{said.headline}**", said.proof, said.errors, said.conditions) if line)
    sections = [table_markdown(table) for table in tables(result)]
    notes = "\n".join(f"- {line}" for line in swap_notes(result.proof, stayed=True))
    return "\n\n".join([title, lines, *sections, notes]) + "\n"


def answer_markdown(result: EvaluationResult) -> str:
    """The answer alone."""
    said = answer(result)
    return "\n\n".join(
        part for part in (f"# {said.headline}", f"**{said.proof}**", said.errors, said.conditions) if part
    )


def swap_notes(proof: Proof, stayed: bool) -> list[str]:
    """What was swapped and what fell back, a line each; of the main variants also what stayed PyTorch's, if wanted."""
    lines = []
    for variant in proof.variants:
        counts = ", ".join(f"{count} {kind}" for kind, count in variant.swapped.items())
        lines.append(f"{variant.name}: {'runs' if variant.fused else 'swapped'} {counts or 'nothing'}")
        for layer, reasons in variant.fallbacks.items():
            lines += [f"{variant.name}: {layer} fell back {count} times: {why}" for why, count in reasons.items()]
        if stayed and (variant.fused or variant is proof.main):
            lines += [f"{variant.name}: {len(names)} stayed: {reason}" for reason, names in variant.stayed.items()]
    return lines


def verdict(result: EvaluationResult) -> str:
    if not result.proof.variants:
        return "nothing was swapped, so nothing was proved"
    return "PASS" if result.passed else "FAIL"


def _panel(result: EvaluationResult) -> Panel:
    said = answer(result)
    text = Text(said.headline, style="bold")
    text.append(f"\n{said.proof}", style=f"bold {_colour(result)}")
    for line in (said.errors, said.conditions):
        text.append(f"\n{line}" if line else "", style="dim" if line is said.conditions else "not bold")
    return Panel(text, box=ROUNDED, border_style=_colour(result), expand=False, padding=(0, 1))


def _colour(result: EvaluationResult) -> str:
    return "red" if not result.passed else "green" if result.proof.variants else "yellow"
