"""A made-up report with everything a page can show, and a reader of the page made from it."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from server.report.page import render
from server.report.schema import (
    BenefitCell,
    EgressEntry,
    Picture,
    PrivacyEntry,
    PrivacyStage,
    RoundRecord,
    RunEntry,
    RunReport,
    SiteEntry,
    StudentEntry,
    SyntheticEntry,
    TeacherEntry,
)

VOID = {"meta", "input", "br", "img"}
SITES = ("harbour", "hillside", "lakeview")
TEST_PATIENTS = {"harbour": 12, "hillside": 14, "lakeview": 11}
DICE_ALL = {  # own column: the same plus OWN_BONUS
    "local_only_scratch": (0.512, 0.547, 0.431),
    "local_only": (0.742, 0.761, 0.688),
    "local_teacher": (0.779, 0.772, 0.741),
    "teacher": (0.868, 0.868, 0.868),
    "personal_teacher": (0.851, 0.846, 0.839),
    "student": (0.836, 0.841, 0.829),
}
OWN_BONUS = {
    "local_only_scratch": (0.131, 0.09, 0.118),
    "local_only": (0.104, 0.071, 0.125),
    "local_teacher": (0.085, 0.08, 0.093),
    "teacher": (0.011, -0.012, 0.006),
    "personal_teacher": (0.052, 0.031, 0.044),
    "student": (0.021, -0.019, 0.033),
}
HALF_WIDTH = {"all": 0.0235, "own": 0.041}


GUARDED = PrivacyEntry(
    unit="patient",
    guarantee=True,
    epsilon=3.16049,
    delta=1e-5,
    neighbouring="add or remove one patient",
    sampling="Poisson sampling",
    stages=[PrivacyStage("adapt", "dp_sgd", 1.13, 0.25, 120, 3.16049)],
    ledger_head="ab" * 32,
)


def digest(*names: object) -> str:
    return hashlib.sha256("/".join(map(str, names)).encode()).hexdigest()


def sample_report(pictures: bool = True) -> RunReport:
    return RunReport(
        run=RunEntry(
            id="demo-20261120-0930-7c1e",
            recipe="demo",
            seed=17,
            engine="loopback",
            started="2026-11-20T09:30:02+00:00",
            finished="2026-11-20T09:31:37+00:00",
            wall_s=94.71,
            cpu_s=183.26,
            versions={"wardround": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0", "python": "3.11.2"},
            config_sha256=digest("config"),
            enforced=False,
        ),
        sites=[
            SiteEntry(site, 26 + 2 * number, 52 + 4 * number, 12, 2, TEST_PATIENTS[site], "unet-xs")
            for number, site in enumerate(SITES)
        ],
        teacher=TeacherEntry("ward-sam-tiny", 1_918_341, 381_732, digest("base"), digest("adapter")),
        rounds=sample_rounds(),
        benefit=sample_benefit(),
        students={
            site: StudentEntry("unet-xs", 203_441, digest(site), 7.31 + number / 9, 41.82 - number / 7)
            for number, site in enumerate(SITES)
        },
        synthetic={
            site: SyntheticEntry(120, 104 - 7 * number, 16 + 7 * number) for number, site in enumerate(SITES)
        },
        privacy={
            site: PrivacyEntry(
                stages=[PrivacyStage("adapt", "none"), PrivacyStage("style", "group size >= 5")]
            )
            for site in SITES
        },
        egress=sample_egress(),
        pictures=[picture for number, site in enumerate(SITES) for picture in site_pictures(site, number)]
        if pictures
        else [],
    )


def sample_rounds() -> list[RoundRecord]:
    sites = list(SITES)
    rounds = [
        RoundRecord(0, "propose", sites, dict.fromkeys(SITES, 1_204), dict.fromkeys(SITES, 18_412), 0.41)
    ]
    for index in range(3):
        losses = {
            site: [0.93 * 0.62**index + 0.05 * number, 0.61 * 0.66**index + 0.04 * number]
            for number, site in enumerate(SITES)
        }
        up = {site: 1_528_117 + 13 * number for number, site in enumerate(SITES)}
        down = dict.fromkeys(SITES, 1_512_004 if index == 0 else 2_871_330 + 1_021 * index)
        rounds.append(
            RoundRecord(index, "adapt", sites, up, down, 8.2 + index / 3, 0.0213 / (index + 1), losses=losses)
        )
    rounds.append(
        RoundRecord(0, "style", sites, dict.fromkeys(SITES, 2_411), dict.fromkeys(SITES, 1_377), 0.3)
    )
    losses = {site: [1.41 + 0.1 * number, 0.37 + 0.06 * number] for number, site in enumerate(SITES)}
    down = dict.fromkeys(SITES, 2_902_118)
    rounds.append(RoundRecord(0, "student", sites, dict.fromkeys(SITES, 1_390), down, 52.6, losses=losses))
    rounds.append(
        RoundRecord(0, "evaluate", sites, dict.fromkeys(SITES, 9_806), dict.fromkeys(SITES, 813_377), 9.7)
    )
    return rounds


def sample_benefit() -> list[BenefitCell]:
    cells: list[BenefitCell] = []
    for number, site in enumerate(SITES):
        for model, values in DICE_ALL.items():
            for tested_on in ("own", "all"):
                patients = TEST_PATIENTS[site] if tested_on == "own" else sum(TEST_PATIENTS.values())
                dice = values[number] + (OWN_BONUS[model][number] if tested_on == "own" else 0.0)
                for metric, value, half in (
                    ("dice", dice, HALF_WIDTH[tested_on]),
                    ("nsd", min(0.99, dice + 0.057), HALF_WIDTH[tested_on]),
                    ("hd95", 31.7 * (1.07 - dice), 4.13),
                ):
                    place = (site, model, tested_on, metric, "lesion")
                    cells.append(BenefitCell(*place, value, [value - half, value + half], patients))
    return cells


def sample_egress() -> list[EgressEntry]:
    entries = []
    for site in SITES:
        for record in sample_rounds():
            name = {"adapt": "adapter update", "style": "style summary"}.get(record.stage, record.stage)
            place = (site, record.index, name)
            sent = record.bytes_up[site] - 611
            entries.append(EgressEntry(*place, sent, digest(*place), "none"))
    return entries


def site_pictures(site: str, number: int) -> list[Picture]:
    rng = np.random.default_rng(number)
    rows = []
    for _ in range(2):
        image, mask = _phantom(rng)
        teacher, student = (_shifted(mask, rng) for _ in range(2))
        rows.append([image, *(_overlay(image, each) for each in (mask, teacher, student))])
    real, synthetic = ([_phantom(rng)[0] for _ in range(2)] for _ in range(2))
    columns = ["image", "truth", "teacher", "student"]
    return [
        Picture(site, "cases", "Two test patients.", columns, _png(rows)),
        Picture(
            site,
            "synthetic",
            "Real images of this site beside synthetic ones drawn here.",
            ["real", "real", "synthetic", "synthetic"],
            _png([[*real, *synthetic], [*synthetic, *real]][:1]),
        ),
    ]


def _phantom(rng: np.random.Generator, side: int = 96) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:side, :side] / side
    cx, cy = rng.uniform(0.3, 0.7, 2)
    mask = ((x - cx) / rng.uniform(0.12, 0.24)) ** 2 + ((y - cy) / rng.uniform(0.1, 0.2)) ** 2 < 1
    speckle = rng.gamma(3.0, 1 / 3, (side + 2, side + 2))
    shifted = [speckle[i : i + side, j : j + side] for i in range(3) for j in range(3)]
    tissue = np.where(mask, 0.25, 0.55) * np.mean(shifted, axis=0)  # a scanner blurs
    return np.clip(tissue, 0, 1).astype(np.float32), mask


def _shifted(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dy, dx = rng.integers(-3, 4, 2)
    return np.roll(mask, (int(dy), int(dx)), (0, 1))


def _overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    rgb = np.repeat(image[..., None], 3, -1)
    rgb[mask] = 0.55 * rgb[mask] + 0.45 * np.array([0.35, 0.71, 0.93])
    return rgb


def _png(rows: list[list[np.ndarray]]) -> str:
    panels = [
        np.concatenate([panel if panel.ndim == 3 else np.repeat(panel[..., None], 3, -1) for panel in row], 1)
        for row in rows
    ]
    data = io.BytesIO()
    Image.fromarray((np.concatenate(panels, 0) * 255).astype(np.uint8)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


class Page(HTMLParser):
    """A page as its elements and its visible text; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.derived: list[str] = []
        self.texts: list[str] = []
        self._open: list[tuple[str, set[str]]] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, set(attributes.get("class", "").split())))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        classes = set().union(*(each for _, each in self._open))
        if any(tag == "style" for tag, _ in self._open):
            return
        if classes & {"derived", "derived-label"}:
            self.derived.append(data)
        elif "tick" not in classes:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def visible(report: RunReport) -> str:
    """All visible text, derived numbers included, on one line."""
    html = re.sub(r"<style>.*?</style>", "", render(report), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", "", html).split())


def with_dice(report: RunReport, change: Callable[[BenefitCell], BenefitCell]) -> RunReport:
    return replace(report, benefit=[change(c) if c.metric == "dice" else c for c in report.benefit])
