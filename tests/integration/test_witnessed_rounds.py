"""Private rounds whose ledger others have seen: put back, it is refused; kept open, it is cheap."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import client.dp.bench as bench
import client.dp.tasks as tasks
import client.site as site_module
from client.guard import Guard
from client.site import Site
from client.witnesses import WITNESSED
from common.canonical import sha256_of
from common.config import load_recipe
from common.errors import ArtefactError
from common.guard_api import PlanAnswer
from common.plan import Round, RunPlan, Stage
from common.privacy import journal
from common.privacy.bundle import read_bundle
from common.privacy.entries import EntryType, LedgerBroken
from common.privacy.heads import SignedHead
from common.privacy.journal import HEAD, LEDGER
from common.privacy.verify import Evidence, verify
from common.privacy.witness import read_heads
from server.planning import build_plan
from tests.integration.test_private_rounds import (
    SETTINGS,
    agreed,
    entries,
    home,
    opened_files,
    order,
    plan,
    receipts,
    start,
)

__all__ = ["home", "plan"]  # the fixtures
RECORDS = (LEDGER, HEAD, "members.jsonl", "receipts.jsonl")
PEER = Ed25519PrivateKey.generate()


def shown(order: Round, *heads: SignedHead) -> Round:
    return replace(order, heads=list(heads))


def adapted(guard: Guard, plan: RunPlan, index: int, *heads: SignedHead) -> SignedHead:
    update = guard.adapt(shown(order(plan, Stage.adapt, index), *heads), start(plan))
    assert update.ledger_head is not None
    return update.ledger_head


def saved_of(home: Path) -> dict[str, bytes]:
    return {name: (home / name).read_bytes() for name in RECORDS if (home / name).exists()}


def put_back(home: Path, saved: dict[str, bytes]) -> None:
    """All records of the site together, as from a backup: by themselves they hold."""
    for name, data in saved.items():
        (home / name).write_bytes(data)
    assert verify(read_bundle(home), Evidence()).faults == []


# --- what goes along ----------------------------------------------------------------------------------


def test_every_answer_of_a_private_run_names_a_head_with_what_it_spends(home: Path, plan: RunPlan) -> None:
    guard = Guard(Site.open(home))
    answer = guard.propose(plan, order(plan, Stage.propose))
    assert answer.ledger_head is not None
    assert entries(home)[answer.ledger_head.seq].type is EntryType.plan
    update = guard.adapt(order(plan, Stage.adapt), start(plan))
    head = update.ledger_head
    assert head is not None
    assert head.holds
    assert (head.site, entries(home)[head.seq].type) == ("east", EntryType.reserve)
    assert entries(home)[head.seq].hash == head.hash
    numbers = {
        "weight": update.weight, "started_from": update.started_from, "mechanism": update.mechanism,
        "losses": [None, None], "ledger_head": asdict(head),
    }  # fmt: skip
    (receipt,) = [line for line in receipts(home) if line["name"] == "adapt.numbers"]
    assert receipt["sha256"] == sha256_of(numbers), "the head is on a receipt like everything else"
    assert verify(read_bundle(home), Evidence(heads=[answer.ledger_head, head])).faults == []


def test_a_run_without_privacy_carries_nothing_new(home: Path) -> None:
    from common import wire

    open_plan = build_plan(load_recipe("smoke", ["teacher.adapter=decoder", "baselines=[]"]), "open-run")
    listed = [number for payload in open_plan.payloads for number in payload.numbers]
    assert not [number for number in listed if "ledger_head" in number]
    answer = Guard(Site.open(home)).propose(open_plan, order(open_plan, Stage.propose))
    assert answer.ledger_head is None
    for content in (wire.encode_answer(answer), wire.encode_request(order(open_plan, Stage.adapt))):
        assert "head" not in str(content)
    assert set(receipts(home)[-1]) == {
        "site", "stage", "round", "name", "bytes", "sha256", "mechanism", "epsilon_after",
    }  # fmt: skip


# --- a ledger that was put back -----------------------------------------------------------------------


def test_a_rollback_between_rounds_is_refused_before_any_data_file_is_opened(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = agreed(home, plan)
    before = saved_of(home)
    seen = adapted(guard, plan, 0)
    put_back(home, before)
    site_module._patients.cache_clear()
    monkeypatch.setattr(Site, "patients", lambda *_: pytest.fail("data were asked for"))
    anew = Guard(Site.open(home))  # started again, it knows of nothing
    with opened_files() as opened, pytest.raises(LedgerBroken) as caught:
        anew.adapt(shown(order(plan, Stage.adapt, 1), seen), start(plan))
    assert caught.value.border_code == "REFUSED_LEDGER"
    assert str(home / LEDGER) in opened
    assert not any((home / "data") in Path(name).parents for name in opened)
    with pytest.raises(LedgerBroken, match="changed behind its end"):  # and this one knows by itself
        guard.adapt(order(plan, Stage.adapt, 1), start(plan))
    assert (home / LEDGER).read_bytes() == before[LEDGER], "nothing was booked"


def test_a_rollback_before_a_resume_is_refused_before_any_data_file_is_opened(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = agreed(home, plan)
    before = saved_of(home)
    seen = adapted(guard, plan, 0)
    put_back(home, before)

    def again(*heads: SignedHead) -> tuple[PlanAnswer, list[str]]:
        site_module._patients.cache_clear()
        with opened_files() as opened:
            anew = Guard(Site.open(home))
            answer = anew.propose(plan, shown(order(plan, Stage.propose), *heads))
        return answer, [name for name in opened if (home / "data") in Path(name).parents]

    answer, data = again(seen)
    assert (answer.agrees, answer.code, answer.ledger_head, data) == (False, "REFUSED_LEDGER", None, [])
    put_back(home, before)
    answer, data = again()
    assert answer.agrees, "nobody has shown it what it signed"
    assert data, "the hook sees data files"


def another_key(plan: RunPlan) -> SignedHead:
    return SignedHead.sign("east", (0, "a" * 64), PEER)


def bad_signature(plan: RunPlan) -> SignedHead:
    return replace(SignedHead.sign("west", (3, "a" * 64), PEER), seq=4)


@pytest.mark.parametrize(("wrong", "error"), [(another_key, LedgerBroken), (bad_signature, ArtefactError)])
def test_a_server_that_lies_of_heads_gets_no_update(
    home: Path, plan: RunPlan, wrong: Callable[[RunPlan], SignedHead], error: type[Exception]
) -> None:
    guard = agreed(home, plan)
    with pytest.raises(error):
        adapted(guard, plan, 0, wrong(plan))
    assert not entries(home, EntryType.reserve)
    assert not (home / WITNESSED).exists()
    adapted(guard, plan, 0)


def test_a_peer_that_goes_back_is_kept_as_it_was_and_said(home: Path, plan: RunPlan) -> None:
    guard = agreed(home, plan)
    later, earlier = (SignedHead.sign("west", (seq, "a" * 64), PEER) for seq in (7, 5))
    own = adapted(guard, plan, 0, later)
    adapted(guard, plan, 1, own, earlier)
    assert read_heads(home / WITNESSED) == [later]
    (notice,) = [json.loads(line) for line in (home / "notices.jsonl").read_text().splitlines()]
    assert "the ledger of west went back" in notice["notice"]


# --- what a round costs -------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[None]:
    """One item for each call of the module's function from now on."""
    calls: list[None] = []
    original = getattr(module, name)

    def counting(*arguments: object) -> object:
        calls.append(None)
        return original(*arguments)

    monkeypatch.setattr(module, name, counting)
    return calls


def test_a_round_checks_no_entry_twice_and_makes_crops_and_features_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: what grows with the rounds that are behind would show."""
    rounds = 6
    plan = build_plan(load_recipe("smoke", [*SETTINGS, f"privacy.steps={rounds}"]), "long-run")
    made = [counted(monkeypatch, tasks, name) for name in ("draw_crops", "_finished")]
    guard = agreed(home, plan)
    checked, mechanisms = journal.entries_checked, bench.mechanisms_made
    for index in range(rounds):
        adapted(guard, plan, index)
    assert journal.entries_checked == checked
    assert bench.mechanisms_made - mechanisms == 1
    assert [len(calls) for calls in made] == [1, 1]
    assert verify(read_bundle(home), Evidence()).faults == []


def test_a_kept_mechanism_serves_the_next_step_of_its_own_run_alone(home: Path, plan: RunPlan) -> None:
    other = build_plan(load_recipe("smoke", [*SETTINGS, "run.seed=1"]), "other-run")
    guard, made = agreed(home, plan), bench.mechanisms_made
    adapted(guard, plan, 0)
    agreed(home, other).adapt(order(other, Stage.adapt), start(other))
    assert bench.mechanisms_made == made + 2
    agreed(home, plan).adapt(order(plan, Stage.adapt, 1), start(plan))
    assert bench.mechanisms_made == made + 3
    bench.forget(home)
    assert home not in bench._kept


def test_what_waits_between_rounds_is_bounded(
    home: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench._kept.clear()
    guard = agreed(home, plan)
    adapted(guard, plan, 0)
    (kept,) = bench._kept.values()
    assert kept.bytes > 3 * 64 * 64 * 4, "at least the crops"
    monkeypatch.setattr(bench, "KEPT_BYTES", kept.bytes - 1)
    adapted(guard, plan, 1)
    assert not bench._kept
