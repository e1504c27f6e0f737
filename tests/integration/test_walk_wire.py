"""The real ServerApp and ClientApp, real messages, real state; only the guard is a fake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import server.collect
from common import wire
from common.adapter import Adapter
from common.config import load_run_config, save_run_config
from common.errors import ArtefactError, DeadlinePassed, FederationError, PolicyRefusal, WardroundError
from common.names import AGGREGATION_RULES, FIXED_A_RULES
from common.plan import Round, Stage
from common.precision import pack_down
from common.recipe import AggregationConfig, GeneratorScope, TeacherConfig, WireDtype
from server.outcome import RunOutcome
from server.state import StateStore
from tests.integration import fake_guard
from tests.integration.consortium import (
    SITES,
    Consortium,
    answered,
    fake_models,
    recipe,
    rejected,
)

__all__ = ["fake_models"]  # a fixture of every test here


# Rules that keep A fixed have their own demands on presets; they walk in tests/e2e/test_aggregation_rules.py.
@pytest.mark.parametrize("rule", sorted(set(AGGREGATION_RULES) - set(FIXED_A_RULES)))
def test_the_whole_walk(tmp_path: Path, rule: str) -> None:
    settings = replace(recipe(GeneratorScope.federated), aggregation=AggregationConfig(rule, max_rank=8))
    consortium = Consortium(tmp_path, settings)
    outcome = consortium.go()

    stages = [(record.stage, record.index) for record in outcome.rounds]
    assert stages == [
        ("propose", 0), ("adapt", 0), ("adapt", 1), ("adapt", 2), ("style", 0), ("generator", 0),
        ("generator", 1), ("student", 0), ("evaluate", 0),
    ]  # fmt: skip
    assert all(record.sites == list(SITES) and not record.rejected for record in outcome.rounds)
    assert set(outcome.styles) == set(outcome.notes) == set(outcome.metrics) == set(SITES)
    assert {note.params for note in outcome.notes.values()} == {13}, "each site was sent three styles"
    assert {note.sha256 for note in outcome.notes.values()} == {outcome.generator_sha256}
    adapter = Adapter.load(consortium.run_dir / "teacher" / "adapter.safetensors")
    card = json.loads((consortium.run_dir / "teacher" / "card.json").read_text())
    assert adapter.digest == outcome.adapter_sha256 == card["adapter_sha256"]
    assert card["sites"] == list(SITES)
    residuals = [record.residual for record in outcome.rounds if record.stage == "adapt"]
    assert all(residual is not None and residual >= 0 for residual in residuals)
    assert outcome.rounds[1].losses == {site: [1.0, 0.5] for site in SITES}
    assert consortium.events()[-1]["event"] == "finished"


def test_the_mean_of_the_sites_is_what_comes_out(tmp_path: Path) -> None:
    settings = replace(recipe(), run=replace(recipe().run, rounds=1))
    consortium = Consortium(tmp_path, settings)
    consortium.go()
    first = fake_guard.first_adapter()
    guards = {site: fake_guard.connect(f"in-process:{consortium.sites_dir / site}") for site in SITES}
    order = Round("", Stage.adapt, 0, 1.0, "")
    sent = pack_down(first, WireDtype.bfloat16)
    updates = [guard.adapt(order, sent) for guard in guards.values()]
    step = sum(u.weight * u.adapter.tensors["decoder.head.weight"].double() for u in updates)
    step = step / sum(u.weight for u in updates)
    expected = first.tensors["decoder.head.weight"].double() + step
    found = Adapter.load(consortium.run_dir / "teacher" / "adapter.safetensors")
    # What was kept back of the first adapter is there again; only what goes down last is rounded.
    rounded = expected.float().to(torch.bfloat16).double()
    torch.testing.assert_close(found.tensors["decoder.head.weight"].double(), rounded, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ("raise", "SITE_FAILED"),
        ("exit", "SITE_FAILED"),
        ("bad data", "REFUSED_LOCAL"),
        ("refuse", "REFUSED_POLICY (allow_generator)"),
        ("own deadline", "DEADLINE"),
        ("nan", "a value that is not finite"),
        ("extra", "an extra tensor"),
        ("shape", "a wrong shape"),
        ("base", "another base model"),
        ("preset", "another preset"),
        ("rank", "another rank"),
        ("stale", "started from another adapter than it was sent"),
        ("heavy", "a weight above the cap"),
        ("huge", "values of an absurd size"),
        ("headed", "a ledger head in a run without privacy"),
        ("far", "a change far larger than the others'"),
    ],
)
def test_a_faulty_site_is_dropped_by_name_and_cause_and_comes_back(
    tmp_path: Path, wrong: str, cause: str
) -> None:
    consortium = Consortium(tmp_path, recipe(), {"b": {"adapt:1": wrong}})
    outcome = consortium.go()
    assert rejected(outcome, "adapt", 1) == {"b": cause}
    assert answered(outcome, "adapt", 1) == ["a", "c"]
    assert answered(outcome, "adapt", 2) == list(SITES), "a dropped site may come back"
    dropped = [event for event in consortium.events() if event["event"] == "dropped"]
    assert [(event["site"], event["stage"], event["reason"]) for event in dropped] == [("b", "adapt", cause)]
    told = (consortium.sites_dir / "b" / "notices.txt").read_text().splitlines()
    assert told == [f"adapt:2 adapt, round 2: {cause}"], "it is told once why, with its next order"


def test_a_half_whose_turn_it_is_not_is_rejected(tmp_path: Path) -> None:
    """Screening reads the plan's list of that very round."""
    settings = replace(recipe(), aggregation=AggregationConfig("rolora", max_rank=8))
    outcome = Consortium(tmp_path, settings, {"b": {"adapt:2": "half"}}).go()
    assert rejected(outcome, "adapt", 2) == {"b": "an extra tensor; a missing tensor"}
    assert answered(outcome, "adapt", 1) == list(SITES)


@pytest.mark.parametrize("stage", ["style", "student", "evaluate"])
def test_a_site_that_fails_later_is_dropped_from_that_stage(tmp_path: Path, stage: str) -> None:
    outcome = Consortium(tmp_path, recipe(), {"c": {f"{stage}:0": "raise"}}).go()
    assert rejected(outcome, stage) == {"c": "SITE_FAILED"}
    if stage == "student":
        assert answered(outcome, "evaluate") == ["a", "b"], "no student, nothing to evaluate"


def test_a_site_that_misses_its_deadline_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    outcome = Consortium(tmp_path, recipe(), {"a": {"adapt:0": "late"}}).go()
    assert rejected(outcome, "adapt", 0) == {"a": "DEADLINE"}
    assert answered(outcome, "adapt", 0) == ["b", "c"], "the next sites' deadlines run from their own push"
    assert clock.now > 60


def test_too_few_sites_end_the_run_with_exit_30(tmp_path: Path) -> None:
    wrong = {"a": {"adapt:1": "raise"}, "b": {"adapt:1": "nan"}}
    with pytest.raises(FederationError) as caught:
        Consortium(tmp_path, recipe(), wrong).go()
    assert caught.value.exit_code == 30
    assert caught.value.faults == ("a: SITE_FAILED", "b: a value that is not finite")


@pytest.mark.parametrize("robust", ["none", "auto"])
@pytest.mark.parametrize("last", [0, 1])
def test_a_round_in_which_no_site_learns_moves_nothing(tmp_path: Path, robust: str, last: int) -> None:
    """Nothing is divided by the zeros that they sent; in the first round they were sent B = 0, too."""

    def teacher_after(rounds: int, wrong: dict[str, str]) -> Adapter:
        aggregation = AggregationConfig(max_rank=8, robust=robust)
        settings = replace(recipe(), run=replace(recipe().run, rounds=rounds), aggregation=aggregation)
        consortium = Consortium(tmp_path / str(rounds), settings, dict.fromkeys(SITES, wrong))
        outcome = consortium.go()
        assert all(answered(outcome, "adapt", index) == list(SITES) for index in range(rounds))
        return Adapter.load(consortium.run_dir / "teacher" / "adapter.safetensors")

    found = teacher_after(last + 1, {f"adapt:{last}": "still"})
    before = teacher_after(last, {}) if last else fake_guard.first_adapter()
    assert found.layers() == before.layers()
    for layer in before.layers():
        assert torch.allclose(found.change(layer), before.change(layer), atol=1e-6)
    head = "decoder.head.weight"
    rounded = before.tensors[head].to(torch.bfloat16).float()
    assert torch.allclose(found.tensors[head], rounded, atol=1e-6)


@pytest.mark.parametrize("wrong", ["refuse", "raise", "nan", "huge"])
def test_a_round_that_every_site_fails_ends_the_run_and_can_be_made_again(tmp_path: Path, wrong: str) -> None:
    """Whether the sites refuse, or the server refuses what they send."""
    whole = Consortium(tmp_path / "whole", recipe()).go()
    consortium = Consortium(tmp_path / "failed", recipe(), {site: {"adapt:1": wrong} for site in SITES})
    kind = PolicyRefusal if wrong == "refuse" else FederationError
    with pytest.raises(kind, match="stage adapt, round 1: 0 site") as caught:
        consortium.go()
    assert len(caught.value.faults) == len(SITES)
    for site in SITES:
        consortium.behave(site, {})
    assert consortium.go().adapter_sha256 == whole.adapter_sha256


def test_too_many_late_sites_end_the_run_with_exit_31(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    with pytest.raises(DeadlinePassed) as caught:
        Consortium(tmp_path, recipe(), {"a": {"adapt:0": "late"}, "b": {"adapt:0": "own deadline"}}).go()
    assert caught.value.exit_code == 31


def test_late_sites_are_not_blamed_where_others_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    wrong = {"a": {"adapt:0": "late"}, "b": {"adapt:0": "raise"}, "c": {"adapt:0": "raise"}}
    with pytest.raises(FederationError):
        Consortium(tmp_path, recipe(), wrong).go()


def test_a_site_that_disagrees_takes_no_part(tmp_path: Path) -> None:
    outcome = Consortium(tmp_path, recipe(), {"b": {"propose:0": "disagree"}}).go()
    assert outcome.sites == ["a", "c"]
    assert [(r.site, r.code, r.field) for r in outcome.refusals] == [("b", "REFUSED_POLICY", "max_rounds")]
    assert rejected(outcome, "propose") == {"b": "REFUSED_POLICY (max_rounds)"}
    assert answered(outcome, "adapt") == ["a", "c"]


def test_two_nodes_with_one_name_are_both_turned_away(tmp_path: Path) -> None:
    settings = recipe(sites=("a", "b", "c", "d"))
    outcome = Consortium(tmp_path, settings, {"d": {"propose:0": "impostor"}}).go()
    assert outcome.sites == ["b", "c"]
    assert set(rejected(outcome, "propose").values()) == {"another node gives the same site's name"}


@pytest.mark.parametrize("stop", ["adapt:0", "adapt:1", "style:0", "generator:1", "student:0", "evaluate:0"])
def test_resume_equals_uninterrupted(tmp_path: Path, stop: str) -> None:
    settings = recipe(GeneratorScope.federated)
    whole = Consortium(tmp_path / "whole", settings).go()
    consortium = Consortium(tmp_path / "stopped", settings, {"b": {stop: "interrupt"}})
    with pytest.raises(KeyboardInterrupt):
        consortium.go()
    consortium.behave("b", {})
    resumed = consortium.go()
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert resumed.generator_sha256 == whole.generator_sha256
    assert [(r.stage, r.index, r.sites) for r in resumed.rounds] == [
        (r.stage, r.index, r.sites) for r in whole.rounds
    ]
    assert resumed.notes == whole.notes


def test_a_crash_while_saving_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Consortium(tmp_path / "whole", recipe()).go()
    consortium = Consortium(tmp_path / "stopped", recipe())
    saves = 0
    real = StateStore.save

    def save(self: StateStore, checkpoint: object) -> None:
        nonlocal saves
        saves += 1
        if saves == 3:
            raise KeyboardInterrupt
        real(self, checkpoint)  # type: ignore[arg-type]

    monkeypatch.setattr(StateStore, "save", save)
    with pytest.raises(KeyboardInterrupt):
        consortium.go()
    assert consortium.go().adapter_sha256 == whole.adapter_sha256


def test_too_few_nodes_online_end_the_run_with_exit_31(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.roll_call.NODES_WAIT_S", 0.05)
    consortium = Consortium(tmp_path, recipe())
    for site in ("b", "c"):
        shutil.rmtree(consortium.sites_dir / site)
    with pytest.raises(DeadlinePassed, match="1 of 3 sites came online") as caught:
        consortium.go()
    assert caught.value.exit_code == 31


def test_a_site_that_is_gone_at_a_resume_is_named_in_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.roll_call.NODES_WAIT_S", 0.05)
    consortium = Consortium(tmp_path, recipe(), {"b": {"adapt:1": "interrupt"}})
    with pytest.raises(KeyboardInterrupt):
        consortium.go()
    consortium.behave("b", {})
    shutil.rmtree(consortium.sites_dir / "c")
    outcome = consortium.go()
    assert answered(outcome, "adapt", 0) == list(SITES)
    assert answered(outcome, "adapt", 1) == ["a", "b"]
    assert rejected(outcome, "adapt", 1) == {"c": "NOT_ONLINE"}


def test_a_site_that_is_not_in_the_recipe_takes_no_part(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, recipe())
    fake_guard.make_sites(consortium.sites_dir, {"stranger": {}})
    outcome = consortium.go()
    assert outcome.sites == list(SITES)
    assert list(rejected(outcome, "propose").values()) == ["a site that is not in this run"]


def test_resume_refuses_another_plan(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, recipe())
    consortium.go()
    changed = replace(recipe(), teacher=TeacherConfig(rank=2, steps=31))
    save_run_config(changed, consortium.run_dir / "config.yaml")
    with pytest.raises(ArtefactError, match="another plan") as caught:
        consortium.go()
    assert caught.value.faults == ("teacher.steps: 30 in the state, 31 now",)


def test_bytes_up_are_the_message_and_nothing_of_the_site_is_in_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No exception text, path or patient id crosses a site's border, whatever the site raises."""
    packed: list[bytes] = []
    real = wire.pack_message

    def pack(message: object) -> bytes:
        packed.append(real(message))  # type: ignore[arg-type]
        return packed[-1]

    monkeypatch.setattr(wire, "pack_message", pack)
    wrong = {
        "a": {"adapt:0": "raise", "style:0": "bad data"},
        "b": {"adapt:1": "refuse", "student:0": "exit"},
        "c": {"adapt:2": "bad data", "evaluate:0": "own deadline"},
    }
    consortium = Consortium(tmp_path, recipe(sites=(*SITES, "d")), wrong)
    outcome = consortium.go()

    planted = [fake_guard.PLANTED_PATH, fake_guard.PLANTED_ID, "patient_0017", "RuntimeError", str(tmp_path)]
    kept_by_server = [path.read_bytes() for path in consortium.run_dir.rglob("*") if path.is_file()]
    for text in planted:
        assert not any(text.encode() in blob for blob in packed)
    for text in planted[:3]:
        assert not any(text.encode() in blob for blob in kept_by_server)
    for site in SITES:
        log = (consortium.sites_dir / site / "faults.log").read_text()
        assert fake_guard.PLANTED_PATH in log, "the site itself keeps the whole text"

    total = sum(sum(r.bytes_up.values()) + sum(r.bytes_down.values()) for r in outcome.rounds)
    # Down counts the message before its id is set: 36 characters and their two-byte frame.
    down = sum(len(r.bytes_down) for r in outcome.rounds)
    assert total + down * 38 == sum(map(len, packed))


def test_every_payload_is_on_a_receipt(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, recipe())
    consortium.go()
    for site in SITES:
        lines = (consortium.sites_dir / site / "receipts.jsonl").read_text().splitlines()
        names = [json.loads(line)["name"] for line in lines]
        assert names == ["answer", *["adapt.adapter", "adapt.numbers"] * 3, "style", "note", "metrics"]


def test_memory_does_not_grow_with_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two decoded updates are alive at any time."""
    collectors = []
    real = server.collect.Collector.__init__

    def init(self: server.collect.Collector, *args: object) -> None:
        real(self, *args)  # type: ignore[arg-type]
        collectors.append(self)

    monkeypatch.setattr(server.collect.Collector, "__init__", init)
    Consortium(tmp_path, recipe(sites=tuple(f"site-{n:02d}" for n in range(12)))).go()
    assert 1 <= collectors[0].live.peak <= 2
    assert collectors[0].live.now <= 1


def test_the_run_folder_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.app import Context, RecordDict

    monkeypatch.delenv("WARDROUND_RUN", raising=False)
    with pytest.raises(WardroundError, match="WARDROUND_RUN") as caught:
        server.app.main(None, Context(1, 1, {}, RecordDict(), {}))
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_ray_and_loopback_give_the_same_adapters(tmp_path: Path) -> None:
    alone = Consortium(tmp_path / "loopback", recipe()).go()
    consortium = Consortium(tmp_path / "ray", recipe(), {"b": {"evaluate:0": "raise"}})
    assert on_ray(consortium) == 0
    outcome = RunOutcome.load(consortium.run_dir / "state")
    assert outcome.adapter_sha256 == alone.adapter_sha256
    assert rejected(outcome, "evaluate") == {"b": "SITE_FAILED"}
    threads = {(consortium.sites_dir / site / "threads.txt").read_text() for site in SITES}
    assert threads == {str(load_run_config(consortium.run_dir / "config.yaml").run.threads)}


@pytest.mark.slow
def test_a_failed_run_on_ray_ends_with_its_exit_code_and_no_process(tmp_path: Path) -> None:
    behaviour = {site: {"adapt:0": "raise"} for site in SITES}
    assert on_ray(Consortium(tmp_path, recipe(), behaviour)) == 30


def on_ray(consortium: Consortium) -> int:
    """The exit code of the run; 99 if it leaves a process behind."""
    command = [sys.executable, "-m", "tests.integration.ray_driver"]
    return subprocess.run([*command, consortium.run_dir, consortium.sites_dir], timeout=240).returncode


class Clock:
    """Time that passes only when a fake site is late."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(server.collect, "monotonic", lambda: self.now)
        monkeypatch.setattr(fake_guard, "late", self.pass_an_hour)

    def pass_an_hour(self) -> None:
        self.now += 3600
