"""How the figures look: two themes, and the colours of the sides, which readers who see no red or no green tell apart.

The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/). TensorBoard shows a figure at a third of its
size at first, so all that is to be read is large.
"""

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

WIDTH, HEIGHT, DPI = 12.0, 6.3, 100
COLOURS = 64
LARGE, MEDIUM, SMALL, TINY = 36, 27, 19, 18
"""Points. TensorBoard's cards give a figure 216 pixels of height, in which the last is a text of 9 pixels."""


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    faint: str
    line: str
    good: str
    bad: str
    sides: dict[str, str]
    """By run: its colour."""


LIGHT = Theme(
    paper="#ffffff",
    ink="#1a1c1f",
    faint="#5f6670",
    line="#d9dde2",
    good="#00704d",
    bad="#b3261e",
    sides={"pytorch": "#9aa3ad", "triton": "#0072b2", "fused": "#d55e00"},
)
DARK = Theme(
    paper="#14171a",
    ink="#f1f3f5",
    faint="#a3abb5",
    line="#373d44",
    good="#3ecf9a",
    bad="#ff8a80",
    sides={"pytorch": "#8b949e", "triton": "#56b4e9", "fused": "#f08a3c"},
)
THEMES = {"light": LIGHT, "dark": DARK}


def new_figure(theme: Theme, width: float = WIDTH, height: float = HEIGHT) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, facecolor=theme.paper)


def png(figure: Figure) -> bytes:
    """The figure as a file with few colours, a third of the size that it has with all."""
    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def bare(axes: Axes, theme: Theme) -> None:
    """Takes the frame away and sets the theme's colours."""
    axes.set_facecolor(theme.paper)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=theme.faint, labelsize=SMALL)
