"""The model card beside an export: what the student is, what it was measured at, and what it may cost.

It is made to be handed on with the file. So it holds no path, no patient and no number that the site would
not release: metrics over too few patients are withheld, as in the report of a run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from client.pixels import HIGH_PERCENTILE, LOW_PERCENTILE, MIN_RANGE
from client.students import LoadedStudent, StudentCard
from common.canonical import sha256_of_file
from common.durable import write_atomic
from common.errors import ArtefactError, UsageError
from common.guard_api import Metric
from common.recipe import EvaluationConfig

CARD_JSON, CARD_MARKDOWN = "model-card.json", "model-card.md"
PRIVACY_JSON, REPORT_JSON = "privacy.json", "report.json"
SCHEMA = 1
NO_GUARANTEE = "NO GUARANTEE"
Document = dict[str, Any]

LIMITS = (
    "It is a research model and no medical device: nobody has approved it for diagnosis.",
    "It was trained on this site's images and what the consortium's teacher knew of others': on another "
    "scanner, population or disease it has to be measured again before use.",
    "It sees one slice at a time, without its neighbours.",
    "It marks the declared classes and nothing else, and does not warn of an image of another kind.",
)


@dataclass(frozen=True)
class ExportEntry:
    """One exported file. ``file`` is relative to the card; ``about`` what was measured when it was made."""

    file: str
    format: str
    sha256: str
    bytes: int
    about: dict[str, Any]


def entry_of(file: Path, folder: Path, kind: str, about: dict[str, Any]) -> ExportEntry:
    name = file.relative_to(folder).as_posix()
    return ExportEntry(name, kind, sha256_of_file(file), file.stat().st_size, about)


def write_card(
    folder: Path,
    weights: Path,
    student: LoadedStudent,
    entries: Sequence[ExportEntry],
    measured: Document | None,
) -> Document:
    """Write both forms of the card into ``folder``; entries of other exports of the same weights stay.

    Args:
        weights: the student's file: what lies around it (``report.json`` of its run, ``privacy.json`` of its
            site) is read.
        measured: ``data`` and ``metrics`` that were just measured, in place of the run's.
    """
    before = earlier(folder, student.card)
    names = {entry.file for entry in entries}
    kept = [entry for entry in before if entry["file"] not in names and (folder / entry["file"]).is_file()]
    document = describe(weights, student) | (measured or {})
    document["exports"] = sorted(kept + [asdict(entry) for entry in entries], key=lambda entry: entry["file"])
    write_atomic(folder / CARD_JSON, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(folder / CARD_MARKDOWN, markdown(document).encode())
    return document


def earlier(folder: Path, card: StudentCard) -> list[Document]:
    """The exports that a card in ``folder`` lists. Raises `UsageError` if it is another student's card."""
    path = folder / CARD_JSON
    if not path.is_file():
        return []
    try:
        document = json.loads(path.read_text())
        entries: list[Document] = document["exports"]
        digest = document["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no model card of this version: give another folder") from error
    if digest != card.sha256:
        raise UsageError(f"{path} is the card of another student: give each student a folder of its own")
    return entries


def describe(weights: Path, student: LoadedStudent) -> Document:
    """Everything but the exports."""
    card = student.card
    report = _report(weights, card)
    return {
        "schema": SCHEMA,
        "made_by": f"wardround {version('wardround')}",
        "student": card.name,
        "model": card.model,
        "run_id": card.run_id,
        "params": card.params,
        "weights_sha256": card.sha256,
        "classes": [{"name": item.name, "label": item.label, "values": item.values} for item in card.classes],
        "exclusive": card.exclusive,
        "input": f"image (B, 3, {card.image_size}, {card.image_size}), float32 in [0, 1]",
        "output": f"logits (B, {len(card.classes)}, {card.image_size}, {card.image_size}), float32",
        "preprocessing": preprocessing(card),
        "decision": decision(card),
        "data": _counts(report, weights),
        "metrics": _metrics(report, weights, card),
        "limits": list(LIMITS),
        "privacy": privacy(weights, card),
    }


def preprocessing(card: StudentCard) -> list[str]:
    steps = []
    if card.longest_side:
        steps.append(f"Resize the longest side to {card.longest_side} pixels (area mean).")
    if card.field_of_view:
        steps.append("Find the field of view; everything outside is black, and no mask lies there.")
    steps += [
        f"Stretch each channel from its {LOW_PERCENTILE} to its {HIGH_PERCENTILE} percentile to [0, 1], "
        f"over a range of at least {MIN_RANGE} of full scale; CT in DICOM in its header's window first.",
        "Repeat a grey image in three channels.",
        f"Cut tiles of {card.image_size} pixels that overlap by {EvaluationConfig().overlap}; reflect a side "
        "that is shorter.",
    ]
    return steps


def decision(card: StudentCard) -> list[str]:
    what = "softmax over a background of logit 0 and the classes" if card.exclusive else "a sigmoid a class"
    return [
        f"Probability: {what}. Blend the tiles' probabilities with Gaussian weights.",
        "A pixel belongs to a class of at least probability 0.5"
        + (", or to the most probable one where that outweighs the background." if card.exclusive else "."),
    ]


def _report(weights: Path, card: StudentCard) -> Document | None:
    """``report.json`` of the run that the weights lie in, if it is that run's."""
    for folder in list(weights.resolve().parents)[:4]:
        path = folder / REPORT_JSON
        if path.is_file():
            try:
                report: Document = json.loads(path.read_text(encoding="utf-8"))
                return report if report["run"]["id"] == card.run_id else None
            except (ValueError, KeyError, TypeError) as error:
                raise ArtefactError(f"{path} is no report: make it again with `wardround report`") from error
    return None


def _site(report: Document, weights: Path) -> Document | None:
    names = {parent.name for parent in weights.resolve().parents}
    return next((site for site in report.get("sites", []) if site["id"] in names), None)


def _counts(report: Document | None, weights: Path) -> Document | None:
    site = None if report is None else _site(report, weights)
    if site is None:
        return None
    return {key: site[key] for key in ("id", "patients", "images", "train", "val", "test")}


def _metrics(report: Document | None, weights: Path, card: StudentCard) -> list[Document]:
    site = None if report is None else _site(report, weights)
    if report is None or site is None:
        return []
    return [
        {
            key: cell.get(key)
            for key in ("metric", "class", "tested_on", "value", "ci95", "patients", "reason")
        }
        for cell in report.get("benefit", [])
        if cell["site"] == site["id"] and cell["model"] == card.model
    ]


def measured_metrics(metrics: Sequence[Metric]) -> list[Document]:
    """`release_metrics` in the card's form."""
    return [
        {
            "metric": item.metric, "class": item.class_name, "tested_on": "given", "value": item.value,
            "ci95": item.ci95, "patients": item.patients, "reason": item.reason,
        }
        for item in metrics
    ]  # fmt: skip


def privacy(weights: Path, card: StudentCard) -> Document:
    """What may be said of this file. It is never covered: a student sees labelled images as they are.

    A guarantee that the site's ``privacy.json`` states for what it sent is quoted beside that.
    """
    document: Document = {
        "covered": False,
        "verdict": NO_GUARANTEE,
        "text": "This student was trained on the site's own labelled images without noise. Handing it on is "
        "a release without differential privacy: whoever has it may learn about those patients.",
        "of_what_was_sent": "No privacy.json lies beside the weights: nothing is known here of the run.",
    }
    path = weights.parent / PRIVACY_JSON
    if not path.is_file():
        return document
    try:
        page = json.loads(path.read_text(encoding="utf-8"))
        same_run = page["run"]["id"] == card.run_id
        statement = next(item["text"] for item in page["statement"] if item["title"] == "Statement")
        guaranteed = bool(page["guarantee"])
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ArtefactError(f"{path} is no privacy.json of this version: make the page again") from error
    if not same_run:
        return document | {"of_what_was_sent": "The privacy.json beside the weights is of another run."}
    word = "GUARANTEE" if guaranteed else NO_GUARANTEE
    return document | {"of_what_was_sent": f"{word} for what the site sent in this run. {statement}"}


def markdown(document: Document) -> str:
    """The same for people."""
    protection = document["privacy"]
    sections = {
        "Privacy": [f"**{protection['verdict']}.** {protection['text']}", "", protection["of_what_was_sent"]],
        "Classes": [f"- {item['label']}: {item['name']}" for item in document["classes"]],
        "Input and output": [
            f"- {line}"
            for line in (
                document["input"], document["output"], *document["preprocessing"], *document["decision"],
            )
        ],
        "Data": [_data_line(document["data"])],
        "Metrics": _metric_lines(document["metrics"]),
        "Limits": [f"- {limit}" for limit in document["limits"]],
        "Files": _file_lines(document["exports"]),
    }  # fmt: skip
    lines = [
        f"# {document['student']} ({document['model']})",
        "",
        f"A segmentation student of {document['params']:,} parameters from run `{document['run_id']}`, "
        f"exported by {document['made_by']}. Digest of its weights: `{document['weights_sha256']}`.",
    ]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    return "\n".join(lines) + "\n"


def _data_line(data: Document | None) -> str:
    if data is None:
        return "The site's files do not say what it was trained on."
    return ", ".join(f"{key}: {value}" for key, value in data.items()) + "."


def _file_lines(entries: Sequence[Document]) -> list[str]:
    rows = ["| file | format | bytes | SHA-256 | checked |", "|---|---|---|---|---|"]
    for entry in entries:
        cells = [entry["file"], entry["format"], f"{entry['bytes']:,}", f"`{entry['sha256']}`", _about(entry)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _about(entry: Document) -> str:
    return "; ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in entry["about"].items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _metric_lines(metrics: Sequence[Document]) -> list[str]:
    if not metrics:
        return ["Nothing was measured: use `wardround student export --evaluate MANIFEST`."]
    lines = ["| class | metric | tested on | mean | 95 % interval | patients |", "|---|---|---|---|---|---|"]
    for item in metrics:
        withheld = item["value"] is None
        mean = f"- ({item['reason']})" if withheld else f"{item['value']:.3f}"
        interval = "-" if item["ci95"] is None else " to ".join(f"{edge:.3f}" for edge in item["ci95"])
        cells = [item["class"], item["metric"], item["tested_on"], mean, interval, item["patients"] or "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines
