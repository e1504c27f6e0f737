"""A whole run on the smoke recipe, with the real apps, guard and models: what it leaves, and what it says."""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from pathlib import Path

import pytest
import yaml

from common.adapter import Adapter
from common.canonical import sha256_of_file
from common.config import CONFIG_DIR, load_recipe, load_run_config
from tests.e2e import walks
from tests.e2e.conftest import FinishedRun

SITES = ["east", "west"]
MODELS = {"student", "teacher", "local_only", "local_only_scratch"}
FRAMING = 1.02  # of the adapter's own bytes, at most

# Every field of report.json in contract.md; a list stands for its items, a dict of sites for its values.
CONTRACT: dict[str, set[str]] = {
    "run": {
        "id", "recipe", "seed", "engine", "started", "finished", "wall_s", "cpu_s", "versions",
        "config_sha256", "enforced",
    },
    "sites": {"id", "patients", "images", "train", "val", "test", "student"},
    "teacher": {"name", "params", "trainable", "base_sha256", "adapter_sha256"},
    "rounds": {"index", "stage", "sites", "bytes_up", "bytes_down", "wall_s", "residual", "rejected"},
    "benefit": {"site", "model", "tested_on", "metric", "class", "value", "ci95", "patients"},
    "students": {"name", "params", "sha256", "latency_ms", "teacher_latency_ms"},
    "synthetic": {"generated", "kept", "dropped_inconsistent", "dropped_copy", "copy_rate"},
    "privacy": {
        "unit", "guarantee", "epsilon", "delta", "neighbouring", "sampling", "stages", "ledger_head",
    },
    "egress": {"site", "round", "name", "bytes", "sha256", "mechanism", "epsilon_after"},
}  # fmt: skip
STAGE_FIELDS = {"stage", "mechanism", "noise_multiplier", "sample_rate", "steps", "epsilon"}


# --- what a run leaves ------------------------------------------------------------------------------


def test_a_run_leaves_the_folder_of_the_contract(smoke_run: FinishedRun) -> None:
    run = smoke_run.run
    expected = [
        "config.yaml", "events.jsonl", "report.json", "report.html", "teacher/adapter.safetensors",
        "teacher/card.json", "state",
        *(f"sites/{site}/{name}" for site in SITES
          for name in ("receipts.jsonl", "student.safetensors", "student.json", "synthetic",
                       "privacy.html", "privacy.json")),
    ]  # fmt: skip
    assert not [name for name in expected if not (run / name).exists()]
    assert load_run_config(run / "config.yaml") == load_recipe("smoke")
    assert not list(run.rglob("*.part"))
    assert not list(run.rglob("faults.log"))
    card = json.loads((run / "teacher/card.json").read_text())
    adapter = Adapter.load(run / "teacher/adapter.safetensors")
    assert adapter.digest == card["adapter_sha256"] == walks.report_of(run).teacher.adapter_sha256
    for site, entry in walks.report_of(run).students.items():
        assert sha256_of_file(run / "sites" / site / "student.safetensors") == entry.sha256


def test_the_command_says_what_it_does_and_where_the_report_is(smoke_run: FinishedRun) -> None:
    # The run was moved after it ended, so only the last parts of the path are compared.
    assert smoke_run.stdout.splitlines()[-1].endswith("run/report.html")
    for stage in ("proposal", "teacher, round 1", "teacher, round 2", "styles", "students", "evaluation"):
        assert f"s] {stage}\n" in smoke_run.stderr
    assert "Warning" not in smoke_run.stderr


def test_the_report_has_every_field_of_the_contract(smoke_run: FinishedRun) -> None:
    document = json.loads((smoke_run.run / "report.json").read_text())
    assert document["schema"] == 1
    for section, names in CONTRACT.items():
        value = document[section]
        keyed_by_site = section in ("students", "synthetic", "privacy")
        entries = list(value.values()) if keyed_by_site else value if isinstance(value, list) else [value]
        assert entries, section
        assert not [names - set(entry) for entry in entries if names - set(entry)], section
        if keyed_by_site:
            assert sorted(value) == SITES
    stages = [stage for entry in document["privacy"].values() for stage in entry["stages"]]
    assert stages
    assert all(set(stage) >= STAGE_FIELDS for stage in stages)


def test_every_model_is_tested_at_home_and_everywhere(smoke_run: FinishedRun) -> None:
    report = walks.report_of(smoke_run.run)
    cells = Counter((cell.site, cell.model, cell.tested_on, cell.metric) for cell in report.benefit)
    wanted = {
        (site, model, where, metric)
        for site in SITES for model in MODELS for where in ("own", "all")
        for metric in ("dice", "hd95", "nsd")
    }  # fmt: skip
    assert set(cells) == wanted
    assert set(cells.values()) == {1}  # one class
    for cell in report.benefit:
        assert cell.patients == ({"own": 3, "all": 6}[cell.tested_on] if cell.value is not None else 0)
        assert (cell.value is None) == (cell.ci95 is None)
        assert cell.value is not None or cell.reason
    dice = [cell for cell in report.benefit if cell.metric == "dice"]
    assert all(cell.value is not None and 0 <= cell.value <= 1 for cell in dice)


def test_each_sites_adapter_goes_up_in_its_elements_and_two_percent(smoke_run: FinishedRun) -> None:
    report = walks.report_of(smoke_run.run)
    adapter = Adapter.load(smoke_run.run / "teacher/adapter.safetensors")
    assert report.teacher.trainable == adapter.trained().elements
    rounds = [record for record in report.rounds if record.stage == "adapt"]
    assert [record.index for record in rounds] == [0, 1]
    size = report.teacher.trainable * 2  # bfloat16
    for record in rounds:
        assert sorted(record.bytes_up) == SITES
        assert all(size <= moved <= size * FRAMING for moved in record.bytes_up.values())


def test_every_payload_of_a_round_has_its_receipt_and_no_other_has_one(smoke_run: FinishedRun) -> None:
    report = walks.report_of(smoke_run.run)
    one_each = {"propose": ["answer"], "adapt": ["adapt.adapter", "adapt.numbers"], "style": ["style"],
                "student": ["note"], "evaluate": ["metrics"]}  # fmt: skip
    for site in SITES:
        left = [
            (record.index, name)
            for record in report.rounds if site in record.sites for name in one_each[record.stage]
        ]  # fmt: skip
        receipts = walks.receipts_of(smoke_run.run, site)
        assert [(entry["round"], entry["name"]) for entry in receipts] == left
        shown = [(entry.round, entry.name, entry.sha256) for entry in report.egress if entry.site == site]
        assert shown == [(entry["round"], entry["name"], entry["sha256"]) for entry in receipts]


def test_the_page_is_made_of_the_report_and_promises_nothing(smoke_run: FinishedRun) -> None:
    report, page = walks.report_of(smoke_run.run), (smoke_run.run / "report.html").read_text()
    assert report.run.enforced is False
    assert not any(entry.guarantee or entry.epsilon is not None for entry in report.privacy.values())
    assert "NO GUARANTEE" in page
    assert report.teacher.adapter_sha256[:8] in page
    assert {picture.kind for picture in report.pictures} == {"cases", "synthetic"}
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "the page loads nothing"


def test_each_officers_page_promises_nothing_either(smoke_run: FinishedRun) -> None:
    for site in SITES:
        folder = smoke_run.run / "sites" / site
        document = json.loads((folder / "privacy.json").read_text())
        assert (document["guarantee"], document["verdict"]["word"]) == (False, "NO GUARANTEE")
        receipts = (folder / "receipts.jsonl").read_text().splitlines()
        bare = [line for line in receipts if '"mechanism":"none"' in line]
        assert document["egress"]["payloads"] == len(receipts)
        assert document["egress"]["without_mechanism"] == len(bare) == len(receipts) - 1, "but for its word"
        assert "NO GUARANTEE" in (folder / "privacy.html").read_text()


def test_synthetic_images_stay_in_their_sites_folder(smoke_run: FinishedRun) -> None:
    run, report = smoke_run.run, walks.report_of(smoke_run.run)
    for site in SITES:
        kept = sorted(path.name for path in (run / "sites" / site / "synthetic").glob("*.png"))
        numbers = range(report.synthetic[site].kept)
        assert kept == sorted(f"{n:04d}{part}.png" for n in numbers for part in ("", "_mask"))
        assert report.synthetic[site].generated == load_recipe("smoke").generator.images
    homes = {path.relative_to(run).parts[:3:2] for path in run.rglob("*.png")}
    assert homes == {("sites", "data"), ("sites", "synthetic")}, "sites/SITE/data and sites/SITE/synthetic"


# --- the same seed ----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights(smoke_run: FinishedRun, elsewhere: Path) -> None:
    assert walks.invoke("simulate", "smoke", walks.QUICK, "--out", "again").exit_code == 0
    assert walks.digests(Path("again")) == walks.digests(smoke_run.run)
    assert walks.report_of(Path("again")).run.id != walks.report_of(smoke_run.run).run.id


def test_another_seed_gives_other_weights(smoke_run: FinishedRun, elsewhere: Path) -> None:
    assert walks.invoke("simulate", "smoke", walks.QUICK, "run.seed=1", "--out", "other").exit_code == 0
    first, other = walks.digests(smoke_run.run), walks.digests(Path("other"))
    assert first.keys() == other.keys()
    assert not [name for name in first if first[name] == other[name]]


@pytest.mark.slow
def test_ray_gives_the_weights_of_loopback_and_leaves_no_process(
    smoke_run: FinishedRun, elsewhere: Path
) -> None:
    token = secrets.token_hex(16)
    done = walks.wardround(
        "simulate", "smoke", walks.QUICK, "--engine", "ray", "--out", "ray", WARDROUND_TEST_TOKEN=token
    )
    assert done.returncode == 0, done.stderr
    assert not processes_with(token)
    assert walks.digests(Path("ray")) == walks.digests(smoke_run.run)
    assert walks.report_of(Path("ray")).run.engine == "ray"


def processes_with(token: str) -> list[str]:
    """The command of every live process that was started with ``token`` in its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended while we looked, or is another user's
    return found


def test_no_shipped_recipe_asks_for_more_than_twenty_denoiser_calls() -> None:
    files = [yaml.safe_load(path.read_text()) for path in sorted(CONFIG_DIR.glob("*.yaml"))]
    steps = [
        file["generator"]["sampler_steps"] for file in files if "sampler_steps" in file.get("generator", {})
    ]
    assert len(steps) >= 2, "base.yaml, smoke.yaml, and whoever else sets it"
    assert max(steps) <= 20
