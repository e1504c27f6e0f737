"""Screening: a good update is admitted, a fault is named in fixed words, a rejection changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError
from common.guard_api import Metric, SiteCounts, SiteMetrics, StudentNote
from common.plan import PayloadSpec, Stage, TensorSpec
from common.style import STYLE_BOUNDS, StyleGroup, StyleSummary
from server.screening import Sent, admit, admit_metrics, admit_note, admit_style

SPEC = PayloadSpec(Stage.adapt, [TensorSpec("l.lora_A", [2, 3]), TensorSpec("l.lora_B", [4, 2])], [], 1000)
ADAPTER = Adapter(
    {
        "l.lora_A": torch.ones(2, 3), "l.lora_B": torch.zeros(4, 2),
        "l.folded_A": torch.ones(1, 3), "l.folded_B": torch.ones(4, 1),
    },
    "aa",
    2,
    "lite",
)  # fmt: skip
SENT = Sent.of(ADAPTER, "nonce")
GOOD = AdapterUpdate(ADAPTER.trained(), 5.0, ADAPTER.digest)


def screen(update: AdapterUpdate, nonce: str = "nonce", seen: set[str] | None = None) -> tuple[str, ...]:
    """The reasons of a rejection, empty for an admission."""
    seen = set() if seen is None else seen
    before = set(seen)
    try:
        admit(update, nonce, SENT, SPEC, 1000, seen)
    except ArtefactError as error:
        assert seen == before, "a rejection changes nothing"
        return error.faults
    assert seen == before | {nonce}
    return ()


def with_tensors(**tensors: torch.Tensor | None) -> AdapterUpdate:
    found = {**GOOD.adapter.tensors, **{name.replace("__", "."): t for name, t in tensors.items()}}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    return replace(GOOD, adapter=replace(GOOD.adapter, tensors=kept))


def test_a_good_update_is_admitted_once() -> None:
    seen: set[str] = set()
    assert screen(GOOD, seen=seen) == ()
    assert screen(GOOD, seen=seen) == ("a replayed answer",)


REJECTED: dict[str, Callable[[], AdapterUpdate]] = {
    "a value that is not finite": lambda: with_tensors(l__lora_A=torch.full((2, 3), math.nan)),
    "an extra tensor": lambda: with_tensors(patient_17=torch.ones(1)),
    "a missing tensor": lambda: with_tensors(l__lora_B=None),
    "a wrong shape": lambda: with_tensors(l__lora_A=torch.ones(3, 2)),
    "a wrong dtype": lambda: with_tensors(l__lora_A=torch.ones(2, 3).bfloat16()),
    "another base model": lambda: replace(GOOD, adapter=replace(GOOD.adapter, base_sha256="bb")),
    "another preset": lambda: replace(GOOD, adapter=replace(GOOD.adapter, preset="base")),
    "another rank": lambda: replace(GOOD, adapter=replace(GOOD.adapter, rank=3)),
    "started from another adapter than it was sent": lambda: replace(GOOD, started_from="cc"),
    "a weight that is not above 0": lambda: replace(GOOD, weight=0.0),
    "a weight above the cap": lambda: replace(GOOD, weight=1001.0),
    "values of an absurd size": lambda: with_tensors(l__lora_B=torch.full((4, 2), 1e6)),
}


@pytest.mark.parametrize("reason", REJECTED)
def test_each_fault_is_named(reason: str) -> None:
    assert screen(REJECTED[reason]()) == (reason,)


def test_folded_factors_are_never_sent_up() -> None:
    assert screen(replace(GOOD, adapter=ADAPTER)) == ("an extra tensor",)


def test_an_answer_to_another_message_is_rejected() -> None:
    assert screen(GOOD, nonce="other") == ("an answer to another message",)


def test_a_weight_that_is_no_number_is_rejected() -> None:
    assert screen(replace(GOOD, weight=math.nan)) == ("a weight that is not above 0",)


def test_all_faults_are_named_at_once_and_no_name_of_the_sites_is_repeated() -> None:
    bad = replace(with_tensors(patient_17=torch.full((1,), math.nan)), weight=-1.0, started_from="patient-17")
    faults = screen(bad)
    assert len(faults) == 4
    assert not any("patient" in fault for fault in faults)


MIDDLE = [(low + high) / 2 for low, high in STYLE_BOUNDS]


@pytest.mark.parametrize(
    ("group", "count", "reason"),
    [
        (StyleGroup(1.0, MIDDLE, [0.1] * 14), 1, ""),
        (StyleGroup(1.0, MIDDLE, [0.1] * 14), 6, "no style group, or too many"),
        (StyleGroup(1.0, MIDDLE, [0.1] * 14), 0, "no style group, or too many"),
        (StyleGroup(1.0, MIDDLE[:13], [0.1] * 14), 1, "a style of another length"),
        (StyleGroup(1.5, MIDDLE, [0.1] * 14), 1, "a style weight outside 0 to 1"),
        (StyleGroup(1.0, [2.0, *MIDDLE[1:]], [0.1] * 14), 1, "a style number outside its bounds"),
        (StyleGroup(1.0, MIDDLE, [-0.1] * 14), 1, "a style number outside its bounds"),
    ],
)
def test_a_style_keeps_its_bounds(group: StyleGroup, count: int, reason: str) -> None:
    summary = StyleSummary([group] * count)
    if not reason:
        admit_style(summary, 5)
        return
    with pytest.raises(ArtefactError) as caught:
        admit_style(summary, 5)
    assert caught.value.faults == (reason,)


def test_a_site_speaks_for_itself_alone() -> None:
    note = StudentNote("a", "unet-xs", 10, "ab", 1.0, 2.0, 3, 2, 1)
    counts = SiteCounts(1, 1, 1, 0, 0)
    admit_note(note, "a")
    admit_metrics(SiteMetrics("a", counts), "a")
    admit_metrics(SiteMetrics("a", None, [Metric("m", "dice", "x", 0.5, None, 3, noise_scale=0.1)]), "a")
    with pytest.raises(ArtefactError):
        admit_note(note, "b")
    with pytest.raises(ArtefactError):
        admit_metrics(SiteMetrics("a", counts), "b")


def test_impossible_numbers_are_rejected() -> None:
    with pytest.raises(ArtefactError):
        admit_note(StudentNote("a", "unet-xs", 10, "ab", -1.0, 2.0, 3, 2, -1), "a")
    for copies in ((-1, 0.0), (1, 1.5)):
        with pytest.raises(ArtefactError, match="copy rate" if copies[0] > 0 else "count"):
            admit_note(StudentNote("a", "unet-xs", 10, "ab", 1.0, 2.0, 3, 2, 1, *copies), "a")
    silent = Metric("m", "dice", "x", 0.5, None, 3, noise_scale=0.0)
    for metric in (Metric("m", "dice", "x", None, None, 3), Metric("m", "dice", "x", 0.5, None, -3), silent):
        with pytest.raises(ArtefactError):
            admit_metrics(SiteMetrics("a", SiteCounts(1, 1, 1, 0, 0), [metric]), "a")
    with pytest.raises(ArtefactError):
        admit_metrics(SiteMetrics("a", SiteCounts(1, -1, 1, 0, 0)), "a")
