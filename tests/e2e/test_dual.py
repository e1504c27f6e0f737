"""Rule dual through the whole walk: exact_split on the wire, and a personal adapter that stays at home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import Tensor

import client.teachers
from client.deadline import Deadline
from client.patients import Split, of_split
from client.personal import PERSONAL_FILE, train_personal
from client.site import Site
from common import wire
from common.adapter import Adapter
from common.plan import Stage
from server.aggregation import build_rule
from tests.e2e import walks
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_border import kept_in, leaks

SITES = ("east", "west")
COMMAND = ("simulate", "smoke", "aggregation.rule=dual", walks.QUICK)


@dataclass
class Watched:
    """A run with every message kept."""

    run: Path
    packed: list[bytes] = field(default_factory=list)


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Stopped when the second site has just trained its personal adapter, and resumed."""
    seen = Watched(tmp_path_factory.mktemp("dual") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "pack_message", kept_in(seen.packed, wire.pack_message))
        with pytest.MonkeyPatch.context() as strike:
            struck = walks.raising(KeyboardInterrupt(), client.teachers.train_personal, 2)
            strike.setattr(client.teachers, "train_personal", struck)
            assert walks.invoke(*COMMAND, "--out", seen.run).exit_code == 130
        assert walks.finished_rounds(seen.run)[-1] == ("style", 0)
        assert (seen.run / "sites" / "east" / PERSONAL_FILE).exists()
        result = walks.invoke(*COMMAND, "--out", seen.run, "--resume")
    assert result.exit_code == 0, result.output
    return seen


def personal(run: Path, site: str) -> Adapter:
    return Adapter.load(run / "sites" / site / PERSONAL_FILE)


def test_what_travels_is_what_exact_split_sends(dual: Watched, smoke_run: FinishedRun) -> None:
    """The same teacher, the same payloads by digest and byte, the same messages but for their time stamps."""
    assert walks.digests(dual.run)["teacher"] == walks.digests(smoke_run.run)["teacher"]
    ours, theirs = (walks.report_of(run).rounds for run in (dual.run, smoke_run.run))
    assert [(record.stage, record.index) for record in ours] == [(r.stage, r.index) for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if mine.stage != "adapt":
            continue
        assert mine.residual == other.residual
        for site in SITES:
            assert abs(mine.bytes_up[site] - other.bytes_up[site]) <= 16
            assert abs(mine.bytes_down[site] - other.bytes_down[site]) <= 16
    for site in SITES:
        sent = [
            [(line["name"], line["bytes"], line["sha256"]) for line in walks.receipts_of(run, site)
             if line["stage"] in ("adapt", "style")]
            for run in (dual.run, smoke_run.run)
        ]  # fmt: skip
        assert sent[0] == sent[1]


def test_nothing_of_a_personal_adapter_is_in_any_message_or_on_any_receipt(dual: Watched) -> None:
    names = {"answer", "adapt.adapter", "adapt.numbers", "style", "note", "metrics"}
    for site in SITES:
        adapter = personal(dual.run, site)
        assert {line["name"] for line in walks.receipts_of(dual.run, site)} == names
        # Its folded factors came down: they are the shared teacher. Everything else was trained here.
        needles = ends_of([t for name, t in adapter.tensors.items() if ".folded_" not in name])
        assert len(needles) > 20
        assert leaks([adapter.to_bytes()], needles) == needles, "the search can find them"
        assert leaks(dual.packed, needles) == []
        kept = [path for path in dual.run.rglob("*") if path.is_file() and path.name != PERSONAL_FILE]
        assert not any(leaks([path.read_bytes()], needles) for path in kept), "it lies in one file"
        digests = [adapter.digest.encode(), adapter.digest[:12].encode()]
        assert leaks([*dual.packed, *(path.read_bytes() for path in kept)], digests) == []


def ends_of(tensors: Sequence[Tensor]) -> list[bytes]:
    """The first and last numbers of each tensor, as they would lie in a message."""
    flat = [tensor.flatten() for tensor in tensors if tensor.numel() >= 8]
    return [part.numpy().tobytes() for tensor in flat for part in (tensor[:8], tensor[-8:])]


def test_the_personal_teacher_is_measured_at_home_and_everywhere(dual: Watched) -> None:
    report = walks.report_of(dual.run)
    found = {(c.site, c.tested_on) for c in report.benefit if c.model == "personal_teacher"}
    assert found == {(site, where) for site in SITES for where in ("own", "all")}
    values = {(c.site, c.model): c.value for c in report.benefit if c.tested_on == "all"}
    shared = values["east", "teacher"]
    assert values["west", "teacher"] == shared, "one shared teacher, and two personal ones"
    assert len({shared, *(values[site, "personal_teacher"] for site in SITES)}) == 3
    page = (dual.run / "report.html").read_text()
    assert "Personal teacher" in page
    assert "with the site's personal adapter, which stays there" in page
    assert personal(dual.run, "east").digest != personal(dual.run, "west").digest


def test_resume_in_the_student_stage_ends_with_the_personal_adapters_of_an_uninterrupted_one(
    dual: Watched,
) -> None:
    """Made here anew, from the state that the rounds left and the site's own files."""
    state = walks.state_of(dual.run)
    assert state is not None
    rule = build_rule(state.plan.aggregation)
    rule.restore(state.rule_state(Stage.adapt))
    for name in SITES:
        site = Site.open(dual.run / "sites" / name)
        train = of_split(site.patients(state.plan.data, state.plan.seed), Split.train)
        anew = train_personal(site, state.plan, rule.adapter_for(name), train, Deadline(300.0))
        assert anew.digest == personal(dual.run, name).digest


def test_no_other_rule_trains_a_personal_adapter(smoke_run: FinishedRun) -> None:
    assert not list(smoke_run.run.rglob(PERSONAL_FILE))
    assert "personal_teacher" not in {cell.model for cell in walks.report_of(smoke_run.run).benefit}
