"""The exam's items of the guard and the rounds, with few repetitions: 15, 16, 21, 25, 26, 30 and 35."""

from __future__ import annotations

from simulations.privacy_exam import copies, guard, refusals, rounds, traffic


def test_what_leaves_is_what_noised_steps_made() -> None:
    verdict = guard.item_15(1)
    assert verdict.passed, verdict


def test_messages_hold_public_values_and_noised_steps_alone() -> None:
    verdict = traffic.item_16(1, 3)
    assert verdict.passed, verdict


def test_a_plan_over_a_cap_is_refused_before_any_data_file_is_opened() -> None:
    verdict = refusals.item_21()
    assert verdict.passed, verdict


def test_more_than_allowed_is_refused_whoever_asks_and_however() -> None:
    verdict = guard.item_25(2)
    assert verdict.passed, verdict


def test_a_refusal_does_not_tell_whether_a_patient_is_there() -> None:
    verdict = refusals.item_26(10)
    assert verdict.passed, verdict


def test_rounds_without_a_change_and_without_an_answer_crash_nothing() -> None:
    verdict = rounds.item_35(["exact_split"])
    assert verdict.passed, verdict


def test_copies_are_found_and_a_generator_that_learned_by_heart_is_blocked() -> None:
    verdict = copies.item_30(copies.Counts(patients=30, images=40, planted=3, remembered=8, steps=150))
    assert verdict.passed, verdict
