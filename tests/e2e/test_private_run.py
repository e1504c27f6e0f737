"""A whole private run by the command: what it leaves, what its report may claim, that its record holds."""

from __future__ import annotations

import json
from pathlib import Path

from client.witnesses import WITNESSED
from common.adapter import Adapter
from common.canonical import canonical_json
from common.plan import RunPlan
from common.privacy.accounting import epsilon
from common.privacy.events import Event
from common.privacy.journal import HEAD, LEDGER, read_lines
from common.privacy.witness import read_heads
from server.witness import HEADS_FILE
from tests.e2e import walks

STEPS = 3
PRIVATE = (
    "teacher.adapter=decoder", "privacy.noise_multiplier=1.2", f"privacy.steps={STEPS}",
    "privacy.sample_rate=0.5", "privacy.release_metrics=false", "generator.scope=none", walks.QUICK,
)  # fmt: skip


def test_a_private_run_is_booked_reported_and_verified(elsewhere: Path) -> None:
    done = walks.invoke("simulate", "smoke", "--out", "run", *PRIVATE)
    assert done.exit_code == 0, done.output
    run = elsewhere / "run"
    report = walks.report_of(run)
    spent = epsilon([Event(1.2, 0.5, STEPS)], 1e-5)
    for site, entry in report.privacy.items():
        assert entry.guarantee
        assert entry.epsilon is not None
        assert 0 <= entry.epsilon - spent <= 1e-6
        kinds = [str(one.type) for one in read_lines((run / "sites" / site / "ledger.jsonl").read_bytes())]
        assert (kinds.count("RESERVE"), kinds.count("COMMIT")) == (STEPS, STEPS)
        assert kinds.index("AUDIT") < kinds.index("RESERVE"), "rehearsed before the first step"
    assert {entry.mechanism for entry in report.egress} == {"dp_sgd", "public"}
    assert all((entry.epsilon_after is not None) == (entry.mechanism == "dp_sgd") for entry in report.egress)
    assert all(record.losses.get("east", []) == [] for record in report.rounds)
    assert [record.stage for record in report.rounds] == ["propose", *["adapt"] * STEPS, "student"]
    # No site gave a metric; the simulation, which has everybody's files, measures across sites.
    assert {cell.tested_on for cell in report.benefit} == {"all"}
    page = (run / "report.html").read_text()
    assert "whether or not their images were used" in page
    assert "NO GUARANTEE" not in page
    _the_officers_page(run, spent)
    _verified_and_then_not(run / "sites" / "east")
    _witnessed_by_server_and_peer(run)
    resumed = walks.invoke("simulate", "smoke", "--out", "run", "--resume", *PRIVATE)
    assert resumed.exit_code == 0, resumed.output
    assert walks.report_of(run).privacy["west"].epsilon == report.privacy["west"].epsilon


def _the_officers_page(run: Path, spent: float) -> None:
    """Each site has one, the report links to it, and it states what the accounting gives, rounded up."""
    for site in ("east", "west"):
        folder = run / "sites" / site
        assert f'href="sites/{site}/privacy.html"' in (run / "report.html").read_text()
        assert walks.invoke("privacy", "page", folder, "--check").exit_code == 0
        document = json.loads((folder / "privacy.json").read_text())
        assert document["verdict"]["word"] == "BOUNDED, UNDER NO POLICY"
        assert document["verification"]["holds"] is True
        assert 0 <= document["budget"]["epsilons"][0]["run"] - spent <= 1e-3
        assert document["budget"]["by_step"]["booked"][-1][0] == STEPS
        assert document["federation"]["sites"] == ["east", "west"]
        found = {item["name"]: item["status"] for item in document["hazards"]}
        assert found["The ledger was not cut or rolled back"] == "MET"  # the server kept its head
        assert found["Noise is drawn as strong as claimed"] == "MET"  # it was rehearsed before the run
        assert document["rehearsal"]["figures"]["sampler"]["asked_rate"] == 0.5


def test_a_private_run_of_b_alone_keeps_the_public_a_and_is_verified(elsewhere: Path) -> None:
    """Factors at the encoder beside the decoder's head: A is to the end what the plan names."""
    chosen = ("teacher.adapter=dp", "teacher.decoder=head", "aggregation.rule=ffa", "baselines=[]")
    done = walks.invoke("simulate", "smoke", "--out", "run", *PRIVATE, *chosen)
    assert done.exit_code == 0, done.output
    assert walks.report_of(elsewhere / "run").privacy["west"].guarantee
    for site in ("east", "west"):
        verified = walks.invoke("privacy", "verify", "--bundle", f"run/sites/{site}", "--json")
        assert verified.exit_code == 0
        assert json.loads(verified.stdout)["egress"]["without_mechanism"] == 0
        plan = RunPlan.from_json((elsewhere / "run" / "sites" / site / "plan.json").read_text())
        taught = Adapter.load(elsewhere / "run" / "teacher" / "adapter.safetensors")
        assert taught.a_sha256 == plan.variants[0].a_sha256 != ""
        assert any(t.any() for name, t in taught.tensors.items() if name.endswith(".lora_B"))
    listed = json.loads(walks.invoke("teacher", "info", "ward-sam-tiny", "--json").stdout)["presets"]["dp"]
    assert listed["a_matrix_sha256"]["4"] == taught.a_sha256


def _verified_and_then_not(site: Path) -> None:
    """The record holds as the run left it, and one flipped byte of the ledger is enough that it does not."""
    assert walks.invoke("privacy", "verify", "--bundle", site).exit_code == 0
    ledger = site / "ledger.jsonl"
    whole = ledger.read_bytes()
    middle = len(whole) // 2
    ledger.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert walks.invoke("privacy", "verify", "--bundle", site).exit_code == 22
    ledger.write_bytes(whole)
    found = json.loads(walks.invoke("privacy", "verify", "--bundle", site, "--json").stdout)
    assert found["egress"]["without_mechanism"] == 0


def _witnessed_by_server_and_peer(run: Path) -> None:
    """Both have a head of each site; with it, a ledger put back to an older state does not hold."""
    east, server = run / "sites" / "east", run / "state" / HEADS_FILE
    assert [head.site for head in read_heads(server)] == ["east", "west"]
    assert [head.site for head in read_heads(run / "sites" / "west" / WITNESSED)] == ["east"]
    shown = walks.invoke("privacy", "verify", "--bundle", east)
    assert "unwitnessed" in shown.stdout
    for witness in (server, run / "sites" / "west" / WITNESSED):
        shown = walks.invoke("privacy", "verify", "--bundle", east, "--witness", witness)
        assert shown.exit_code == 0
        assert "unwitnessed" not in shown.stdout
    whole = {name: (east / name).read_bytes() for name in (LEDGER, HEAD)}
    lines = whole[LEDGER].splitlines(keepends=True)[:-4]
    last = json.loads(lines[-1])
    (east / LEDGER).write_bytes(b"".join(lines))
    (east / HEAD).write_text(canonical_json({"seq": last["seq"], "hash": last["hash"]}))
    shown = walks.invoke("privacy", "verify", "--bundle", east, "--witness", server)
    assert shown.exit_code == 22
    assert "cut or rolled back" in shown.output
    resumed = walks.invoke("simulate", "smoke", "--out", "run", "--resume", *PRIVATE)
    assert resumed.exit_code == 30, "west alone is one site too few"
    assert "east: REFUSED_LEDGER" in resumed.output
    for name, data in whole.items():
        (east / name).write_bytes(data)
