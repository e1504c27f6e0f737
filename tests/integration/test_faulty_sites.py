"""Real sites that fail, lie or come too late: each is dropped by name and cause, and the run goes on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result

import client.measuring
import client.rounds
import client.transfer.making as making
import server.collect
import simulations.simulate
from client.adaptation import Adaptation
from client.deadline import Deadline
from client.egress import Egress, Noised
from client.site import Site
from client.workshop import Workshop
from common.adapter import Adapter, AdapterUpdate
from common.config import CONFIG_DIR, load_recipe
from common.plan import Round, RunPlan, Stage
from common.recipe import SiteFile
from tests.e2e import walks

PLANTED = "/ward/Zofia-1957/scan.png"  # in a failing site's own words, and nowhere else
Spoil = Callable[[Adapter], Adapter]


# --- what a site can do wrong -------------------------------------------------------------------------


def with_nan(adapter: Adapter) -> Adapter:
    return with_first(adapter, lambda tensor: tensor * math.nan)


def with_wrong_shape(adapter: Adapter) -> Adapter:
    return with_first(adapter, lambda tensor: tensor[:-1])


def with_first(adapter: Adapter, change: Callable[[torch.Tensor], torch.Tensor]) -> Adapter:
    name = min(adapter.tensors)
    return replace(adapter, tensors={**adapter.tensors, name: change(adapter.tensors[name])})


def with_extra_tensor(adapter: Adapter) -> Adapter:
    return replace(adapter, tensors={**adapter.tensors, "patients": torch.ones(7)})


def with_another_base(adapter: Adapter) -> Adapter:
    return replace(adapter, base_sha256="ab" * 32)


@dataclass(frozen=True)
class Fault:
    """What the faulty site does in one round of its teacher, and what the server may say of it.

    Attributes:
        cause: the whole of it, in the report.
        log: is in the site's own faults.log.
        spoil: of the adapter that it trained; ``guarded`` if its own guard sees it, so that nothing leaves.
        act: instead of training, or before it: "raise", "slow" (its own clock) or "late" (the server's).
    """

    name: str
    cause: str
    log: str = ""
    spoil: Spoil | None = None
    guarded: bool = True
    act: str = ""


FAULTS = (
    Fault("raises", "SITE_FAILED", PLANTED, act="raise"),
    Fault("passes its own deadline", "DEADLINE", "passed while adapting the teacher", act="slow"),
    Fault("answers after the deadline", "DEADLINE", act="late"),
    Fault("returns NaN", "REFUSED_LOCAL", "NONFINITE", with_nan),
    Fault("returns a wrong shape", "REFUSED_LOCAL", "the plan says", with_wrong_shape),
    Fault("returns an extra tensor", "REFUSED_LOCAL", "patients: not on the plan's list", with_extra_tensor),
    Fault("returns another base", "REFUSED_LOCAL", "belongs to no model of the plan", with_another_base),
    Fault("sends NaN past its guard", "a value that is not finite", spoil=with_nan, guarded=False),
    Fault("sends a wrong shape", "a wrong shape", spoil=with_wrong_shape, guarded=False),
    Fault("sends an extra tensor", "an extra tensor", spoil=with_extra_tensor, guarded=False),
    Fault("sends another base", "another base model", spoil=with_another_base, guarded=False),
)


class FaultySite:
    """Puts ``faults`` into the site ``name``, one a round of the teacher, from round 0 on."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, faults: tuple[Fault, ...]) -> None:
        self.name, self.faults = name, faults
        self.late_s = 0.0  # how much the server's clock is ahead
        self.train, self.release = client.rounds.adapt_teacher, Egress.release_update
        patch.setattr(client.rounds, "adapt_teacher", self.adapt_teacher)
        patch.setattr(Egress, "release_update", lambda egress, *rest: self.release_update(egress, *rest))
        patch.setattr(server.collect, "monotonic", lambda: time.monotonic() + self.late_s)

    def fault(self, site: str, index: int) -> Fault | None:
        return self.faults[index] if site == self.name and index < len(self.faults) else None

    def adapt_teacher(
        self, site: Site, plan: RunPlan, adapter: Adapter, train: Any, order: Round
    ) -> Adaptation:
        fault = self.fault(site.name, order.index)
        if fault and fault.act == "raise":
            raise RuntimeError(f"cannot open {PLANTED}")
        if fault and fault.act == "slow":
            self.train_on_a_slow_machine(site, plan, adapter, train, order)
        trained = self.train(site, plan, adapter, train, order)
        if fault and fault.act == "late":
            self.late_s += 2 * order.deadline_s
        return trained

    def train_on_a_slow_machine(
        self, site: Site, plan: RunPlan, adapter: Adapter, train: Any, order: Round
    ) -> None:
        """The real training, with a clock on which each step takes twice as long as the whole order may."""
        ticks = iter(range(1000))
        slow = Deadline(order.deadline_s, clock=lambda: 2 * next(ticks) * order.deadline_s)
        teacher = client.rounds.resident_teacher(plan.teacher, plan.data)
        client.rounds.adapt(teacher, adapter, train, plan, (order.index, 0), slow)

    def release_update(
        self, egress: Egress, stage: Stage, index: int, update: AdapterUpdate, noised: Noised | None
    ) -> AdapterUpdate:
        fault = self.fault(egress.site, index)
        if fault and fault.spoil and fault.guarded:
            update = replace(update, adapter=fault.spoil(update.adapter))
        released = self.release(egress, stage, index, update, noised)
        if fault and fault.spoil and not fault.guarded:
            return replace(released, adapter=fault.spoil(released.adapter))
        return released


# --- one run with all of it -----------------------------------------------------------------------------


def consortium(folder: Path, names: list[str]) -> Path:
    """A recipe like smoke's, for the hospitals ``names``."""
    plain = yaml.safe_load((CONFIG_DIR / "smoke.yaml").read_text())
    plain["sites"] = [{**plain["sites"][0], "name": name} for name in names]
    plain |= {"name": "faulty", "baselines": []}
    plain["generator"]["scope"] = "none"
    plain["run"]["site_deadline_s"] = 60.0
    path = folder / "faulty.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def refusing_site_file(real: Callable[[SiteFile, Path], None]) -> Callable[[SiteFile, Path], None]:
    """``north`` allows payloads of a kilobyte, which no adapter is."""

    def save_site(site: SiteFile, path: Path) -> None:
        if site.name == "north":
            site = replace(site, policy=replace(site.policy, max_payload_mb=0.001))
        real(site, path)

    return save_site


def failing_at(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a site, or of something that has one, that raises at the site ``name``."""

    def call(first: Any, *rest: Any) -> Any:
        if getattr(first, "site", first).name == name:
            raise RuntimeError(f"cannot open {PLANTED}")
        return real(first, *rest)

    return call


def fewer_crops(real: Callable[..., Any]) -> Callable[..., Any]:
    """A tenth of the real crops, to save time: no test here looks at a student."""
    return lambda *arguments: tuple(part[:10] for part in real(*arguments))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """east works; west fails in every round but the last, and in evaluation; south makes no student; north
    does not agree to the plan."""
    folder = tmp_path_factory.mktemp("faulty")
    overrides = [f"run.rounds={len(FAULTS) + 1}", "run.min_sites=1", "teacher.steps=1"]
    recipe = load_recipe(str(consortium(folder, ["east", "north", "south", "west"])), overrides)
    with pytest.MonkeyPatch.context() as patch:
        FaultySite(patch, "west", FAULTS)
        patch.setattr(making, "real_crops", fewer_crops(making.real_crops))
        patch.setattr(simulations.simulate, "save_site", refusing_site_file(simulations.simulate.save_site))
        patch.setattr(Workshop, "run", failing_at("south", Workshop.run))
        failing = failing_at("west", client.measuring.evaluate_models)
        patch.setattr(client.measuring, "evaluate_models", failing)
        return simulations.simulate.simulate(recipe, folder / "run", resume=False)


@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[fault.name for fault in FAULTS])
def test_a_site_that_fails_is_dropped_by_name_and_cause_and_the_round_goes_on(run: Path, index: int) -> None:
    fault = FAULTS[index]
    assert walks.rejected(run, Stage.adapt, index) == {"west": fault.cause}
    record = next(
        entry for entry in walks.report_of(run).rounds if (entry.stage, entry.index) == ("adapt", index)
    )
    assert record.sites == ["east", "south"]
    dropped = [event for event in walks.events_of(run) if event["event"] == "dropped"]
    here = [event for event in dropped if (event["stage"], event["round"]) == ("adapt", index)]
    assert [(event["site"], event["reason"]) for event in here] == [("west", fault.cause)]


def test_a_site_that_was_dropped_comes_back_in_the_next_round(run: Path) -> None:
    record = next(entry for entry in walks.report_of(run).rounds if entry.index == len(FAULTS))
    assert record.sites == ["east", "south", "west"]
    assert not record.rejected


def test_the_teacher_holds_nothing_of_a_rejected_update(run: Path) -> None:
    adapter = Adapter.load(run / "teacher/adapter.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.tensors.values())
    assert "patients" not in adapter.tensors
    assert adapter.base_sha256 == walks.report_of(run).teacher.base_sha256


def test_a_sites_own_words_stay_in_its_own_log(run: Path) -> None:
    log = (run / "sites/west/faults.log").read_text()
    assert not [fault.name for fault in FAULTS if fault.log not in log]
    assert PLANTED in (run / "sites/south/faults.log").read_text()
    assert not (run / "sites/east/faults.log").exists()
    for path in run.rglob("*"):
        if path.is_file() and path.name != "faults.log":
            assert PLANTED.encode() not in path.read_bytes(), path
            assert b"RuntimeError" not in path.read_bytes(), path


def test_an_update_that_the_guard_refuses_leaves_no_receipt(run: Path) -> None:
    receipts = [
        entry["round"] for entry in walks.receipts_of(run, "west") if entry["name"] == "adapt.adapter"
    ]
    left = [index for index, fault in enumerate(FAULTS) if not fault.guarded or fault.act == "late"]
    assert receipts == [*left, len(FAULTS)]


def test_a_site_that_does_not_agree_takes_no_part(run: Path) -> None:
    assert walks.rejected(run, Stage.propose) == {"north": "REFUSED_POLICY (max_payload_mb)"}
    later = [record for record in walks.report_of(run).rounds if record.stage != "propose"]
    assert not [record for record in later if "north" in (*record.sites, *record.bytes_down)]
    assert [entry["name"] for entry in walks.receipts_of(run, "north")] == ["answer"]


def test_a_site_without_a_student_is_not_asked_for_its_evaluation(run: Path) -> None:
    assert walks.rejected(run, Stage.student) == {"south": "SITE_FAILED"}
    assert walks.rejected(run, Stage.evaluate) == {"west": "SITE_FAILED"}
    evaluation = walks.report_of(run).rounds[-1]
    assert evaluation.sites == ["east"]
    assert "south" not in evaluation.bytes_down


def test_the_report_is_made_of_who_remained_and_names_who_did_not(run: Path) -> None:
    report, page = walks.report_of(run), (run / "report.html").read_text()
    assert sorted(report.students) == ["east", "west"]
    assert [site.id for site in report.sites] == ["east", "south", "west"], "every site that took part"
    assert {site.id: site.student for site in report.sites} == {
        "east": "unet-xs",
        "south": "",
        "west": "unet-xs",
    }
    own = {cell.site for cell in report.benefit if cell.tested_on == "own"}
    assert own == {"east"}, "west's own numbers never left it"
    for reason in {fault.cause for fault in FAULTS}:
        assert reason in page.replace("&#39;", "'")
    everyone = ["east", "north", "south", "west"]
    left = [(entry.site, entry.sha256) for entry in report.egress]
    assert left == [(site, entry["sha256"]) for site in everyone for entry in walks.receipts_of(run, site)]


# --- too few left -----------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def simulate_with(fault: Fault, folder: Path, names: list[str]) -> Result:
    """The command, with ``fault`` at west in round 1 (the second)."""
    with pytest.MonkeyPatch.context() as patch:
        FaultySite(patch, "west", (Fault("nothing", ""), fault))
        return walks.invoke("simulate", consortium(folder, names), "--out", folder / "run")


@pytest.mark.parametrize(
    ("fault", "code"),
    [(FAULTS[0], 30), (FAULTS[3], 30), (FAULTS[7], 30), (FAULTS[1], 31), (FAULTS[2], 31)],
    ids=lambda value: value.name if isinstance(value, Fault) else str(value),
)
def test_with_too_few_left_the_run_ends_with_its_code_and_names_the_fix(
    elsewhere: Path, fault: Fault, code: int
) -> None:
    result = simulate_with(fault, elsewhere, ["east", "west"])
    assert result.exit_code == code, result.stderr
    assert walks.fault_lines(result.stderr) == [f"  - west: {fault.cause}"]
    assert "stage adapt, round 1: 1 site(s) answered and run.min_sites is 2" in result.stderr
    assert "--resume" in result.stderr
    assert walks.finished_rounds(elsewhere / "run") == [("propose", 0), ("adapt", 0)]
    last = walks.events_of(elsewhere / "run")[-1]
    assert (last["event"], last["exit_code"]) == ("failed", code)
    assert not (elsewhere / "run/report.json").exists()


def test_a_failed_run_goes_on_when_its_site_is_mended(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert simulate_with(FAULTS[0], elsewhere, ["east", "west"]).exit_code == 30
    monkeypatch.setattr(making, "real_crops", fewer_crops(making.real_crops))
    command = ["simulate", elsewhere / "faulty.yaml", "--out", elsewhere / "run", "--json"]
    resumed = walks.invoke(*command, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["mean_dice"].keys() == {"student", "teacher"}
    rounds = [
        (record.stage, record.index, record.sites) for record in walks.report_of(elsewhere / "run").rounds
    ]
    assert rounds[1:3] == [("adapt", 0, ["east", "west"]), ("adapt", 1, ["east", "west"])]
