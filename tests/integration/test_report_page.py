"""The report page in a real browser: it fits its window, follows the scheme, prints and needs no network."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.report import rebuild
from tests.browser import browse, find_browser
from tests.report_sample import sample_report

# Runs in a copy of the page only: the page itself holds no script and its policy forbids one.
PROBE = """
<script>
const limit = document.documentElement.clientWidth + 1;
const blocks = "main, header, section, figure.plot, .figures > *, p, h1, h2, img";
const wide = [...document.querySelectorAll(blocks)]
  .filter(e => e.getBoundingClientRect().right > limit).map(e => e.className || e.tagName);
const box = document.querySelector(".picture input");
box.click();
const enlarged = getComputedStyle(box.nextElementSibling).position;
box.click();
const labels = [...document.querySelectorAll(".chart text")];
const found = {
  scroll: document.documentElement.scrollWidth, client: document.documentElement.clientWidth, wide, enlarged,
  restored: getComputedStyle(box.nextElementSibling).position,
  images: [...document.images].map(i => i.naturalWidth),
  fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  smallest: Math.min(...labels.map(e => e.getBoundingClientRect().height)),
};
document.body.dataset.found = JSON.stringify(found);
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "report.json").write_text(sample_report().to_json())
    return rebuild(folder)


def probe(browser: str, page: Path, folder: Path, width: int) -> dict[str, Any]:
    html = page.read_text()
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    copy = folder / "probed.html"
    copy.write_text(html.replace("<details", "<details open").replace("</body>", f"{PROBE}</body>"))
    dom = browse(browser, copy, folder, f"--window-size={width},1200", "--dump-dom")
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match is not None
    found: dict[str, Any] = json.loads(unescape(match[1]))
    return found


@pytest.mark.parametrize("width", [1280, 800])
def test_the_page_fits_its_window_and_fetches_nothing(
    browser: str, page: Path, tmp_path: Path, width: int
) -> None:
    found = probe(browser, page, tmp_path, width)
    assert found["client"] == width
    assert found["scroll"] == width
    assert found["wide"] == []
    assert found["fetched"] == []
    assert len(found["images"]) == 6
    assert min(found["images"]) > 0
    assert found["smallest"] >= 9, "chart text too small to read"


def test_a_picture_enlarges_and_returns_without_a_script(browser: str, page: Path, tmp_path: Path) -> None:
    found = probe(browser, page, tmp_path, 1280)
    assert (found["enlarged"], found["restored"]) == ("fixed", "static")


def brightness(browser: str, page: Path, folder: Path, scheme: int) -> tuple[float, int]:
    """Mean brightness of a screenshot, and its number of colours. ``scheme``: 0 dark, 1 light."""
    target = folder / f"{scheme}.png"
    options = (f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={target}")
    browse(browser, page, folder, "--window-size=1000,900", *options)
    with Image.open(target) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return float(pixels.mean()), len(np.unique(pixels.reshape(-1, 3), axis=0))


def test_the_page_follows_a_light_and_a_dark_scheme(browser: str, page: Path, tmp_path: Path) -> None:
    dark, dark_colours = brightness(browser, page, tmp_path, 0)
    light, light_colours = brightness(browser, page, tmp_path, 1)
    assert dark < 60 < 200 < light
    assert min(dark_colours, light_colours) > 50  # text and marks were drawn


def test_the_page_prints_to_pdf_on_few_pages(browser: str, page: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.pdf"
    browse(browser, page, tmp_path, f"--print-to-pdf={target}", "--no-pdf-header-footer")
    data = target.read_bytes()
    assert data.startswith(b"%PDF-")
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert 5 <= pages <= 14
