"""The accounting's figures: the exam's items 1 to 9 with few repetitions, and the plan's guarantees."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ArtefactError, ConfigError
from common.privacy.accounting import epsilon, rdp_epsilon, tuned_epsilon
from common.privacy.attacker import crude_rate, true_positive_rates
from common.privacy.events import LEAST_NOISE, Event, Mechanism, gathered
from common.privacy.plan import PlanSettings, PrivacyPlan, Sampling, Unit, calibrate
from common.privacy.planner import Question, plan_document, settle, warnings
from simulations.privacy_exam import accounting as exam
from tests.architecture.sources import ROOT, modules, name_of

SETTINGS = PlanSettings(patients=100, sample_rate=0.08, steps=130, delta=1e-3)


def test_epsilon_is_that_of_dp_accounting_and_never_below() -> None:
    verdict = exam.item_1(2)
    assert verdict.passed, verdict


def test_prv_agrees_and_rdp_lies_above() -> None:
    verdict = exam.item_2(1)
    assert verdict.passed, verdict


def test_stages_compose_jointly_and_in_any_order() -> None:
    verdict = exam.item_3()
    assert verdict.passed, verdict


def test_groups_are_charged_as_a_mixture_and_image_level_plans_are_refused() -> None:
    verdict = exam.item_5(3, 1e-2)
    assert verdict.passed, verdict


def test_a_shuffled_loader_is_detected_and_charged_without_amplification() -> None:
    verdict = exam.item_6()
    assert verdict.passed, verdict


def test_replace_one_is_exact_at_three_deltas_and_a_large_delta_is_refused() -> None:
    verdict = exam.item_7()
    assert verdict.passed, verdict


def test_tuning_is_that_of_repeat_and_select() -> None:
    verdict = exam.item_8()
    assert verdict.passed, verdict


def test_the_attackers_curve_is_never_below_the_closed_form() -> None:
    verdict = exam.item_9()
    assert verdict.passed, verdict


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=8), st.randoms())
def test_gathering_forgets_order_and_division(noises: list[float], shuffle: object) -> None:
    events = [Event(noise, 0.1, 3) for noise in noises]
    pieces = [replace(event, count=1) for event in events for _ in range(event.count)]
    shuffle.shuffle(pieces)  # type: ignore[attr-defined]
    assert gathered(pieces) == gathered(events)


def test_the_published_example_of_one_run() -> None:
    event = Event(1.5, 0.08, 130)
    assert epsilon([event], 1e-3) == pytest.approx(2.11, abs=0.005)
    assert epsilon([event], 1e-5) == pytest.approx(3.16, abs=0.005)
    assert [round(rate, 3) for rate in true_positive_rates([event])] == [0.009, 0.052, 0.273]
    assert crude_rate(2.11, 1e-3, 0.01) > 0.052 * 1.5


def test_a_release_without_noise_has_no_guarantee() -> None:
    released = [Event(1.5, 0.08, 130), Event(0.0, 1.0, 1)]
    assert math.isinf(epsilon(released, 1e-5))
    assert true_positive_rates(released) == [1.0, 1.0, 1.0]
    assert crude_rate(math.inf, 1e-5, 0.01) == 1.0


def test_noise_too_small_to_account_for_counts_as_none() -> None:
    """Whoever asks for it would otherwise have the site fill its memory."""
    assert math.isinf(epsilon([Event(0.99 * LEAST_NOISE, 0.5, 3)], 1e-5))
    assert math.isinf(epsilon([Event(1e-9, 1.0, 3)], 1e-5))


def test_what_renyi_accounting_does_not_know_is_said() -> None:
    group = Event(1.0, 0.1, 5).of_group(2)
    assert rdp_epsilon([group], 1e-5) is None
    with pytest.raises(ConfigError, match="single records"):
        tuned_epsilon([group], 5.0, 1e-5)


@pytest.mark.parametrize(
    ("noise", "rate", "count", "mechanism"),
    [(-1.0, 0.1, 1, "gaussian"), (math.nan, 0.1, 1, "gaussian"), (1.0, 0.0, 1, "gaussian"),
     (1.0, 1.1, 1, "gaussian"), (1.0, 0.1, -1, "gaussian"), (1.0, 0.5, 1, "laplace")],
)  # fmt: skip
def test_an_impossible_event_is_refused(noise: float, rate: float, count: int, mechanism: str) -> None:
    with pytest.raises(ConfigError):
        Event(noise, rate, count, Mechanism(mechanism))


def test_a_plan_cannot_be_made_by_hand() -> None:
    plan = PrivacyPlan.make(SETTINGS, 1.0)
    with pytest.raises(TypeError, match="never by hand"):
        PrivacyPlan(100, 0.08, 130, noise_multiplier=1.0)
    with pytest.raises(TypeError, match="never by hand"):
        replace(plan, noise_multiplier=0.1)


@settings(max_examples=25)
@given(
    patients=st.integers(20, 2000), rate=st.floats(0.01, 1.0), steps=st.integers(1, 500),
    noise=st.floats(0.3, 9.0), clip=st.floats(0.01, 10.0),
)  # fmt: skip
def test_mechanism_and_event_come_from_the_same_fields(
    patients: int, rate: float, steps: int, noise: float, clip: float
) -> None:
    plan = PrivacyPlan.make(PlanSettings(patients, rate, steps, 1e-5, clip), noise)
    event = plan.event()
    assert (event.noise_multiplier * clip, event.sample_rate, event.count) == (
        plan.noise_std, plan.sample_rate, plan.steps,
    )  # fmt: skip
    assert plan.expected_batch == rate * patients
    assert plan.event(1).count == 1
    assert PrivacyPlan.from_json(plan.to_json()) == plan


def test_every_fault_of_a_plan_is_named_at_once() -> None:
    wrong = PlanSettings(0, 2.0, 0, 1e-5, -1.0, 5, "", Unit.image)
    with pytest.raises(ConfigError) as caught:
        PrivacyPlan.make(wrong, 0.0)
    assert len(caught.value.faults) == 7


def test_a_changed_plan_file_is_checked_as_if_new() -> None:
    text = PrivacyPlan.make(SETTINGS, 1.0).to_json()
    for change in ({"noise_multiplier": 0.0}, {"unit": "image"}, {"sampling": "other"}, {"more": 1}):
        with pytest.raises(ArtefactError, match="not a privacy plan"):
            PrivacyPlan.from_json(text | change)


def test_calibration_gives_the_least_noise_within_the_target() -> None:
    target = 4.0
    plan = calibrate(SETTINGS, target)
    assert target * 0.99 <= plan.epsilon() <= target
    assert plan.noise_multiplier == pytest.approx(1.04, abs=0.006)


def test_calibration_leaves_room_for_what_was_spent() -> None:
    history = [Event(1.5, 0.08, 130)]
    plan = calibrate(SETTINGS, 4.0, history)
    assert plan.epsilon(history) <= 4.0 < plan.epsilon() + epsilon(history, 1e-3)
    with pytest.raises(ConfigError, match="spent"):
        calibrate(SETTINGS, 2.0, history)


def test_a_shuffled_plan_is_charged_whole_epochs() -> None:
    plan = PrivacyPlan.make(replace(SETTINGS, sampling=Sampling.shuffled), 1.0)
    assert plan.event() == Event(1.0, 1.0, 10)


def test_the_privacy_core_loads_no_torch() -> None:
    names = [name_of(path) for path in modules() if path.is_relative_to(ROOT / "common" / "privacy")]
    assert "common.privacy.plan" in names
    script = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "from common.privacy.plan import PlanSettings, PrivacyPlan\n"
        "PrivacyPlan.make(PlanSettings(100, 0.1, 10, 1e-4), 2.0).epsilon()\n"
        "print(sorted({'torch', 'opacus', 'flwr', 'omegaconf'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"


def test_the_planner_warns_of_few_patients_and_of_many_local_steps() -> None:
    question = Question(patients=200, batch=50, rounds=10, steps_per_round=8)
    few, many = warnings(question, settle(question, None, 8.0))
    assert "fewer than 400 patients a site" in few
    assert many.startswith("8 noised steps a round")
    enough = Question(patients=400, batch=100, rounds=80, steps_per_round=1)
    assert warnings(enough, settle(enough, None, 8.0)) == []


def test_a_planned_style_summary_is_in_every_figure_of_the_plan() -> None:
    alone = Question(patients=200, batch=50, rounds=10, steps_per_round=1)
    beside = replace(alone, style_epsilon=2.0)
    plan = settle(beside, 2.0, None)
    [style] = beside.beside
    assert epsilon([style], 1e-5) == pytest.approx(2.0, rel=0.01)
    before, after = (plan_document(question, plan, with_prv=False) for question in (alone, beside))
    joint = epsilon([plan.event(), style], 1e-5)
    assert after["epsilon"]["pld"] == after["epsilon_total_after"] == pytest.approx(joint, abs=1e-6)
    assert after.pop("style") == {"epsilon": 2.0, "noise_multiplier": style.noise_multiplier}
    assert set(after) == set(before), "without one the document is as it was"
    for figure in ("epsilon_replace_one", "epsilon_if_shuffled", "epsilon_if_image_level"):
        assert after[figure] > before[figure]
    assert all(after["attacker"][rate] > found for rate, found in before["attacker"].items())


def test_an_epsilon_that_is_asked_for_holds_the_planned_style_too() -> None:
    question = Question(patients=200, batch=50, rounds=10, steps_per_round=1, style_epsilon=1.0)
    plan = settle(question, None, 3.0)
    assert 0.98 * 3.0 <= epsilon([plan.event(), *question.beside], 1e-5) <= 3.0
    assert plan.noise_multiplier > settle(replace(question, style_epsilon=None), None, 3.0).noise_multiplier
