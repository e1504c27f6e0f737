"""Sentences made from numbers by fixed rules: no word here goes further than the intervals do."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup, escape

from common.pages.wording import epsilon, exact, listed, plural, size, small
from server.report.comparison import Comparison, Pair, Verdict, compare, matrix_of
from server.report.schema import PrivacyEntry, RunReport
from server.report.wording import derived, score, signed

LONGEST_LIST = 6  # sites named one by one in a sentence; beyond, they are counted
TESTED = {"all": "Tested on the patients of all sites", "own": "Tested on each site's own patients"}


@dataclass(frozen=True)
class Figure:
    """One of the big figures at the top."""

    title: str
    value: Markup
    sentence: Markup
    tone: str = ""


def reading(report: RunReport) -> list[Markup]:
    """The benefit in plain words. A gain is claimed only where the two 95 % intervals do not overlap."""
    sentences: list[Markup] = []
    for tested_on in ("all", "own"):
        comparison = compare(report, tested_on)
        if comparison is not None:
            sentences.append(Markup(" ").join([_on_average(comparison), *_site_by_site(comparison)]))
    for sentence in (_against_teacher(report), _personal_at_home(report)):
        if sentence is not None:
            sentences.append(sentence)
    withheld = sum(cell.value is None for cell in report.benefit)
    if withheld:
        sentences.append(
            Markup("{} of the benefit tables {} no value; the reason stands in its place.").format(
                plural(withheld, "cell"), "has" if withheld == 1 else "have"
            )
        )
    scales = [cell.noise_scale for cell in report.benefit if cell.noise_scale is not None]
    if scales:
        sentences.append(
            Markup("{} of the benefit tables left a hospital with Laplace noise of scale up to {}.").format(
                plural(len(scales), "number"), small(max(scales))
            )
        )
    sentences.append(
        Markup("This is one run with one seed ({}): another seed can move these numbers.").format(
            report.run.seed
        )
    )
    return sentences


def _on_average(comparison: Comparison) -> Markup:
    mean = f"mean over {comparison.over}"
    student = derived(score(comparison.student), f"student: {mean}")
    local = derived(score(comparison.local), f"local_only: {mean}")
    difference = derived(signed(comparison.difference), "mean student minus mean local_only, before rounding")
    if len(comparison.of(Verdict.above)) == len(comparison.pairs):
        text = Markup(
            "{tested}, the students gained {difference} Dice over local training from the same start with the"
            " same steps ({student} against {local}, {mean}); the 95 % intervals are apart at every site."
        )
    else:
        text = Markup(
            "{tested}, the students' mean Dice was {student} and that of local training from the same start"
            " {local}: a difference of {difference} ({mean})."
        )
    return text.format(
        tested=TESTED[comparison.tested_on], difference=difference, student=student, local=local, mean=mean
    )


def _site_by_site(comparison: Comparison) -> list[Markup]:
    """Which sites differ and which do not; nothing where one sentence said it for all."""
    if len(comparison.of(Verdict.above)) == len(comparison.pairs):
        return []
    rules = {
        Verdict.above: "The student is higher with the intervals apart at {}.",
        Verdict.below: "The student is lower with the intervals apart at {}.",
        Verdict.overlap: "The intervals overlap, so no difference is claimed, at {}.",
        Verdict.unknown: "An interval is missing, so no difference is claimed, at {}.",
    }
    sentences = []
    for verdict, text in rules.items():
        pairs = comparison.of(verdict)
        if len(pairs) > LONGEST_LIST and verdict is not Verdict.below:  # a loss is always named
            sentences.append(Markup(text).format(f"{len(pairs)} of {comparison.counted}"))
        elif pairs:
            sentences.append(Markup(text).format(listed([_pair(pair) for pair in pairs])))
    return sentences


def _pair(pair: Pair) -> Markup:
    return Markup("{} ({})").format(
        pair.name, derived(signed(pair.difference), "student minus local_only, before rounding")
    )


def _against_teacher(report: RunReport) -> Markup | None:
    means = _means_of_two(report, "all", ("student", "teacher"))
    if means is None:
        return None
    return Markup(
        "On the same patients the large shared teacher scored {}, the small students {} (difference {})."
    ).format(
        derived(score(means[1]), "teacher: mean over sites"),
        derived(score(means[0]), "student: mean over sites"),
        derived(signed(means[0] - means[1]), "mean student minus mean teacher, before rounding"),
    )


def _personal_at_home(report: RunReport) -> Markup | None:
    means = _means_of_two(report, "own", ("personal_teacher", "teacher"))
    if means is None:
        return None
    return Markup(
        "On each site's own patients the teacher with the site's personal adapter, which stays there, scored"
        " {}, the shared one {} (difference {})."
    ).format(
        derived(score(means[0]), "personal_teacher: mean over sites"),
        derived(score(means[1]), "teacher: mean over sites"),
        derived(signed(means[0] - means[1]), "mean personal_teacher minus mean teacher, before rounding"),
    )


def _means_of_two(report: RunReport, tested_on: str, models: tuple[str, str]) -> tuple[float, float] | None:
    """Mean Dice of two models over the rows where both have a value."""
    matrix = matrix_of(report, "dice", tested_on)
    if matrix is None or not set(models) <= set(matrix.models):
        return None
    columns = [matrix.models.index(model) for model in models]
    pairs: list[tuple[float, float]] = []
    for row in matrix.rows:
        one, two = (row.cells[column] for column in columns)
        if one and two and one.value is not None and two.value is not None:
            pairs.append((one.value, two.value))
    return (fmean(pair[0] for pair in pairs), fmean(pair[1] for pair in pairs)) if pairs else None


def figures(report: RunReport) -> list[Figure]:
    """The four figures at the top: all sites, own site, bytes, privacy."""
    return [
        _benefit_figure(report, "all", "On patients of all sites"),
        _benefit_figure(report, "own", "On each site's own patients"),
        _bytes_figure(report),
        _privacy_figure(report),
    ]


def _benefit_figure(report: RunReport, tested_on: str, title: str) -> Figure:
    comparison = compare(report, tested_on)
    if comparison is None:
        sentence = Markup("No site has both a student and a local_only result.")
        return Figure(title, Markup("not measured"), sentence)
    mean = f"mean over {comparison.over}"
    apart = len(comparison.of(Verdict.above))
    sentence = Markup(
        "students' mean Dice, against {local} for local training alone (same start, same steps):"
        " {difference}. Higher with 95 % intervals apart at {apart} of {pairs}."
    ).format(
        local=derived(score(comparison.local), f"local_only: {mean}"),
        difference=derived(
            signed(comparison.difference), "mean student minus mean local_only, before rounding"
        ),
        apart=apart,
        pairs=comparison.counted,
    )
    if lower := len(comparison.of(Verdict.below)):
        sentence += Markup(" Lower with intervals apart at {}.").format(lower)
    return Figure(title, derived(score(comparison.student), f"student: {mean}"), sentence)


def _bytes_figure(report: RunReport) -> Figure:
    title = "Left each hospital per round"
    rounds = [record for record in report.rounds if record.stage == "adapt" and record.bytes_up]
    sent = [amount for record in rounds for amount in record.bytes_up.values()]
    if not sent:
        return Figure(title, Markup("nothing"), Markup("No adapter round sent anything."))
    how = f"mean of bytes_up over {plural(len(rounds), 'adapter round')} and the sites in them"
    total = sum(amount for record in report.rounds for amount in record.bytes_up.values())
    per_site = total / max(1, len(report.sites))
    sentence = Markup(
        "a hospital's adapter update, as sent. All stages together: {} up per hospital."
    ).format(derived(size(per_site), "sum of bytes_up over all stages, mean over sites"))
    return Figure(title, derived(size(fmean(sent)), how), sentence)


def holds(entry: PrivacyEntry | None) -> bool:
    """A guarantee counts only with its numbers: one without epsilon and delta is none."""
    return entry is not None and entry.guarantee and entry.epsilon is not None and entry.delta is not None


def unprotected(report: RunReport) -> list[str]:
    return [site.id for site in report.sites if not holds(report.privacy.get(site.id))]


def _privacy_figure(report: RunReport) -> Figure:
    bare = unprotected(report)
    if bare or not report.sites:
        where = "" if len(bare) == len(report.sites) else Markup(" at {}").format(listed(bare))
        sentence = Markup("Nothing bounds what the sent numbers say about one patient{}.").format(where)
        return Figure("Privacy", Markup("NO GUARANTEE"), sentence, tone="warn")
    spent = [entry.epsilon for entry in report.privacy.values() if entry.epsilon is not None]
    value = Markup("\u03b5 \u2264 {}").format(epsilon(max(spent)))
    sentence = Markup("the largest over the sites, for any one patient; each site's own statement is below.")
    return Figure("Privacy", value, sentence)


def statements(report: RunReport) -> list[Markup]:
    """Each site's privacy in one sentence from a fixed template; sites with equal ones share a line."""
    sites: dict[Markup, list[str]] = {}
    for site in report.sites:
        sites.setdefault(_statement(report.privacy.get(site.id)), []).append(site.id)
    return [Markup("<b>{}</b>: {}").format(listed(names), text) for text, names in sites.items()]


def _statement(entry: PrivacyEntry | None) -> Markup:
    if entry is None:
        return Markup("NO GUARANTEE; the run recorded no privacy state.")
    if entry.guarantee and not holds(entry):
        return Markup("NO GUARANTEE; one is recorded, but without its epsilon and delta.")
    if not holds(entry):
        return Markup("NO GUARANTEE for any one {}.").format(entry.unit)
    assert entry.epsilon is not None
    assert entry.delta is not None
    terms = [escape(term) for term in (entry.neighbouring, entry.sampling) if term]
    return Markup(
        "for any one {unit}, whether or not their images were used changes what anyone could"
        " conclude from what was sent by at most \u03b5 = {epsilon} at \u03b4 = {delta}{terms}."
    ).format(
        unit=entry.unit,
        epsilon=epsilon(entry.epsilon),
        delta=exact(entry.delta),
        terms=Markup(" ({})").format(Markup(", ").join(terms)) if terms else "",
    )
