"""The run as an entry for the Differential Privacy Deployments Registry (registry.opendp.org), tier 3.

Blocks and keys are those of the template of 2026 in the registry's data
(github.com/opendp/deployments-registry-data, ``tests/good_deployments/template.yaml``). An entry there is
YAML, and JSON is YAML: what is printed can be handed in once a person has filled in what this program cannot
know: the region, the kind of curator, the authors, and evidence.
"""

from __future__ import annotations

import re
from typing import Any

Document = dict[str, Any]

TO_FILL_IN = ""  # what only a person can say


def registry_entry(document: Document) -> Document:
    """Tier 3. Where there is no guarantee the variant says so, and the registry's own check refuses it."""
    return {
        "url_slug": re.sub(r"[^a-z0-9]+", "-", f"{document['site']}-{document['run']['id']}".lower()),
        "deployment": {
            "basic": _basic(document),
            "dp_variant": _variant(document),
            "privacy_loss": _loss(document),
            "deployment_model": _model(document),
            "implementation": _implementation(document),
            "administrative": {
                "evidence_sources": {},
                "status": "Draft",
                "registry_authors": [TO_FILL_IN],
                "tier": 3,
            },
        },
    }


def _basic(document: Document) -> Document:
    payloads = document["egress"]["payloads"]
    return {
        "name": f"Updates of run {document['run']['id']}",
        "data_curators": [{"data_curator_name": document["site"], "data_curator_type": TO_FILL_IN}],
        "description": f"{payloads} payloads that {document['site']} sent to train a model with other sites.",
        "intended_use": "Training of a shared model that segments medical images.",
        "data_product_type": "Machine learning model",
        "data_product_region": TO_FILL_IN,
        "data_product_sector": "Healthcare",
        "publication_date": document["run"]["finished"][:10],
    }


def _variant(document: Document) -> Document:
    named = "Approximate DP" if document["guarantee"] else "NO GUARANTEE"
    return {
        "variant_name": named,
        "data_domain": "Sets of patients; a patient has any number of images with or without masks.",
        "unprotected_quantities": _lines(document["not_covered"]),
    }


def _loss(document: Document) -> Document:
    """The parameters are of everything that this site ever released; the details have this run's."""
    settings, first = document["settings"], document["budget"]["epsilons"][0]
    if first["total"] is None:
        parameters: Document = {}
        details = _lines(["NO GUARANTEE", *document["gaps"]])
    else:
        parameters = {"epsilon": first["total"], "delta": first["delta"]}
        details = _lines(
            f"at delta {row['delta']}: epsilon {row['run']} for this run, {row['total']} for all runs"
            for row in document["budget"]["epsilons"]
        )
    most = settings["max_images_per_patient"]
    bounded = f"the mean over at most {most} images, clipped to a fixed norm" if most else "not bounded"
    return {
        "privacy_unit": "Patient-level",
        "privacy_unit_details": "Adjacent sets differ by one patient added or removed, with all images, "
        f"masks and visits at this site. In one step a patient contributes one gradient: {bounded}.",
        "number_of_privacy_units": 1,
        "privacy_parameters": parameters,
        "privacy_parameters_details": details,
    }


def _model(document: Document) -> Document:
    enforced = document["run"]["enforced"]
    guard = "The guard runs in a process of its own." if enforced else document["enforcement"]
    return {
        "model_name": "Federated",
        "model_name_details": "Each site clips and adds noise before anything leaves, as if it were alone.",
        "trust_assumptions": "None in the server, the other sites or outsiders; a site trusts its own "
        f"installation. {guard}",
        "actors": _lines(
            f"{row['adversary']} sees {row['sees']}" for row in document["protection"]
        ),
        "release_type": "Many releases",
        "release_type_details": "One in each round; the budget of all is fixed in a plan before the first.",
        "data_source_type": "Static",
        "access_type": "Non-interactive",
    }  # fmt: skip


def _implementation(document: Document) -> Document:
    made = document["reproducibility"]
    stages = (
        f"{row['stage']}: epsilon {row['joint']} with all before it" for row in document["budget"]["stages"]
    )
    return {
        "preprocessing_and_hyperparameter_tuning": "Settings are fixed in the plan before data are opened; "
        "none is tuned on patients of this run, so nothing is charged for it.",
        "mechanisms": _lines(
            [
                "Gaussian noise on the sum of clipped gradients of patients drawn one by one (Poisson)",
                "noise from a stream cipher keyed by the operating system; a number is made of four draws",
                "a hash-chained and signed ledger, written before each release; its head "
                f"{made['ledger_head'] or 'is missing'}; verified: {document['verification']['holds']}",
                "software: " + ", ".join(f"{name} {number}" for name, number in made["versions"].items()),
                f"digest of the code: {made['code_sha256']}",
                *(f"audit of {one['artefact']}: {one['verdict']}" for one in document["artefacts"]),
            ]
        ),
        "composition": _lines(
            ["all events of the ledger, across runs, as one privacy loss distribution, rounded up", *stages]
        ),
        "post_processing": "Averaging with other sites, momentum on the server, and distillation on images "
        "that are not patients'. A student that also saw real images is not covered and stays.",
        "justification": document["disclaimer"],
    }


def _lines(points: Any) -> str:
    """A markdown list."""
    return "\n".join(f"- {point}" for point in points)
