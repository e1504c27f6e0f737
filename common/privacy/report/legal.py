"""Text for those who assess: a DPIA's steps 2, 5 and 6, and an index of evidence on EDPB Opinion 28/2024.

Pointers and facts, not advice. The steps are those of the ICO's template (describe the processing; identify
risks; identify measures); likelihood and severity are for the people who sign, and are left to them.
"""

from __future__ import annotations

from typing import Any

from common.pages.wording import exact, plural

Document = dict[str, Any]


def assessment(document: Document) -> list[Document]:
    """The three steps, each a title and lines."""
    return [
        {"title": "Step 2: describe the processing", "lines": _processing(document)},
        {"title": "Step 5: identify and assess risks", "lines": _risks(document)},
        {"title": "Step 6: identify measures to reduce risk", "lines": _measures(document)},
    ]


def _processing(document: Document) -> list[str]:
    settings, egress, federation = document["settings"], document["egress"], document["federation"]
    sites = f"{federation['count']} sites" if federation["count"] else "sites that the plan does not name"
    people = "a number of" if settings["patients"] is None else settings["patients"]
    left = plural(egress["payloads"], "payload")
    return [
        "Nature: images and masks of patients are read at this site, by its guard alone, to train a model "
        "that outlines structures. They are not sent.",
        f"Scope: {people} patients; {left} ({egress['size']}) left in this run, to one server and {sites}.",
        "Context: patients do not deal with the system; whether they expect this use is for the site to say.",
        "Purpose: a model shared by the sites, and a smaller one that stays here.",
    ]


def _risks(document: Document) -> list[str]:
    first = "Someone learns from what left that a person was a patient here (membership)."
    if document["guarantee"]:
        figure = document["budget"]["epsilons"][0]
        run, delta = exact(figure["run"]), exact(figure["delta"])
        first += f" Bounded for everybody: \u03b5 = {run} at \u03b4 = {delta} in this run."
    else:
        first += " NO GUARANTEE: nothing bounds it."
    return [
        first,
        "Someone reconstructs an image, or a feature of a patient, from what left. The same figure bounds "
        "it; without one, nothing does.",
        "The student or synthetic images, which saw real images without noise, leave the site by another "
        "way.",
        "A person with two patient ids, or at two sites, is charged less than they spent.",
        "The guard's rules are passed over by code that shares its process.",
    ]


def _measures(document: Document) -> list[str]:
    rows: list[tuple[str, Any]] = [
        ("Noise and clipping a patient at the source, accounted over all runs", document["guarantee"]),
        ("A signed policy of this site with caps", document["policy"] is not None),
        ("A signed ledger and a receipt for every payload", document["verification"]["entries"] > 0),
        ("A rehearsal of noise, draw and clip on made-up data", bool(document["rehearsal"]["passed"])),
        ("Attacks on what left, at the site", bool(document["artefacts"])),
        ("A guard in a process of its own", document["run"]["enforced"]),
    ]
    return [f"{measure}: {'in place' if done else 'NOT in place'}." for measure, done in rows]


def edpb_index(document: Document) -> list[Document]:
    """Which part of this page bears on which question of Opinion 28/2024; no part answers one."""
    audited = "part 9" if document["artefacts"] else "none: no artefact was audited"
    bounded = "parts 1, 4 and 5" if document["guarantee"] else "none: NO GUARANTEE"
    return [
        {"question": "Likelihood of direct extraction of personal data from the model", "evidence": bounded},
        {"question": "Likelihood of obtaining personal data from queries", "evidence": bounded},
        {"question": "Tests against membership inference, inversion and reconstruction", "evidence": audited},
        {
            "question": "Measures during selection of sources, preparation and training",
            "evidence": "parts 7 and 8",
        },
        {"question": "Access to the model and its outputs", "evidence": "parts 2 and 3"},
        {"question": "Documentation of design, risk assessment and audits", "evidence": "parts 6, 11 and 12"},
    ]
