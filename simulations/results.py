"""Several finished runs as tables: ``python -m simulations.results RUN_DIR ...`` (Markdown on stdout).

Runs of one recipe with other seeds are put together: a number is the mean over seeds, with every seed's own
value behind it, because a difference from one seed is not a gain. Where the runs kept their patients' values,
pairs of models are compared on the same patients (`simulations.comparisons`), and the goals are held against
what was found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from common.errors import ArtefactError, WardroundError
from server.report.schema import BenefitCell, RunReport
from simulations.comparisons import RIVALS, comparison_table, goal_lines, load_seeds

ORDER = (
    "local_only_scratch", "local_only_mae", "local_only_moco", "local_only",
    "no_federation", "no_synthetic", "no_distillation", "no_features", "task_agnostic",
    "random_colour", "augment", "amplitude", "histogram", "recolour", "paint", "student",
    "fedavg", "fedprox", "fedbn", "feddf", "centralised", "local_teacher", "teacher", "personal_teacher",
)  # fmt: skip
CREDITS = (
    ("phantom initialisation", "local_only", "local_only_scratch"),
    ("MAE on the site's own images", "local_only_mae", "local_only_scratch"),
    ("MoCo v3 on the site's own images", "local_only_moco", "local_only_scratch"),
    ("phantom over MAE initialisation", "local_only", "local_only_mae"),
    ("federation", "student", "no_federation"),
    ("synthetic images", "student", "no_synthetic"),
    ("distillation", "student", "no_distillation"),
    ("the painter over recolouring", "student", "recolour"),
    ("the painter over procedural paint", "student", "paint"),
    ("the painter over strong augmentation", "student", "augment"),
    ("the painter over random colours", "student", "random_colour"),
    ("all of it over local training", "student", "local_only"),
    ("federated over single-site teachers", "teacher", "local_teacher"),
    ("personal part over the federated teacher", "personal_teacher", "teacher"),
    ("personal over single-site teachers", "personal_teacher", "local_teacher"),
)  # fmt: skip


def cell_values(report: RunReport, model: str, tested_on: str, metric: str = "dice") -> dict[str, float]:
    """Site -> mean over classes; sites whose cell was suppressed are left out."""
    by_site: dict[str, list[float]] = {}
    for cell in report.benefit:
        if (cell.model, cell.tested_on, cell.metric) == (model, tested_on, metric) and cell.value is not None:
            by_site.setdefault(cell.site, []).append(cell.value)
    return {site: mean(values) for site, values in by_site.items()}


def site_mean(report: RunReport, model: str, tested_on: str, metric: str = "dice") -> float | None:
    values = cell_values(report, model, tested_on, metric)
    return mean(values.values()) if values else None


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """``0.812 (0.810 0.815 0.811)``: the mean over seeds and each seed's own value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    each = " ".join(f"{value:.{digits}f}" for value in known)
    return f"{mean(known):.{digits}f}" + (f" ({each})" if len(known) > 1 else "")


def models_of(reports: Sequence[RunReport]) -> list[str]:
    found = {cell.model for report in reports for cell in report.benefit}
    return [model for model in ORDER if model in found] + sorted(found - set(ORDER))


def dice_table(reports: Sequence[RunReport]) -> list[str]:
    lines = ["| model | Dice, own site | Dice, all sites | HD95, all | NSD, all |", "|---|---|---|---|---|"]
    for model in models_of(reports):
        row = [
            spread(site_mean(report, model, where, metric) for report in reports)
            for where, metric in (("own", "dice"), ("all", "dice"))
        ]
        row += [
            spread((site_mean(report, model, "all", metric) for report in reports), digits)
            for metric, digits in (("hd95", 1), ("nsd", 3))
        ]
        lines.append(f"| {model} | {' | '.join(row)} |")
    return lines


def site_table(reports: Sequence[RunReport]) -> list[str]:
    """Per site, own test patients: mean over seeds, and the mean interval."""
    sites = [site.id for site in reports[0].sites]
    lines = [f"| model, own site | {' | '.join(sites)} |", "|---" * (len(sites) + 1) + "|"]
    for model in models_of(reports):
        row = []
        for site in sites:
            cells = [cell for report in reports for cell in report.benefit if _is(cell, site, model)]
            known = [(cell.value, cell.ci95) for cell in cells if cell.value is not None and cell.ci95]
            if not known:
                row.append("-")
                continue
            low, high = (mean(interval[end] for _, interval in known) for end in (0, 1))
            row.append(f"{mean(value for value, _ in known):.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {model} | {' | '.join(row)} |")
    return lines


def _is(cell: BenefitCell, site: str, model: str) -> bool:
    return (cell.site, cell.model, cell.tested_on, cell.metric) == (site, model, "own", "dice")


def credit_table(reports: Sequence[RunReport]) -> list[str]:
    """One ablation a row: the difference that one ingredient makes, own and all, and the worst site."""
    lines = [
        "| what is credited | difference | own site | all sites | worst site, own |",
        "|---|---|---|---|---|",
    ]
    present = set(models_of(reports))
    for name, better, worse in CREDITS:
        if not {better, worse} <= present:
            continue
        row = []
        for where in ("own", "all"):
            row.append(spread(_difference(report, better, worse, where) for report in reports))
        lowest = (min(_by_site(report, better, worse).values(), default=None) for report in reports)
        lines.append(f"| {name} | {better} - {worse} | {' | '.join(row)} | {spread(lowest)} |")
    if {"teacher", "local_teacher"} <= present:
        margins = spread(_over_the_best(report) for report in reports)
        lines.append(f"| over the best single-site teacher | teacher - best local_teacher | | {margins} | |")
    return lines


def _over_the_best(report: RunReport) -> float | None:
    """The federated teacher minus the best single-site teacher, both on all sites' patients."""
    teacher = site_mean(report, "teacher", "all")
    alone = cell_values(report, "local_teacher", "all")
    return teacher - max(alone.values()) if teacher is not None and alone else None


def _difference(report: RunReport, better: str, worse: str, where: str) -> float | None:
    one, two = site_mean(report, better, where), site_mean(report, worse, where)
    return None if one is None or two is None else one - two


def _by_site(report: RunReport, better: str, worse: str) -> dict[str, float]:
    one, two = cell_values(report, better, "own"), cell_values(report, worse, "own")
    return {site: one[site] - two[site] for site in sorted(one.keys() & two.keys())}


def cost_table(reports: Sequence[RunReport]) -> list[str]:
    """Time, bytes of each adapt round, and what was kept of the synthetic images; one row a seed."""
    lines = [
        "| seed | wall s | CPU s | bytes up, a site and round | bytes down, first and last round "
        "| residuals | synthetic kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        rounds = [record for record in report.rounds if record.stage == "adapt"]
        up = sorted({size for record in rounds for size in record.bytes_up.values()})
        down = [round(mean(record.bytes_down.values())) for record in rounds]
        residuals = " ".join(f"{record.residual:.4f}" for record in rounds if record.residual is not None)
        kept = sum(entry.kept for entry in report.synthetic.values())
        made = sum(entry.generated for entry in report.synthetic.values())
        lines.append(
            f"| {report.run.seed} | {report.run.wall_s:.0f} | {report.run.cpu_s:.0f} | {up[0]} to {up[-1]} "
            f"| {down[0]} to {down[-1]} | {residuals} | {kept} of {made} |"
        )
    return lines


def tables(reports: Sequence[RunReport]) -> str:
    """All tables of runs of one recipe, by seed."""
    ordered = sorted(reports, key=lambda report: report.run.seed)
    parts = [dice_table(ordered), credit_table(ordered), site_table(ordered), cost_table(ordered)]
    return "\n\n".join("\n".join(part) for part in parts)


def paired(runs: Sequence[tuple[Path, RunReport]]) -> str:
    """Models compared on the same patients, and the goals; one line where a run kept no patients' values."""
    try:
        seeds = load_seeds(runs)
    except ArtefactError as error:
        return f"No paired comparison: {error}"
    return "\n".join([*comparison_table(seeds, (*CREDITS, *RIVALS)), "", *goal_lines(seeds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    try:
        runs = [(folder, RunReport.load(folder / "report.json")) for folder in parser.parse_args().runs]
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    for recipe in dict.fromkeys(report.run.recipe for _, report in runs):
        mine = [(folder, report) for folder, report in runs if report.run.recipe == recipe]
        sys.stdout.write(f"## {recipe}\n\n{tables([report for _, report in mine])}\n\n{paired(mine)}\n\n")


if __name__ == "__main__":
    main()
