"""The officer's page in a real browser: it fits its window, fetches nothing, and prints whole."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from common.privacy.keys import public_key
from common.privacy.report import write_page
from common.privacy.report.record import Inquiry
from tests.browser import browse, find_browser
from tests.privacy_sample import audited_site

# Runs in a copy of the page only: the page itself holds no script and its policy forbids one.
PROBE = """
<script>
const limit = document.documentElement.clientWidth + 1;
const wide = [...document.querySelectorAll("main, header, section, figure.plot, p, h1, h2, dl, pre")]
  .filter(e => e.getBoundingClientRect().right > limit).map(e => e.className || e.tagName);
const labels = [...document.querySelectorAll(".chart text")];
const clipped = labels.filter(e => e.getBoundingClientRect().right > limit).map(e => e.textContent);
document.body.dataset.found = JSON.stringify({
  scroll: document.documentElement.scrollWidth, client: document.documentElement.clientWidth, wide, clipped,
  fetched: performance.getEntriesByType("resource").map(e => e.name),
  charts: document.querySelectorAll("svg.chart").length,
  smallest: Math.min(...labels.map(e => e.getBoundingClientRect().height)),
});
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, officer = tmp_path_factory.mktemp("home") / "site", Ed25519PrivateKey.generate()
    audited_site(folder, officer)
    return write_page(folder, Inquiry(officer_public=public_key(officer)))


@pytest.mark.parametrize("width", [1280, 800])
def test_the_page_fits_its_window_and_fetches_nothing(
    browser: str, page: Path, tmp_path: Path, width: int
) -> None:
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = tmp_path / "probed.html"
    copy.write_text(html.replace("<details", "<details open").replace("</body>", f"{PROBE}</body>"))
    dom = browse(browser, copy, tmp_path, f"--window-size={width},1200", "--dump-dom")
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match is not None
    found: dict[str, Any] = json.loads(unescape(match[1]))
    assert (found["client"], found["scroll"]) == (width, width)
    assert (found["wide"], found["clipped"], found["fetched"]) == ([], [], [])
    assert found["charts"] == 7
    assert found["smallest"] >= 9, "chart text too small to read"


def test_the_page_is_drawn_and_prints_whole(browser: str, page: Path, tmp_path: Path) -> None:
    shot, target = tmp_path / "page.png", tmp_path / "page.pdf"
    browse(browser, page, tmp_path, "--window-size=1000,900", f"--screenshot={shot}")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # text and marks were drawn
    browse(browser, page, tmp_path, f"--print-to-pdf={target}", "--no-pdf-header-footer")
    data = target.read_bytes()
    assert data.startswith(b"%PDF-")
    # Folds are open on paper: payloads, the verifier's facts and the registry entry are on these pages.
    assert 8 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 14
