"""The dashboard as a person sees it: TensorBoard in a real browser.

Skipped where playwright or a Chromium is absent: `make test-browser` brings the first, `apt-get install chromium` the
second.
"""

import dataclasses
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.made_up import as_on_a_gpu
from helpers.tiny_classifier import TinyClassifier, evaluation_trainer, loader, random_images

from lit_modules import dashboard
from lit_modules.dashboard.style import DPI, TINY
from lit_modules.evaluation_result import Epoch
from lit_modules.triton_evaluation import TritonEvaluation

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser")
DOCS = Path(__file__).parents[2] / "docs"
screens = SimpleNamespace(**runpy.run_path(str(DOCS / "dashboard_screens.py")))
pytestmark = pytest.mark.skipif(screens.CHROMIUM is None, reason="needs Chromium")

RECORDED = DOCS / "recorded_run"
WIDTHS = (1000, 1500)


def made_up(folder: Path) -> Path:
    """What this version writes of an evaluation, with times as a GPU has them and a training."""
    evaluation = TritonEvaluation("each", fuse=True, budget_s=0, time_interpreter=True)
    evaluation_trainer(evaluation).test(TinyClassifier(), loader(random_images(6)), verbose=False)
    epochs = [Epoch(e, {run: {"top1": e / 4} for run in ("pytorch", "triton")}, {"pytorch": 2.0}) for e in range(3)]
    dashboard.write(dataclasses.replace(as_on_a_gpu(evaluation.result), epochs=epochs), folder)
    return folder


@pytest.fixture(scope="module", params=["made up", "recorded"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = RECORDED if request.param == "recorded" else made_up(tmp_path_factory.mktemp("run"))
    return screens.serve(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with screens.browser() as browser:
        yield browser


@pytest.fixture(params=WIDTHS, ids=lambda width: f"{width} pixels")
def page(request: pytest.FixtureRequest, browser, url: str) -> Iterator:
    page = screens.opened(browser, url, request.param)
    yield page
    page.close()


def tags(page) -> list[str]:
    return [tag.get_attribute("title") for tag in page.locator("card-view tb-truncated-path").all()]


def test_the_first_card_is_the_answer(page):
    assert tags(page)[0] == "1_answer/1 the answer"
    image = page.locator("image-card img").first
    width, height = image.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
    assert (width, height) == (1200, 630)
    box = image.bounding_box()
    assert box["y"] + box["height"] < 900 and box["x"] + box["width"] <= page.viewport_size["width"]
    scale = min(box["width"] / width, box["height"] / height)
    assert TINY * DPI / 72 * scale > 8  # pixels of its smallest text


def test_no_card_is_empty_and_runs_overlay(page):
    """In the groups that TensorBoard opens by itself, and in that of the layers."""
    screens.open_group(page, "3_layers")
    cards = page.locator("card-view")
    seen = []
    for index in range(cards.count()):
        card = cards.nth(index)
        card.evaluate("card => card.scrollIntoView({block: 'center'})")
        tag = card.locator("tb-truncated-path").get_attribute("title")
        if card.locator("image-card").count():
            card.locator("img").wait_for()
            assert card.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 1000
            continue
        playwright.expect(card.get_by_text("pytorch", exact=True)).to_be_visible()
        if tag.startswith("3_layers"):
            for run in dashboard.RUNS:
                playwright.expect(card.get_by_text(run, exact=True)).to_be_visible()
            assert card.locator("line-chart").count() == 1
            seen.append(tag)
    assert seen == [dashboard.UP_TO_LAYER, dashboard.OF_LAYER]


def test_every_page_has_what_it_is_for(page, url):
    listing = json.loads(page.request.get(f"{url}data/plugins_listing").text())
    for plugin in ("timeseries", "scalars", "custom_scalars", "images", "text", "hparams"):
        assert listing[plugin]["enabled"], plugin
    found = json.loads(page.request.get(f"{url}data/plugin/timeseries/tags").text())
    of_runs = found["scalars"]["runTagInfo"] if "runTagInfo" in found["scalars"] else found["scalars"]["tagInfo"]
    assert set(of_runs) == set(dashboard.RUNS)
    page.goto(f"{url}#text")
    page.reload()
    page.get_by_text("1 The answer", exact=False).first.wait_for()
    first = page.locator("tf-markdown-view h1").first
    first.wait_for()
    assert "faster" in first.inner_text()
    tables = page.locator("tf-markdown-view pre")
    tables.first.wait_for()
    for table in tables.all():
        lines = table.inner_text().strip("\n").count("\n") + 1
        height = table.evaluate("pre => parseFloat(getComputedStyle(pre).height)")
        assert lines > 3 and 10 < height / lines < 20  # pixels: a line that is broken takes more
