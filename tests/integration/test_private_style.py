"""A style summary in a private run: booked before it is made, paid once, always the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import client.guard
import client.site as site_module
from client.charges import GAUSSIAN
from client.egress import Egress, EgressRefusal
from client.guard import Guard
from client.policy_draft import draft_for
from client.publishing import KEPT_STYLE
from client.site import Site
from common.canonical import canonical_json, sha256_of
from common.errors import BudgetExceeded, DataError
from common.plan import RunPlan, Stage
from common.privacy.accounting import epsilon
from common.privacy.budget import Caps
from common.privacy.bundle import read_bundle
from common.privacy.entries import Context, EntryType
from common.privacy.events import Event
from common.privacy.keys import public_key
from common.privacy.ledger import Ledger
from common.privacy.plan import PlanSettings, one_release
from common.privacy.policy import policy_from, sign_policy
from common.privacy.receipts import ReceiptLine
from common.privacy.report import write_page
from common.privacy.report.record import Inquiry
from common.privacy.verify import Evidence, verify
from common.style import StyleSummary
from server.planning import build_plan
from server.screening import admit_style
from simulations.privacy_exam.hospital import (
    DECLARED,
    DELTA,
    Office,
    agreed,
    entries,
    make_home,
    order,
    private_recipe,
    start,
    without_patient,
)
from simulations.privacy_record import privacy_entry
from tests.integration.test_private_rounds import Killed, opened_files, raiser, receipts

EACH = 2.0
OPEN = ("generator.scope=style", f"privacy.style_epsilon={EACH}", "student.steps=1", "generator.keep_dice=0")
RELEASE = one_release("style", EACH, PlanSettings(DECLARED, 0.5, 2))
EVENT = RELEASE.event()


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return build_plan(private_recipe(*OPEN), "styled")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


def style(guard: Guard, plan: RunPlan) -> StyleSummary:
    return guard.style(order(plan, Stage.style))


def sent(home: Path) -> list[dict[str, Any]]:
    return [line for line in receipts(home) if line["stage"] == "style"]


def faults(home: Path) -> list[str]:
    return verify(read_bundle(home), Evidence()).faults


# --- what is booked, and what leaves --------------------------------------------------------------------


def test_a_style_is_booked_before_it_is_made_and_leaves_with_noise(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, booked = agreed(home, plan), []
    real = client.guard.noised_style

    def watched(patients: Any, size: int, terms: Any, limits: Any, source: Any) -> StyleSummary:
        booked.append([entry.events for entry in entries(home, EntryType.reserve)])
        assert source.secure, "from a seed it could be taken off again"
        assert terms.event() == EVENT, "what makes the noise is what is booked"
        return real(patients, size, terms, limits, source)

    monkeypatch.setattr(client.guard, "noised_style", watched)
    summary = style(guard, plan)
    admit_style(summary, plan.generator.style_groups)
    assert booked == [[[EVENT.triple()]]]
    [reserved] = entries(home, EntryType.reserve)
    assert (reserved.stage, list(reserved.cohort.classes.values())) == ("style", [DECLARED])
    [line], [commit] = sent(home), entries(home, EntryType.commit)
    assert (line["name"], line["mechanism"]) == ("style", GAUSSIAN)
    assert line["sha256"] == commit.payload[0].sha256 == sha256_of(asdict(summary))
    assert line["epsilon_after"] == reserved.epsilon_after["1e-05"]
    found = verify(read_bundle(home), Evidence())
    assert found.faults == []
    [run] = found.facts["runs"]
    assert (run["stage"], run["planned"], run["reserved"], run["ran"]) == ("style", 1, 1, 1)


def test_the_runs_epsilon_is_the_training_and_the_style_composed(home: Path, plan: RunPlan) -> None:
    guard = agreed(home, plan)
    for index in range(plan.rounds):
        guard.adapt(order(plan, Stage.adapt, index), start(plan))
    style(guard, plan)
    found = privacy_entry(guard.site, plan)
    steps = Event(1.5, 0.5, 2)
    assert found.guarantee
    assert found.epsilon == pytest.approx(epsilon([steps, EVENT], DELTA), abs=2e-6)
    assert found.epsilon > epsilon([steps], DELTA) + 0.5
    by_stage = {stage.stage: stage for stage in found.stages}
    assert {name: stage.mechanism for name, stage in by_stage.items()} == {
        "propose": "public", "adapt": "dp_sgd", "style": GAUSSIAN, "student": "public",
    }  # fmt: skip
    told = by_stage["style"]
    assert (told.noise_multiplier, told.sample_rate, told.steps) == (EVENT.noise_multiplier, 1.0, 1)
    assert told.epsilon == pytest.approx(epsilon([EVENT], DELTA), abs=2e-6)
    assert by_stage["adapt"].steps == 2, "the style is no step of the training"
    assert faults(home) == []
    check_page(home, found.epsilon)


def check_page(home: Path, joint: float) -> None:
    """The officer's page says what left, by which mechanism, and counts it."""
    write_page(home, Inquiry())
    page = json.loads((home / "privacy.json").read_text())
    assert page["guarantee"]
    assert page["budget"]["epsilons"][0]["run"] == pytest.approx(joint, abs=1e-3)
    [group] = [group for group in page["egress"]["groups"] if group["stage"] == "style"]
    assert (group["mechanism"], group["protected"]) == ("Gaussian noise on one sum over all patients", True)
    training, styled = page["budget"]["stages"]
    assert (training["stage"], styled["stage"]) == ("adapt", "style")
    assert styled["joint"] == pytest.approx(joint, abs=1e-3)
    assert 0 < styled["added"] < styled["alone"]
    steps = [step for step, _ in page["budget"]["by_step"]["booked"]]
    assert steps == [0, 1, 2, 2], "a style is no noised step"


def test_the_student_paints_with_it_and_its_note_counts_no_image(home: Path, plan: RunPlan) -> None:
    guard = agreed(home, plan)
    summary = style(guard, plan)
    note = guard.train_student(order(plan, Stage.student), start(plan), {"east": summary}, None)
    made = json.loads((home / "synthetic" / "provenance.json").read_text())
    images = plan.generator.images
    assert made["images"] == images, "none is dropped at keep_dice 0"
    assert (note.generated, note.kept, note.dropped_inconsistent) == (images, images, 0)
    assert (note.sha256, note.dropped_copy, note.copy_rate) == ("", None, None)
    assert privacy_entry(guard.site, plan).guarantee


# --- paid once ------------------------------------------------------------------------------------------


def test_a_style_asked_for_again_is_the_same_bytes_and_is_not_paid_again(home: Path, plan: RunPlan) -> None:
    first = style(agreed(home, plan), plan)
    assert style(agreed(home, plan), plan) == first
    assert len(entries(home, EntryType.reserve)) == len(entries(home, EntryType.commit)) == 1
    assert len({line["sha256"] for line in sent(home)}) == 1
    assert len(sent(home)) == 2
    assert faults(home) == []


def test_a_crash_before_it_is_kept_is_not_paid_again(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(client.guard, "noised_style", raiser)
        with pytest.raises(Killed):
            style(agreed(home, plan), plan)
    assert not (home / KEPT_STYLE).exists()
    guard = agreed(home, plan)
    guard.adapt(order(plan, Stage.adapt), start(plan))  # which gives up steps that are lost, and only those
    style(guard, plan)
    assert [entry.stage for entry in entries(home, EntryType.reserve)] == ["style", "adapt"]
    assert not entries(home, EntryType.void_counted)
    assert faults(home) == []


@pytest.mark.parametrize("where", [(Egress, "_write_numbers"), (Ledger, "commit")], ids=lambda one: one[1])
def test_a_crash_between_keeping_and_leaving_sends_what_was_kept(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch, where: tuple[type, str]
) -> None:
    guard = agreed(home, plan)
    with monkeypatch.context() as patch:
        patch.setattr(*where, raiser)
        with pytest.raises(Killed):
            style(guard, plan)
    kept = json.loads((home / KEPT_STYLE).read_text())["kept"]
    assert asdict(style(agreed(home, plan), plan)) == kept
    assert len(entries(home, EntryType.reserve)) == len(entries(home, EntryType.commit)) == 1
    assert len({line["sha256"] for line in sent(home)}) == 1
    assert faults(home) == []


def test_who_came_after_the_charge_is_not_in_the_summary(
    tmp_path: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash, then a new patient in the manifest: what was paid for is of those who paid."""
    whole = make_home(tmp_path)
    few = without_patient(whole, tmp_path / "few")
    site_module._patients.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(client.guard, "noised_style", raiser)
        with pytest.raises(Killed):
            style(agreed(few, plan), plan)
    (few / "data" / "manifest.csv").write_bytes((whole / "data" / "manifest.csv").read_bytes())
    site_module._patients.cache_clear()
    seen: list[int] = []
    real = client.guard.noised_style

    def watched(patients: Any, *rest: Any) -> StyleSummary:
        seen.append(len(patients))
        return real(patients, *rest)

    monkeypatch.setattr(client.guard, "noised_style", watched)
    style(agreed(few, plan), plan)
    assert seen == [DECLARED - 1]


def test_a_style_that_left_and_is_lost_is_not_made_anew(home: Path, plan: RunPlan) -> None:
    guard = agreed(home, plan)
    style(guard, plan)
    (home / KEPT_STYLE).unlink()
    with pytest.raises(DataError, match="is gone") as caught:
        style(guard, plan)
    assert caught.value.border_code == "REFUSED_LOCAL"
    assert len(sent(home)) == 1


def test_nothing_else_leaves_under_the_same_charge(home: Path, plan: RunPlan) -> None:
    guard = agreed(home, plan)
    style(guard, plan)
    kept = json.loads((home / KEPT_STYLE).read_text())
    kept["kept"]["groups"][0]["mean"][0] += 0.0001
    (home / KEPT_STYLE).write_text(canonical_json(kept))
    with pytest.raises(EgressRefusal, match="does not release") as caught:
        style(guard, plan)
    assert caught.value.faults == ("another style summary has left already",)
    assert len(sent(home)) == 1


# --- what the policy says to it -------------------------------------------------------------------------


def allowed(office: Office, rule: str = "dp_required", **changes: Any) -> RunPlan:
    stages = json.loads(office.sign().text())["stages"] | {"style": rule}
    office.sign(stages=stages, **changes)
    return office.plan


def forbidden(office: Office) -> RunPlan:
    return allowed(office, "forbidden")


def local(office: Office) -> RunPlan:
    return allowed(office, "local_only")


def bare(office: Office) -> RunPlan:
    allowed(office)
    return replace(office.plan, privacy=replace(office.plan.privacy, style_epsilon=None))


def over_the_cap(office: Office) -> RunPlan:
    """The training alone would pass."""
    cap = epsilon([Event(1.5, 0.5, 2)], DELTA) + 0.3
    return allowed(office, max_epsilon_per_run=cap)


def less_noise(office: Office) -> RunPlan:
    """Than the policy wants of any release; the training has enough."""
    allowed(office, min_noise_multiplier=1.4)
    dear = replace(office.plan, privacy=replace(office.plan.privacy, style_epsilon=6.0))
    return dear


def more_images(office: Office) -> RunPlan:
    return allowed(office, max_images_per_unit=1)


REFUSED: list[tuple[Callable[[Office], RunPlan], str]] = [
    (forbidden, "stages.style"),
    (local, "stages.style"),
    (bare, "stages.style"),
    (over_the_cap, "max_epsilon_per_run"),
    (less_noise, "min_noise_multiplier"),
    (more_images, "max_images_per_unit"),
]


@pytest.mark.parametrize(("wrong", "field"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_a_style_against_the_policy_is_refused_before_any_data_file_is_opened(
    home: Path, plan: RunPlan, wrong: Callable[[Office], RunPlan], field: str
) -> None:
    asked = wrong(Office(home, plan))
    site_module._patients.cache_clear()
    with opened_files() as opened:
        answer = Guard(Site.open(home)).propose(asked, order(asked, Stage.propose))
    assert (answer.agrees, answer.code, answer.field) == (False, "REFUSED_POLICY", field)
    assert not any((home / "data") in Path(name).parents for name in opened)


def test_a_policy_that_allows_it_lets_it_leave(home: Path, plan: RunPlan) -> None:
    office = Office(home, plan)
    allowed(office)
    style(agreed(home, plan), plan)
    assert verify(read_bundle(home), Evidence(public_key(office.key))).faults == []


def test_a_drafted_policy_lets_exactly_this_style_leave(home: Path, plan: RunPlan) -> None:
    office = Office(home, plan)
    issued = datetime.now(UTC) - timedelta(days=1)
    draft, _ = draft_for(Site.open(home), plan, ("M. Ruiz", public_key(office.key)), issued)
    assert draft["stages"]["style"] == "dp_required"
    assert draft["max_epsilon_per_run"] == pytest.approx(
        epsilon([Event(1.5, 0.5, 2), EVENT], DELTA), abs=0.01
    )
    sign_policy(policy_from(draft, "draft"), home, office.key)
    style(agreed(home, plan), plan)
    dearer = replace(plan, privacy=replace(plan.privacy, style_epsilon=1.2 * EACH))
    answer = Guard(Site.open(home)).propose(dearer, order(dearer, Stage.propose))
    assert (answer.agrees, answer.field) == (False, "max_epsilon_per_run")


def test_a_run_whose_steps_alone_fit_the_budget_is_refused_for_its_style(home: Path, plan: RunPlan) -> None:
    """Before it begins, by the cap on everything: the run's own cap has room."""
    office = Office(home, plan)
    cap = epsilon([Event(1.5, 0.5, 2)], DELTA) + 0.3
    allowed(office, max_epsilon_total=cap, max_epsilon_per_year=cap)
    answer = Guard(Site.open(home)).propose(plan, order(plan, Stage.propose))
    assert (answer.agrees, answer.code) == (False, BudgetExceeded.border_code)


def test_a_site_that_shares_no_style_refuses(home: Path, plan: RunPlan) -> None:
    guard = Guard(Site.open(home))
    shy = Guard(replace(guard.site, policy=replace(guard.site.policy, allow_style=False)))
    answer = shy.propose(plan, order(plan, Stage.propose))
    assert (answer.agrees, answer.field) == (False, "allow_style")


# --- what the verifier finds ----------------------------------------------------------------------------

RUN = Context("styled", "d" * 64)


def ledger_of(folder: Path, *, planned: bool = True) -> Ledger:
    found = Ledger.create(folder, "east", Caps(DELTA))
    plans = {"style": RELEASE.to_json()} if planned else {}
    found.record(EntryType.plan, RUN, {"plans": plans})
    return found


def test_a_style_whose_entry_is_missing_is_found(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "site")
    line = ReceiptLine("east", "style", 0, "style", 10, "a" * 64, GAUSSIAN, 2.0)
    (ledger.folder / "receipts.jsonl").write_text(canonical_json(asdict(line)) + "\n")
    ledger.record(EntryType.checkpoint, RUN, {})
    assert faults(ledger.folder) == ["1 receipts name a mechanism, and no entry of the ledger pays for it"]


def test_a_style_that_an_entry_of_another_stage_pays_for_is_found(home: Path, plan: RunPlan) -> None:
    """Everything agrees but the stage: a step of the training pays for no style."""
    guard = agreed(home, plan)
    guard.adapt(order(plan, Stage.adapt), start(plan))
    path = home / "receipts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    moved = [line | {"stage": "style"} if line["mechanism"] == "dp_sgd" else line for line in lines]
    path.write_text("".join(canonical_json(line) + "\n" for line in moved))
    assert any("no entry of the ledger pays" in fault for fault in faults(home))


@pytest.mark.parametrize(("noise", "count"), [(EVENT.noise_multiplier / 2, 1), (EVENT.noise_multiplier, 2)])
def test_less_noise_or_more_summaries_than_planned_are_found(
    tmp_path: Path, noise: float, count: int
) -> None:
    ledger = ledger_of(tmp_path / "site")
    ledger.reserve(RUN, "style", ["a", "b"], [Event(noise, 1.0, count)])
    assert faults(ledger.folder) == ["run styled, stage style: more was reserved than its plan has"]


def test_a_style_that_no_plan_names_is_found(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "site", planned=False)
    ledger.reserve(RUN, "style", ["a"], [EVENT])
    assert faults(ledger.folder) == ["entry 2: reserves for a stage that no plan names"]


def test_an_altered_entry_is_found(home: Path, plan: RunPlan) -> None:
    style(agreed(home, plan), plan)
    path = home / "ledger.jsonl"
    text = path.read_text()
    noise = json.dumps(EVENT.noise_multiplier)
    assert text.count(f"[[{noise},") == 2, "what is reserved, and what ran"
    path.write_text(text.replace(f"[[{noise},", "[[9.5,"))
    assert not verify(read_bundle(home), Evidence()).holds


def test_without_style_epsilon_the_summary_leaves_as_it_is_and_the_guarantee_is_gone(home: Path) -> None:
    bare_plan = build_plan(private_recipe(OPEN[0], "privacy.release_metrics=true"), "bare")
    guard = agreed(home, bare_plan)
    style(guard, bare_plan)
    assert sent(home)[0]["mechanism"] == "none"
    assert not privacy_entry(guard.site, bare_plan).guarantee


def test_charged_are_those_whom_the_entry_names(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "site")
    number = ledger.reserve(RUN, "style", ["a", "b"], [EVENT])
    ledger.reserve(RUN, "adapt", ["b", "c"], [Event(1.0, 0.5, 1)])
    assert ledger.charged(number, ["a", "b", "c", "d"]) == {"a", "b"}
