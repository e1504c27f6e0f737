"""The officer's page: every number stands in privacy.json, and no word goes further than the record."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json
from common.errors import ArtefactError, VerificationFailed
from common.pages.wording import THIN, when
from common.privacy.budget import Caps
from common.privacy.entries import Context
from common.privacy.keys import public_key
from common.privacy.ledger import Ledger
from common.privacy.report import PRIVACY_HTML, PRIVACY_JSON, check_page, rebuild, write_page
from common.privacy.report.facts import document_of, from_json
from common.privacy.report.page import render
from common.privacy.report.record import Inquiry, read_record
from tests.privacy_sample import RUN_PLAN, audited_site, bare_site, two_runs
from tests.report_sample import Page

OFFICER = Ed25519PrivateKey.generate()
INQUIRY = Inquiry(officer_public=public_key(OFFICER))
BANNED = ("anonymous", "safe", "guaranteed private", "compliant", "compliance", "enforced")
# Names and phrases of the template that hold a digit and state no figure of the site.
FIXED = (
    "SP 800-226", "SHA-256", "Opinion 28/2024", "in 100", "of 100", "tier 3", "part 12", "part 9",
    "parts 1, 4 and 5", "parts 7 and 8", "parts 2 and 3", "parts 6, 11 and 12",
    "Step 2", "Step 5", "Step 6", *(f"{number}. " for number in range(1, 14)),
)  # fmt: skip
Document = dict[str, Any]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited") / "site"
    audited_site(folder, OFFICER)
    write_page(folder, INQUIRY)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bare") / "quay"
    bare_site(folder)
    write_page(folder, Inquiry())
    return folder


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repeated") / "site"
    two_runs(folder)
    write_page(folder, Inquiry())
    return folder


@pytest.fixture(scope="module")
def documents(site: Path, bare: Path, repeated: Path) -> list[Document]:
    return [from_json(folder / PRIVACY_JSON) for folder in (site, bare, repeated)]


class Texts(HTMLParser):
    """The visible texts of a page, those in charts and folds included, outside and inside disclaimers."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.disclaimed: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not any(tag == "style" for tag, _ in self.open):
            aside = any("disclaimer" in classes.split() for _, classes in self.open)
            (self.disclaimed if aside else self.said).append(data)


def on_one_line(texts: list[str]) -> str:
    return " ".join(" ".join(texts).replace(THIN, "").split())


# --- numbers --------------------------------------------------------------------------------------------


def numbers_in(value: Any) -> set[float]:
    if isinstance(value, dict):
        keys = {float(key) for key in value if re.fullmatch(r"[\d.]+(e-?\d+)?", key)}
        return keys.union(*map(numbers_in, value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def identifiers(document: Document) -> set[str]:
    """Texts of the record that are no figures: names, digests, times, versions, the verifier's words."""
    found, reproducibility = {document["site"], document["run"]["id"]}, document["reproducibility"]
    found |= {*reproducibility["versions"].values(), *reproducibility["base_models"]}
    found |= {document["run"][key] for key in ("started", "finished")}
    found |= {*document["verification"]["cautions"], *document["verification"]["faults"]}
    found |= set(document["verification"]["owed"])
    if document["policy"] is not None:
        found |= {document["policy"][key] for key in ("policy_id", "key_id", "issued", "expires", "sha256")}
    found |= {word for word in found for word in (when(word), word[:10])}
    found |= set(re.findall(r"[0-9a-f]{64}", json.dumps(document)))
    return found | {word[:12] for word in found if re.fullmatch(r"[0-9a-f]{64}", word)}


def untraced(text: str, document: Document) -> list[str]:
    """Numbers in ``text`` that are, exactly, no number of the document."""
    for phrase in sorted({*identifiers(document), *FIXED}, key=len, reverse=True):
        if re.search(r"\d", phrase):
            text = text.replace(phrase, " ")
    tokens = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", text)
    known = numbers_in(document)
    # Sizes in words ("4.01 kB") stand as texts beside their bytes.
    known |= {float(size.split(THIN)[0]) for size in re.findall(rf"[\d.]+{THIN}[kMG]?B", json_text(document))}
    return [token for token in tokens if float(token) not in known]


def json_text(document: Document) -> str:
    return json.dumps(document, ensure_ascii=False)


def test_every_number_on_the_page_is_exactly_one_of_the_document(documents: list[Document]) -> None:
    for document in documents:
        page = Texts(render(document))
        text = on_one_line([*page.said, *page.disclaimed])
        assert len(re.findall(r"\d+", text)) > 60
        assert untraced(text, document) == []


def test_every_number_in_a_sentence_is_a_number_of_the_document(documents: list[Document]) -> None:
    for document in documents:
        texts = [sentence["text"] for sentence in document["statement"]]
        texts += [line for step in document["dpia"] for line in step["lines"]]
        texts += [item["evidence"] for item in document["hazards"]]
        texts += [*document["gaps"], *document["verdict"]["cautions"], *document["not_covered"]]
        assert untraced(on_one_line(texts), document) == []


def test_a_number_from_nowhere_would_be_found(documents: list[Document]) -> None:
    assert untraced("epsilon 0.777 of 12345", documents[0]) == ["0.777", "12345"]
    assert untraced(f"epsilon {documents[0]['budget']['epsilons'][0]['run']}", documents[0]) == []


def test_plots_are_drawn_where_there_are_data(documents: list[Document]) -> None:
    plots = [{name for name, axes in document["plots"].items() if axes} for document in documents]
    assert plots == [
        {"stages", "steps", "classes", "roc", "noise", "batches", "audits"},
        set(),
        {"stages", "steps", "classes", "roc"},
    ]
    for document, drawn in zip(documents, plots, strict=True):
        assert render(document).count('class="chart"') == len(drawn)


# --- words ----------------------------------------------------------------------------------------------


def test_strong_words_stand_in_disclaimers_only(documents: list[Document]) -> None:
    for document in documents:
        page = Texts(render(document))
        said = on_one_line(page.said).lower().replace("policy advisory, not enforced", "")
        assert [word for word in BANNED if word in said] == []
        assert "anonymous" in on_one_line(page.disclaimed)
        assert "policy advisory, not enforced" in on_one_line(page.said).lower()
        entry = json_text(document["registry"]).lower().replace("policy advisory, not enforced", "")
        stated = entry.replace(json_text(document["disclaimer"]).lower().strip('"'), "")
        assert [word for word in BANNED if word in stated] == []


def test_without_noise_every_place_says_no_guarantee(bare: Path, documents: list[Document]) -> None:
    document = documents[1]
    assert document["verdict"]["word"] == "NO GUARANTEE"
    assert document["guarantee"] is False
    assert all("NO GUARANTEE" in sentence["text"] for sentence in document["statement"][:3])
    assert {row["epsilon"] for row in document["protection"]} == {None}
    assert {row["run"] for row in document["budget"]["epsilons"]} == {None}
    entry = document["registry"]["deployment"]
    assert entry["dp_variant"]["variant_name"] == "NO GUARANTEE"
    assert entry["privacy_loss"]["privacy_parameters"] == {}
    assert "NO GUARANTEE" in entry["privacy_loss"]["privacy_parameters_details"]
    assert "NO GUARANTEE" in document["dpia"][1]["lines"][0]
    html = (bare / PRIVACY_HTML).read_text()
    for part in re.findall(r'<section id="(?:left|who|budget|meaning|settings)">.*?</section>', html, re.S):
        assert "NO GUARANTEE" in part


def test_a_release_without_noise_takes_the_guarantee_of_later_runs(repeated: Path, tmp_path: Path) -> None:
    shutil.copytree(repeated, tmp_path / "site")
    before = document_of(read_record(tmp_path / "site", Inquiry()))
    ledger = Ledger.open(tmp_path / "site", Caps(1e-5))
    ledger.declare_unprotected(Context("run-2"), "evaluate", ["patient-1"])
    after = document_of(read_record(tmp_path / "site", Inquiry()))
    assert (before["guarantee"], after["guarantee"]) == (True, False)
    assert after["gaps"] == ["the ledger holds 1 releases without noise, which nothing takes back"]


def test_what_nobody_looked_at_is_not_checked(documents: list[Document]) -> None:
    audited, bare, repeated = (
        {item["name"]: item["status"] for item in document["hazards"]} for document in documents
    )
    noise, attack = "Noise is drawn as strong as claimed", "No attack found more than is claimed"
    assert [audited[noise], repeated[noise], bare[noise]] == ["MET", "NOT CHECKED", "NOT CHECKED"]
    assert [audited[attack], repeated[attack], bare[attack]] == ["MET", "NOT CHECKED", "NOT CHECKED"]
    policy = "A policy signed by the officer allowed the run"
    assert [audited[policy], repeated[policy], bare[policy]] == ["MET", "NOT MET", "NOT MET"]
    guard = "The guard is a process of its own"
    assert [audited[guard], repeated[guard], bare[guard]] == ["NOT MET"] * 3
    bounded = "Everything that left is bounded by a mechanism"
    assert [audited[bounded], repeated[bounded], bare[bounded]] == ["MET", "MET", "NOT MET"]
    assert audited["The ledger holds"] == "MET"


def test_a_rehearsal_of_other_code_checks_nothing(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    path = tmp_path / "site" / "audits" / "rehearsal.json"
    path.write_text(path.read_text().replace("c" * 64, "9" * 64))
    document = document_of(read_record(tmp_path / "site", INQUIRY))
    found = {item["name"]: item for item in document["hazards"]}["Each patient is clipped"]
    assert (found["status"], "other code" in found["evidence"]) == ("NOT CHECKED", True)


def test_the_verdict_follows_the_record(site: Path, documents: list[Document], tmp_path: Path) -> None:
    assert [d["verdict"]["word"] for d in documents] == [
        "WITHIN POLICY", "NO GUARANTEE", "BOUNDED, UNDER NO POLICY",
    ]  # fmt: skip
    stranger = public_key(Ed25519PrivateKey.generate())
    document = document_of(read_record(site, Inquiry(officer_public=stranger)))
    assert document["verdict"]["word"] == "THE RECORD DOES NOT HOLD"
    assert document["policy"]["signature"] == "DOES NOT HOLD"
    entries = (site / "ledger.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(site, tmp_path / "owing")
    before = next(i for i, line in enumerate(entries) if '"kind":"artefact"' in line)
    (tmp_path / "owing" / "ledger.jsonl").write_text("".join(entries[:before]))
    last = json.loads(entries[before - 1])
    head = canonical_json({"seq": last["seq"], "hash": last["hash"]})
    (tmp_path / "owing" / "ledger.head").write_text(head)
    (tmp_path / "owing" / "checkpoint.json").unlink()
    owing = document_of(read_record(tmp_path / "owing", INQUIRY))
    assert owing["verdict"]["word"] == "BOUNDED, AN AUDIT IS OWED"
    assert "holds, but for an audit that is owed" in owing["statement"][-1]["text"]
    unverified = document_of(read_record(site, Inquiry(most_steps=2)))
    assert unverified["verdict"]["word"] == "BOUNDED, NOT YET VERIFIED"
    assert unverified["verification"]["holds"] is None


def test_an_audit_that_found_more_than_is_claimed_is_the_verdict(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    path = tmp_path / "site" / "audits" / "artefact-adapter.json"
    path.write_text(path.read_text().replace("CONSISTENT", "INCONSISTENT"))
    document = document_of(read_record(tmp_path / "site", INQUIRY))
    assert document["verdict"]["word"] == "AN AUDIT CONTRADICTS THE CLAIM"


# --- the page as a file ---------------------------------------------------------------------------------


def test_the_page_is_a_function_of_the_document(site: Path, tmp_path: Path) -> None:
    page = (site / PRIVACY_HTML).read_bytes()
    (tmp_path / PRIVACY_JSON).write_bytes((site / PRIVACY_JSON).read_bytes())
    assert rebuild(tmp_path).read_bytes() == page
    check_page(tmp_path)
    again = (site / PRIVACY_JSON).read_bytes()
    write_page(site, INQUIRY)
    assert (site / PRIVACY_JSON).read_bytes() == again
    (tmp_path / PRIVACY_HTML).write_bytes(page.replace(b"MET", b"MEt", 1))
    with pytest.raises(VerificationFailed, match=r"privacy\.json"):
        check_page(tmp_path)


def test_the_page_needs_no_network_and_no_script(documents: list[Document]) -> None:
    for document in documents:
        html = render(document)
        page = Page(html)  # fails on tags that do not match
        assert not re.search(r"https?://|<script|<link|<iframe|<img|@import|url\(|\son\w+=", html)
        links = {link["href"] for link in page.all("a")}
        assert links <= {f"#{element['id']}" for _, element in page.elements if "id" in element}
        policy = next(meta for meta in page.all("meta") if meta.get("http-equiv"))
        assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_payload_is_on_the_page_with_its_digest(site: Path, documents: list[Document]) -> None:
    html = (site / PRIVACY_HTML).read_text()
    listed = documents[0]["egress"]["list"]
    assert len(listed) == 4
    assert all(f"title='{row['sha256']}'" in html for row in listed)


# --- the record -----------------------------------------------------------------------------------------


def test_an_older_run_is_told_apart_from_the_newest(repeated: Path) -> None:
    newest = document_of(read_record(repeated, Inquiry()))
    older = document_of(read_record(repeated, Inquiry(run="run-1")))
    assert (newest["run"]["id"], older["run"]["id"]) == ("run-2", "run-1")
    assert (newest["egress"]["payloads"], older["egress"]["payloads"]) == (1, 2)
    assert newest["budget"]["stages"][0]["stage"] == "before this run"
    assert older["budget"]["stages"][0]["stage"] == "adapt"
    spent = {d["run"]["id"]: d["budget"]["epsilons"][0] for d in (newest, older)}
    assert spent["run-1"]["run"] > spent["run-2"]["run"]
    assert spent["run-1"]["total"] == spent["run-2"]["total"] > spent["run-1"]["run"]
    with pytest.raises(ArtefactError, match="run-1, run-2"):
        read_record(repeated, Inquiry(run="run-7"))


def test_an_audit_without_a_claim_checks_nothing(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    path = tmp_path / "site" / "audits" / "artefact-adapter.json"
    value = {**json.loads(path.read_text()), "assignment": "split", "verdict": "NO CLAIM"}
    path.write_text(json.dumps({**value, "right": 0, "guesses": 0, "lower": 0.0, "ceiling": 0.0}))
    document = document_of(read_record(tmp_path / "site", INQUIRY))
    status = {item["name"]: item["status"] for item in document["hazards"]}
    assert status["No attack found more than is claimed"] == "NOT CHECKED"
    assert document["plots"]["audits"] is None
    assert "no bound follows from it" in document["statement"][-1]["text"]
    assert "no coin decided who was used" in render(document)


def test_damage_is_an_error_and_absence_is_not(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    audit = folder / "audits" / "artefact-adapter.json"
    whole = audit.read_text()
    audit.write_text(whole.replace('"auc"', '"auk"'))
    with pytest.raises(ArtefactError, match="artefact-adapter"):
        document_of(read_record(folder, INQUIRY))
    audit.write_text(whole.replace("0.134", "0.1"))
    assert document_of(read_record(folder, INQUIRY))["artefacts"][0]["booked"] is False
    for path in (
        audit,
        folder / "audits" / "rehearsal.json",
        folder / "witnessed.jsonl",
        folder / "plan.json",
    ):
        path.unlink()
    document = document_of(read_record(folder, INQUIRY))
    assert (document["artefacts"], document["rehearsal"]["figures"]) == ([], None)
    assert document["rehearsal"]["passed"] is True  # the ledger still knows
    ledger = folder / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b"adapt", b"adopt", 1))
    with pytest.raises(VerificationFailed):
        read_record(folder, INQUIRY)
    with pytest.raises(ArtefactError, match="seen no run"):
        read_record(tmp_path, Inquiry())


def test_the_run_plan_of_another_version_is_read_as_far_as_the_page_needs(tmp_path: Path) -> None:
    bare_site(tmp_path / "quay")
    path = tmp_path / "quay" / "plan.json"
    path.write_text(json.dumps({**RUN_PLAN, "something": {"new": 1}}))
    assert read_record(tmp_path / "quay", Inquiry()).run_id == RUN_PLAN["run_id"]
    path.write_text(json.dumps({"run_id": "x"}))
    with pytest.raises(ArtefactError, match=r"plan\.json"):
        read_record(tmp_path / "quay", Inquiry())
