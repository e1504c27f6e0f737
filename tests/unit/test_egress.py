"""The one exit: exactly what the plan lists, finite, and on a receipt before it leaves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.egress import Egress, EgressRefusal
from common.adapter import Adapter, AdapterUpdate
from common.canonical import sha256_of
from common.errors import ArtefactError
from common.guard_api import Metric, SiteCounts, SiteMetrics
from common.plan import PayloadSpec, RunPlan, Stage, TensorSpec, Variant
from common.privacy.heads import without_empty_head

BASE = "0f" * 32
NUMBERS = ["weight", "started_from", "mechanism", "losses"]


@pytest.fixture
def plan(smoke_plan: RunPlan) -> RunPlan:
    specs = [TensorSpec("a.lora_A", [2, 3]), TensorSpec("head", [4])]
    metrics = smoke_plan.payload(Stage.evaluate)
    assert metrics is not None
    variants = [Variant("lite", 2, [PayloadSpec(Stage.adapt, specs, NUMBERS, 1000)])]
    return replace(smoke_plan, models={"fake": BASE}, variants=variants, payloads=[metrics])


@pytest.fixture
def egress(plan: RunPlan, tmp_path: Path) -> Egress:
    return Egress("site-1", tmp_path, plan)


def update(**tensors: torch.Tensor | None) -> AdapterUpdate:
    found: dict[str, torch.Tensor | None] = {"a.lora_A": torch.ones(2, 3), "head": torch.ones(4)}
    found |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    return AdapterUpdate(Adapter(kept, BASE, 2, "lite"), 5.0, "ab" * 32, losses=(1.0, 0.5))


def receipts(egress: Egress) -> list[dict[str, Any]]:
    if not egress.receipts.exists():
        return []
    return [json.loads(line) for line in egress.receipts.read_text().splitlines()]


def test_an_update_leaves_with_two_receipts(egress: Egress) -> None:
    released = egress.release_update(Stage.adapt, 3, update())
    adapter, numbers = receipts(egress)
    assert adapter == {
        "site": "site-1", "stage": "adapt", "round": 3, "name": "adapt.adapter", "bytes": 40,
        "sha256": released.adapter.digest, "mechanism": "none", "epsilon_after": None,
    }  # fmt: skip
    sent = {"weight": 5.0, "started_from": "ab" * 32, "mechanism": "none", "losses": [1.0, 0.5]}
    assert (numbers["name"], numbers["sha256"]) == ("adapt.numbers", sha256_of(sent))


REFUSED: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "an extra tensor": ({"images": torch.ones(9)}, "images: not on the plan's list"),
    "a missing tensor": ({"head": None}, "head: missing"),
    "a wrong shape": ({"head": torch.ones(5)}, "head: shape [5], the plan says [4]"),
    "a wrong dtype": ({"head": torch.ones(4).double()}, "head: float64, the plan says float32"),
    "a NaN": ({"head": torch.full((4,), math.nan)}, "head: NONFINITE values"),
    "an infinity": ({"head": torch.full((4,), math.inf)}, "head: NONFINITE values"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_tensor_that_is_not_the_plans_stays(egress: Egress, fault: str) -> None:
    tensors, words = REFUSED[fault]
    with pytest.raises(EgressRefusal) as caught:
        egress.release_update(Stage.adapt, 0, update(**tensors))
    assert caught.value.faults == (words,)
    assert receipts(egress) == [], "what does not leave has no receipt"


def test_all_faults_are_named_at_once(egress: Egress) -> None:
    bad = update(images=torch.ones(9), head=torch.full((5,), math.nan))
    bad = replace(bad, weight=math.nan, adapter=replace(bad.adapter, base_sha256="ee" * 32))
    with pytest.raises(EgressRefusal) as caught:
        egress.release_update(Stage.adapt, 0, bad)
    assert len(caught.value.faults) == 5


@pytest.mark.parametrize("change", [{"preset": "base"}, {"rank": 3}])
def test_an_adapter_of_another_preset_or_rank_than_agreed_stays(
    egress: Egress, change: dict[str, Any]
) -> None:
    wrong = replace(update(), adapter=replace(update().adapter, **change))
    with pytest.raises(EgressRefusal) as caught:
        egress.release_update(Stage.adapt, 0, wrong)
    assert caught.value.faults == ("the adapter is of another preset or rank than the site agreed to",)
    assert not receipts(egress)


def test_a_payload_larger_than_the_plan_says_stays(plan: RunPlan, tmp_path: Path) -> None:
    own = plan.variants[0]
    tight = replace(plan, variants=[replace(own, payloads=[replace(own.payload(0), max_bytes=100)])])
    with pytest.raises(EgressRefusal, match="bytes, the plan allows 100"):
        Egress("site-1", tmp_path, tight).release_update(Stage.adapt, 0, update())


def test_a_stage_without_a_payload_lets_nothing_out(egress: Egress) -> None:
    with pytest.raises(EgressRefusal, match="names no payload for stage generator"):
        egress.release_update(Stage.generator, 0, update())


def test_what_may_leave_depends_on_whose_turn_it_is(plan: RunPlan, tmp_path: Path) -> None:
    """Two lists in turn: round 2 is the first one's again, and the other one's payload stays."""
    only_a = plan.variants[0].payload(0)
    only_b = replace(only_a, tensors=[TensorSpec("a.lora_B", [3, 2]), only_a.tensors[1]])
    turned = replace(plan, variants=[replace(plan.variants[0], payloads=[only_b, only_a])])
    egress = Egress("site-1", tmp_path, turned)
    of_b = update(a__lora_A=None, a__lora_B=torch.ones(3, 2))
    egress.release_update(Stage.adapt, 0, of_b)
    egress.release_update(Stage.adapt, 1, update())
    egress.release_update(Stage.adapt, 2, of_b)
    for index, wrong in ((1, of_b), (2, update())):
        with pytest.raises(EgressRefusal) as caught:
            egress.release_update(Stage.adapt, index, wrong)
        assert len(caught.value.faults) == 2, "one tensor is strange, and one is missing"
    assert len(receipts(egress)) == 2 * 3


def test_outside_every_refusal_of_egress_looks_the_same() -> None:
    """Whether a number was not finite is a fact about the site's data: it has no code of its own."""
    assert EgressRefusal("x").border_code == "REFUSED_LOCAL"


def metrics(**changes: Any) -> dict[str, Any]:
    cells = [
        Metric("student", "dice", "x", 0.5, (0.4, 0.6), 9),
        Metric("student", "dice", "y", None, None, 2, "few patients"),
    ]
    return asdict(SiteMetrics("site-1", SiteCounts(9, 18, 5, 2, 2), cells)) | changes


def test_metrics_leave_with_suppressed_cells_and_a_receipt(egress: Egress) -> None:
    payload = without_empty_head(metrics())
    assert egress.release_numbers(Stage.evaluate, 0, "metrics", metrics()) == payload
    (receipt,) = receipts(egress)
    assert (receipt["name"], receipt["sha256"]) == ("metrics", sha256_of(payload))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patients_by_id": {"17": 0.3}}, "metrics.patients_by_id.17: not on the plan's list"),
        ({"counts": {"test": math.inf}}, "metrics.counts.test: a NONFINITE number"),
        ({"site": "x" * 201}, "metrics.site: a text of more than 200 characters"),
        ({"site": torch.ones(2)}, "metrics.site: Tensor is no plain value"),
        ({"site": b"raw"}, "metrics.site: bytes is no plain value"),
    ],
)
def test_a_number_that_is_not_the_plans_stays(egress: Egress, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EgressRefusal) as caught:
        egress.release_numbers(Stage.evaluate, 0, "metrics", metrics(**changes))
    assert caught.value.faults == (words,)
    assert receipts(egress) == []


def test_a_table_of_another_name_stays(egress: Egress) -> None:
    with pytest.raises(EgressRefusal):
        egress.release_numbers(Stage.evaluate, 0, "images", metrics())


def test_the_receipt_is_written_before_the_payload_is_released(
    egress: Egress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.egress.os.fsync", full)
    with pytest.raises(ArtefactError, match="nothing leaves"):
        egress.release_update(Stage.adapt, 0, update())


def test_a_release_after_a_resume_has_the_same_digest_on_a_new_receipt(egress: Egress) -> None:
    egress.release_update(Stage.adapt, 0, update())
    egress.release_update(Stage.adapt, 0, update())
    lines = receipts(egress)
    assert len(lines) == 4
    assert lines[:2] == lines[2:]
