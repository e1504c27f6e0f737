"""The page: a report in, one HTML text out. No clock, no network, no file but the two beside this one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from common.pages import STYLE
from common.pages import wording as words
from common.pages.templates import template_environment
from server.report import charts, reading, wording
from server.report.acceptance import acceptance
from server.report.comparison import Matrix, matrix_of, metrics_of, models_of
from server.report.schema import EgressEntry, Picture, RoundRecord, RunReport, SiteEntry

HERE = Path(__file__).parent
OPEN_ROWS = 8  # charts of more sites than this are folded at first
PRINTED_RECEIPTS = 60  # a longer list of receipts stays folded on paper


@dataclass(frozen=True)
class Chart:
    caption: str
    svg: Markup


@dataclass(frozen=True)
class SitePictures:
    site: SiteEntry
    pictures: list[Picture]


@dataclass(frozen=True)
class SiteReceipts:
    site: str
    entries: list[EgressEntry]
    total: Markup
    printed: bool


def render(report: RunReport) -> str:
    """The whole page, ending in a newline. Equal reports give equal texts."""
    matrices = {
        metric: [
            matrix for tested in ("all", "own") if (matrix := matrix_of(report, metric, tested)) is not None
        ]
        for metric in metrics_of(report)
    }
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            report=report,
            style=Markup(STYLE.read_text(encoding="utf-8")),  # our own file, not the report's
            classes=list(dict.fromkeys(cell.class_name for cell in report.benefit)),
            lede=_lede(report),
            figures=reading.figures(report),
            unprotected=reading.unprotected(report),
            statements=reading.statements(report),
            reading=reading.reading(report),
            matrices=matrices,
            models=models_of(report.benefit),
            dice_charts=[_dice_chart(matrix) for matrix in matrices.get("dice", [])],
            open_charts=len(report.sites) <= OPEN_ROWS,
            loss_charts=_loss_charts(report),
            residual_chart=_residual_chart(report.rounds),
            byte_chart=_byte_chart(report.rounds),
            site_pictures=_site_pictures(report),
            receipts=_receipts(report),
            accepted=acceptance(report.rounds),
            command=_command(report),
        )
    )


@cache
def _environment() -> Environment:
    environment = template_environment(HERE)
    own = ("model_name", "metric_name", "stage_name", "start_name", "score", "interval", "tenth", "derived")
    environment.filters.update({name: getattr(wording, name) for name in own})
    shared = ("count", "small", "exact", "epsilon", "digest", "when", "listed")
    environment.filters.update({name: getattr(words, name) for name in shared})
    environment.globals.update(
        plural=words.plural, interval_bar=charts.interval_bar, share_bar=charts.share_bar
    )
    environment.globals.update(slot=charts.slot)
    return environment


def _lede(report: RunReport) -> Markup:
    """What this run was, in one sentence."""
    rounds = len({record.index for record in report.rounds if record.stage == "adapt"})
    sites = [site.id for site in report.sites]
    named = Markup(" ({})").format(words.listed(sites)) if 0 < len(sites) <= 6 else ""
    students = len(report.students)
    some = f"{students} of them went home with a small student"
    home = "each went home with a small student" if students == len(sites) else some
    return Markup(
        "Recipe {recipe}: {sites}{named} taught one shared teacher in {rounds} on the {engine} engine,"
        " and {home}."
    ).format(
        recipe=report.run.recipe,
        engine=report.run.engine,
        sites=words.plural(len(sites), "hospital"),
        named=named,
        rounds=words.plural(rounds, "adapter round"),
        home=home if students else "no student was made",
    )


def _dice_chart(matrix: Matrix) -> Chart:
    several = len(matrix.classes) > 1
    groups = [
        (
            f"{row.site} ({row.class_name})" if several else row.site,
            [charts.Dot(cell.model, cell.value, cell.ci95) for cell in row.cells if cell is not None],
        )
        for row in matrix.rows
    ]
    caption = reading.TESTED[matrix.tested_on]
    return Chart(
        caption, charts.dot_chart(groups, matrix.span, f"Dice of every model at every site. {caption}.")
    )


def _loss_charts(report: RunReport) -> list[Chart]:
    found = []
    for stage in dict.fromkeys(record.stage for record in report.rounds):
        records = [record for record in report.rounds if record.stage == stage]
        series = {
            site.id: [
                (record.index, record.losses[site.id]) for record in records if record.losses.get(site.id)
            ]
            for site in report.sites
        }
        series = {site: points for site, points in series.items() if points}
        if series:
            caption = f"Training loss, {wording.stage_name(stage)} stage"
            found.append(
                Chart(caption, charts.curves(series, f"{caption}, one line a site. Numbers in the table."))
            )
    return found


def _residual_chart(rounds: Sequence[RoundRecord]) -> Chart | None:
    series: dict[str, list[tuple[int, list[float]]]] = {}
    for record in rounds:
        if record.residual is not None:
            series.setdefault(wording.stage_name(record.stage), []).append((record.index, [record.residual]))
    if not series:
        return None
    caption = "Aggregation residual"
    return Chart(caption, charts.curves(series, f"{caption} a round. Numbers in the table."))


def _byte_chart(rounds: Sequence[RoundRecord]) -> Chart | None:
    rows, texts = [], []
    for record in rounds:
        up, down = (
            sum(amounts.values()) / max(1, len(amounts)) for amounts in (record.bytes_up, record.bytes_down)
        )
        if up or down:
            rows.append((f"{wording.stage_name(record.stage)} {record.index}", up, down))
            texts.append((words.size(up), words.size(down)))
    if not rows:
        return None
    label = "Bytes up and down in each round, mean over the hospitals in it. Numbers for each in the table."
    return Chart("Mean over the hospitals in the round", charts.byte_bars(rows, texts, label))


def _site_pictures(report: RunReport) -> list[SitePictures]:
    found = [
        SitePictures(site, [picture for picture in report.pictures if picture.site == site.id])
        for site in report.sites
    ]
    return [entry for entry in found if entry.pictures]


def _receipts(report: RunReport) -> list[SiteReceipts]:
    printed = len(report.egress) <= PRINTED_RECEIPTS
    found = []
    for site in report.sites:
        entries = [entry for entry in report.egress if entry.site == site.id]
        if entries:
            total = wording.derived(
                words.size(sum(entry.bytes for entry in entries)), "sum of the receipts' bytes"
            )
            found.append(SiteReceipts(site.id, entries, total, printed))
    return found


def _command(report: RunReport) -> str:
    run = report.run
    return shlex.join(["wardround", "simulate", run.recipe, "--engine", run.engine, f"run.seed={run.seed}"])
