"""The policy: what it refuses, by which field, and the terms that remain."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import ConfigError, PolicyRefusal
from common.plan import Stage
from common.privacy.accounting import epsilon
from common.privacy.keys import public_key
from common.privacy.plan import PlanSettings, PrivacyPlan, Sampling
from common.privacy.policy import (
    MetricRules,
    Policy,
    StageRule,
    StageRules,
    load_signed,
    policy_from,
    read_policy,
    sign_policy,
    template,
)
from common.privacy.published import PublishedMetrics
from common.privacy.terms import Asked, AskedPayload, agree, check_in_force
from simulations.privacy_exam import record as exam
from simulations.privacy_exam.site import PLAN, policy_for

OFFICER = Ed25519PrivateKey.generate()
POLICY = policy_for(OFFICER)
ASKED = Asked(
    rounds=4,
    sites=["harbour", "hill", "lake"],
    runs=["adapt"],
    sends=["adapt"],
    plans={"adapt": PLAN},
    outbound=[AskedPayload("adapt", "decoder.head.weight", "float32", 4000)],
    base_models=["b" * 64],
    code=("c" * 64, ""),
    guard_version="0.1.0",
)


def test_policies_that_must_not_be_in_force_are_refused() -> None:
    verdict = exam.item_24()
    assert verdict.passed, verdict


def test_what_the_policy_allows_becomes_the_terms() -> None:
    terms = agree(POLICY, ASKED)
    assert terms.policy_sha256 == POLICY.digest
    assert terms.max_epsilon_per_run == pytest.approx(PLAN.epsilon())
    assert terms.max_epsilon_per_run < POLICY.max_epsilon_per_run
    assert (terms.rounds, terms.stages) == (4, {"adapt": "dp_required"})
    assert terms.noise_multiplier == {"adapt": 2.0}
    assert agree(POLICY, replace(ASKED, rounds=2)).digest != terms.digest


def looser(**changes: object) -> PrivacyPlan:
    settings = PlanSettings(60, 0.1, 4)
    noise = changes.pop("noise_multiplier", 2.0)
    return PrivacyPlan.make(replace(settings, **changes), noise)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("stages.style", {"runs": ["adapt", "style"]}),
        ("stages.adapt", {"plans": {}}),
        ("stages.tuning", {"private_tuning": True}),
        ("sampling", {"plans": {"adapt": looser(sampling=Sampling.shuffled)}}),
        ("delta", {"plans": {"adapt": looser(delta=1e-3)}}),
        ("min_noise_multiplier", {"plans": {"adapt": looser(noise_multiplier=0.5)}}),
        ("min_patients", {"plans": {"adapt": looser(patients=39)}}),
        ("max_images_per_unit", {"plans": {"adapt": looser(max_images_per_patient=9)}}),
        ("max_epsilon_per_run", {"plans": {"adapt": looser(noise_multiplier=0.8, steps=60)}}),
        ("payload.outbound", {"outbound": [AskedPayload("adapt", "encoder.ema", "float32", 4)]}),
        ("payload.outbound", {"outbound": [AskedPayload("adapt", "decoder.x", "float64", 4)]}),
        ("payload.outbound", {"outbound": [AskedPayload("adapt", "decoder.x", "float32", 1 << 21)]}),
        ("payload.outbound", {"outbound": [AskedPayload("style", "decoder.x", "float32", 4)]}),
        ("payload.base_model_sha256", {"base_models": ["e" * 64]}),
        ("payload.a_matrix_sha256", {"a_matrices": ["e" * 64]}),
        ("metrics.allowed", {"metrics": ["mean_dice"]}),
        ("stages.evaluate", {"runs": ["adapt", "evaluate"], "published": PublishedMetrics(0.1, 1, 100)}),
        ("federation.min_sites", {"sites": ["harbour", "hill"]}),
        ("federation.allowed_sites", {"sites": ["harbour", "hill", "stranger"]}),
        ("federation.max_rounds", {"rounds": 5}),
        ("code.allowed_fab_sha256", {"code": ("e" * 64, "")}),
        ("code.guard_version", {"guard_version": "0.0.1"}),
    ],
)
def test_whatever_is_looser_than_the_policy_is_refused_by_its_field(
    field: str, change: dict[str, object]
) -> None:
    with pytest.raises(PolicyRefusal) as caught:
        agree(POLICY, replace(ASKED, **change))  # type: ignore[arg-type]
    assert caught.value.field == field
    assert caught.value.exit_code == 20
    text = str(caught.value).replace("sha256", "")
    assert not any(character.isdigit() for character in text), "codes and fields, no number"


def test_other_stricter_policies_are_obeyed() -> None:
    secure = policy_from(json.loads(POLICY.text()), "p")
    secure = replace(secure, federation=replace(secure.federation, require_secure_aggregation=True))
    with pytest.raises(PolicyRefusal, match="require_secure_aggregation"):
        agree(secure, ASKED)
    signed = replace(POLICY, code=replace(POLICY.code, allowed_signers=["k"]))
    with pytest.raises(PolicyRefusal, match="allowed_signers"):
        agree(signed, ASKED)
    local = replace(POLICY, stages=replace(POLICY.stages, adapt="local_only"))  # type: ignore[arg-type]
    with pytest.raises(PolicyRefusal, match="nothing of this stage may leave"):
        agree(local, ASKED)


OPEN = replace(
    POLICY,
    stages=replace(POLICY.stages, evaluate=StageRule.dp_required),
    metrics=MetricRules(per_site=True, min_patients=100, epsilon_each=0.1, allowed=["mean_dice"]),
)
MEASURED = replace(
    ASKED,
    runs=["adapt", "evaluate"],
    sends=["adapt", "evaluate"],
    metrics=["mean_dice"],
    published=PublishedMetrics(0.1, 3, 100),
)


def test_numbers_with_noise_become_part_of_the_terms() -> None:
    """Those who train and those who test are others: the run's epsilon is the larger of the two."""
    assert agree(OPEN, MEASURED).metrics == ["mean_dice"]
    assert agree(OPEN, MEASURED).max_epsilon_per_run == pytest.approx(PLAN.epsilon())
    many = PublishedMetrics(0.1, 30, 100)
    spent = agree(OPEN, replace(MEASURED, published=many)).max_epsilon_per_run
    assert spent == pytest.approx(epsilon([many.event], 1e-5))
    assert PLAN.epsilon() < spent < OPEN.max_epsilon_per_run


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("metrics.allowed", {"metrics": ["mean_dice", "hd95"]}),
        ("metrics.epsilon_each", {"published": PublishedMetrics(0.11, 3, 100)}),
        ("metrics.min_patients", {"published": PublishedMetrics(0.1, 3, 99)}),
        ("max_epsilon_per_run", {"published": PublishedMetrics(0.1, 120, 100)}),
        ("stages.evaluate", {"published": None}),
    ],
)
def test_numbers_that_are_looser_than_the_policy_are_refused_by_their_field(
    field: str, change: dict[str, object]
) -> None:
    with pytest.raises(PolicyRefusal) as caught:
        agree(OPEN, replace(MEASURED, **change))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_rule_by_which_nothing_could_pass_is_a_fault() -> None:
    plain = json.loads(POLICY.text())
    plain["payload"]["inbound"] = [{"name": "decoder.*", "max_bytes": 8, "max_l2": 0.0}]
    with pytest.raises(ConfigError, match=r"payload\.inbound\[0\]: max_bytes and max_l2 above 0"):
        policy_from(plain, "p")


def test_every_field_that_says_no_is_named_at_once() -> None:
    with pytest.raises(PolicyRefusal) as caught:
        agree(POLICY, replace(ASKED, rounds=9, sites=["harbour"], base_models=["e" * 64]))
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "payload.base_model_sha256", "federation.min_sites", "federation.max_rounds",
    ]  # fmt: skip


def test_a_policy_denies_by_default() -> None:
    nothing = policy_from(
        template("harbour", "A. Officer", public_key(OFFICER), datetime.now(UTC)), "template"
    )
    assert {str(rule) for rule in asdict(nothing.stages).values()} == {"forbidden"}
    with pytest.raises(PolicyRefusal) as caught:
        agree(nothing, ASKED)
    assert len(caught.value.faults) >= 6


def test_each_stage_of_a_run_plan_has_its_rule() -> None:
    assert {item.name for item in fields(StageRules)} == {*Stage, "tuning"} - {"propose", "shared_student"}


def test_a_stage_that_a_policy_has_no_rule_for_is_forbidden() -> None:
    """A student's weights are never noised, so no officer can allow their rounds."""
    asked = replace(ASKED, runs=[*ASKED.runs, "shared_student"], sends=[*ASKED.sends, "shared_student"])
    with pytest.raises(PolicyRefusal) as caught:
        agree(POLICY, asked)
    assert caught.value.faults == ("stages.shared_student: this stage may not run here",)


def test_a_draft_is_read_with_every_fault_at_once(tmp_path: Path) -> None:
    draft = tmp_path / "policy.yaml"
    plain = json.loads(POLICY.text()) | {"dleta": 1, "unit": "image", "version": 0, "issued": "soon"}
    draft.write_text(yaml.safe_dump(plain))
    with pytest.raises(ConfigError) as caught:
        read_policy(draft)
    text = str(caught.value)
    assert all(word in text for word in ("dleta", "unit", "version", "issued"))


def test_a_yaml_draft_and_its_signed_form_are_one_policy(tmp_path: Path) -> None:
    draft = tmp_path / "policy.yaml"
    text = yaml.safe_dump(json.loads(POLICY.text())).replace("delta: 1.0e-05", "delta: 1e-5")
    draft.write_text(re.sub(r"(issued|expires): '(.*)'", r"\1: \2", text))
    assert "delta: 1e-5" in draft.read_text()
    policy = read_policy(draft)
    assert policy == POLICY
    assert load_signed(sign_policy(policy, tmp_path, OFFICER), public_key(OFFICER)) == policy


def test_a_policy_of_another_officer_cannot_be_signed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="key_id"):
        sign_policy(POLICY, tmp_path, Ed25519PrivateKey.generate())


def test_a_missing_signature_is_refused(tmp_path: Path) -> None:
    path = sign_policy(POLICY, tmp_path, OFFICER)
    path.with_name("policy.json.sig").unlink()
    with pytest.raises(PolicyRefusal):
        load_signed(path, public_key(OFFICER))


def test_a_policy_before_its_time_is_refused() -> None:
    with pytest.raises(PolicyRefusal) as caught:
        check_in_force(POLICY, datetime.now(UTC) - timedelta(days=2))
    assert caught.value.field == "issued"


def test_a_policy_without_values_is_none() -> None:
    with pytest.raises(ConfigError) as caught:
        policy_from({}, "nothing")
    assert len(caught.value.faults) >= 4
    assert Policy().text() == Policy().text()
