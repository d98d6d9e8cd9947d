"""Takes the pictures of TensorBoard on dashboard.md: what `make dashboard` opens, in a browser 1,500 pixels wide.

    python docs/dashboard_screens.py

It needs playwright and a Chromium, as `make test-browser` does.
"""

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tensorboard import program

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from lit_modules import dashboard  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

WIDTH, HEIGHT = 1500, 900
COLOURS = 64
TO_THE_TOP = """bar => {
    const main = bar.closest(".main");
    main.scrollTop += bar.getBoundingClientRect().top - main.getBoundingClientRect().top;
}"""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


def serve(runs: Path) -> str:
    """The address of a TensorBoard of the folder `runs`, which ends with this program."""
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", str(runs), "--port", "0", "--load_fast", "false"])
    return server.launch()


@contextmanager
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: "Browser", url: str, width: int = WIDTH) -> "Page":
    """The page at the address that evaluate.py prints, once its first figure is there."""
    page = browser.new_page(viewport={"width": width, "height": HEIGHT})
    page.set_default_timeout(30_000)
    page.goto(f"{url}{dashboard.LOOK}")
    page.locator("image-card img").first.wait_for()
    return page


def open_group(page: "Page", name: str) -> "Locator":
    """Opens a group of cards that TensorBoard may have left closed, and gives its bar."""
    bar = page.locator(".group-toolbar", has_text=name)
    if bar.locator("mat-icon[svgicon^=expand_more]").count():
        bar.click()
    bar.locator("mat-icon[svgicon^=expand_less]").wait_for()
    return bar


def take(page: "Page", file: Path) -> None:
    """A picture of what can be seen, with few colours, after all that is drawn bit by bit."""
    page.wait_for_timeout(2000)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)


def main(folder: Path = DOCS) -> None:
    url = serve(DOCS / "recorded_run")
    with browser() as started:
        page = opened(started, url)
        take(page, folder / "screen-answer.png")
        open_group(page, "4_network")
        open_group(page, "3_layers").evaluate(TO_THE_TOP)
        take(page, folder / "screen-layers.png")


if __name__ == "__main__":
    main()
