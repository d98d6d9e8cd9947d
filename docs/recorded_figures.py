"""Draws the pictures of the README and of dashboard.md from the recorded run, and writes its TensorBoard runs anew.

python docs/recorded_figures.py
"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from lit_modules import dashboard  # noqa: E402
from lit_modules.dashboard.figures import answer_figure, layers_figure  # noqa: E402
from lit_modules.dashboard.style import THEMES, png  # noqa: E402
from lit_modules.evaluation_result import EvaluationResult  # noqa: E402

RECORDED = DOCS / "recorded_run"


def main() -> None:
    result = EvaluationResult.read_json(RECORDED / "results.json")
    for name, theme in THEMES.items():
        for view, draw in (("answer", answer_figure), ("layers", layers_figure)):
            (DOCS / f"{view}-{name}.png").write_bytes(png(draw(result, theme)))
    dashboard.remove(RECORDED)
    dashboard.write(result, RECORDED)


if __name__ == "__main__":
    main()
