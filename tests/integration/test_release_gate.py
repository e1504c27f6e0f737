"""No synthetic image leaves a hospital but through the gate, which says no by default and books the rest."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import client.site as site_module
from client.curation.release import Origin, origin_of
from client.egress import RECEIPTS
from client.patients import Split
from client.site import Site
from client.transfer.gallery import GENERATOR_FILE, SYNTHETIC, save_synthetic
from client.transfer.sets import TransferSet
from common.canonical import sha256_of
from common.config import load_recipe, save_site
from common.generator import initial_adapter
from common.plan import RunPlan
from common.privacy.budget import Caps
from common.privacy.bundle import read_bundle
from common.privacy.entries import Context, Entry, EntryType
from common.privacy.events import Event
from common.privacy.keys import public_key
from common.privacy.ledger import Ledger
from common.privacy.policy import policy_from, sign_policy, template
from common.privacy.receipts import read_receipts
from common.privacy.verify import Evidence, verify
from common.recipe import SiteFile
from server.planning import build_plan
from simulations.phantoms import write_site
from wardround import main

TRAIN, OTHERS, IMAGES = 4, 12, 5


@dataclass
class Home:
    """One hospital after a run that left synthetic images, with an officer who may sign."""

    folder: Path
    plan: RunPlan
    officer: Ed25519PrivateKey

    @property
    def ledger(self) -> Ledger:
        return Ledger.open(self.folder, Caps(1e-5))

    def entries(self, kind: EntryType) -> list[Entry]:
        return [entry for entry in self.ledger.entries if entry.type is kind]

    def sign(self, issued: datetime | None = None, **synthetic: Any) -> None:
        """Put a policy in force that has ``synthetic`` as its section."""
        started = issued or datetime.now(UTC) - timedelta(days=1)
        draft = template("east", "M. Ruiz", public_key(self.officer), started)
        draft["synthetic"] |= synthetic
        (self.folder / "officer.pub").write_text(public_key(self.officer))
        save_site(SiteFile("east", officer_key="officer.pub"), self.folder / "site.yaml")
        sign_policy(policy_from(draft, "policy"), self.folder, self.officer)

    def ran(self, scope: str, images: torch.Tensor | None = None) -> None:
        """As if a run with the generator's ``scope`` had left ``images`` here."""
        recipe = load_recipe("smoke", [f"generator.scope={scope}"])
        self.plan = build_plan(recipe, f"run-{scope}")
        Site.open(self.folder).accept(self.plan)
        if images is None:
            images = torch.rand(IMAGES, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        adapter = None if scope == "style" else initial_adapter(self.plan.generator, self.plan.seed)
        if adapter is not None:
            adapter.save(self.folder / GENERATOR_FILE)
        synthetic = torch.ones(len(images), dtype=torch.bool)
        kept = TransferSet(images, (images[:, :1] > 0.5).float(), synthetic)
        save_synthetic(kept, self.folder / SYNTHETIC, self.plan, adapter)

    def trained_with_noise(self) -> None:
        """The ledger says that the generator's steps were noised."""
        context = Context(self.plan.run_id, self.plan.digest)
        self.ledger.reserve(context, "generator", ["p000"], [Event(1.5, 0.5, 3)])

    def export(self, to: Path) -> Result:
        return CliRunner().invoke(main, ["synthetic", "export", str(self.folder), str(to)])

    def check(self, *options: str) -> Result:
        return CliRunner().invoke(main, ["synthetic", "check", str(self.folder), *options])


@pytest.fixture
def home(tmp_path: Path) -> Home:
    folder, recipe = tmp_path / "east", load_recipe("smoke")
    phantom = recipe.sites[0].phantom
    assert phantom is not None
    sizes = {"train_patients": TRAIN, "val_patients": OTHERS, "test_patients": 0, "images_per_patient": 1}
    write_site(replace(phantom, **sizes), folder / "data", 0, "east")
    save_site(SiteFile("east"), folder / "site.yaml")
    Ledger.create(folder, "east", Caps(1e-5))
    site_module._patients.cache_clear()
    made = Home(folder, build_plan(recipe, "run"), Ed25519PrivateKey.generate())
    made.ran("style")
    return made


def refused(home: Home, to: Path, words: str) -> None:
    result = home.export(to)
    assert (result.exit_code, result.stdout) == (20, ""), result.output
    assert words in result.stderr
    assert not to.exists()
    assert not (home.folder / RECEIPTS).exists()
    assert home.entries(EntryType.export) == []
    booked = home.entries(EntryType.refuse)[-1]
    assert booked.detail["code"] == "REFUSED_POLICY"
    assert words.startswith(booked.detail["field"])
    assert booked.stage == SYNTHETIC


def test_by_default_nothing_leaves_and_the_policys_field_is_named(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(home, out, "synthetic.release: this site has no signed policy")
    home.sign()
    refused(home, out, "synthetic.release: no synthetic image may leave")
    home.sign(release="dp_required")
    refused(home, out, "synthetic.release: the policy wants a generator that was trained with differential")
    home.sign(datetime.now(UTC) - timedelta(days=800), release="dp_or_untrained")
    refused(home, out, "expires: the policy has expired")


def test_a_generator_trained_without_noise_lets_nothing_out_and_no_image_is_opened_for_it(
    home: Home, tmp_path: Path
) -> None:
    home.sign(release="dp_or_untrained")
    for scope in ("local", "federated"):
        home.ran(scope)
        (home.folder / "data" / "manifest.csv").unlink(missing_ok=True)
        refused(home, tmp_path / "out", "synthetic.release: the generator was trained on patients without")


def test_what_leaves_is_the_set_and_it_is_booked_as_without_noise(home: Home, tmp_path: Path) -> None:
    home.sign(release="dp_or_untrained")
    result = home.export(tmp_path / "out")
    assert result.exit_code == 0, result.output
    sent = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    there = {path.name: path.read_bytes() for path in (home.folder / SYNTHETIC).iterdir()}
    assert set(sent) == set(there)
    assert len(sent) == 2 * IMAGES + 1
    assert all(data == there[name] for name, data in sent.items() if name.endswith(".png"))
    said = json.loads(sent["provenance.json"])
    assert (said["origin"], said["tests"]) == ("never shown a patient's image", "NOT APPLICABLE")
    assert str(tmp_path) not in sent["provenance.json"].decode()
    (receipt,) = read_receipts((home.folder / RECEIPTS).read_bytes())
    digest = sha256_of({name: sha256_of(data) for name, data in sent.items()})
    assert (receipt.stage, receipt.mechanism, receipt.sha256) == (SYNTHETIC, "none", digest)
    assert digest in result.stdout
    (entry,) = home.entries(EntryType.export)
    assert [(one.sha256, one.bytes) for one in entry.payload] == [(digest, receipt.bytes)]
    assert sum(entry.cohort.classes.values()) == TRAIN
    assert entry.epsilon_after["1e-05"] is None


def test_the_record_of_an_export_holds_unless_the_policy_forbade_it(home: Home, tmp_path: Path) -> None:
    home.sign(release="dp_or_untrained")
    assert home.export(tmp_path / "out").exit_code == 0
    found = verify(read_bundle(home.folder), Evidence())
    assert [fault for fault in found.faults if "synthetic" in fault or "receipt" in fault] == []
    assert any("NO GUARANTEE for stage synthetic" in caution for caution in found.cautions)
    home.sign()
    found = verify(read_bundle(home.folder), Evidence())
    assert any(
        "stage synthetic: something left, and the policy says forbidden" in one for one in found.faults
    )


def test_a_noised_generator_is_let_out_after_tests_on_enough_others(home: Home, tmp_path: Path) -> None:
    home.ran("local")
    home.trained_with_noise()
    home.sign(release="dp_required")
    refused(home, tmp_path / "out", "synthetic.min_holdout: too few patients")
    home.sign(release="dp_required", min_holdout=OTHERS)
    result = home.export(tmp_path / "out")
    assert result.exit_code == 0, result.output
    said = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert said["tests"] == "NO COPY FOUND BY THESE TESTS"
    assert said["origin"] == "trained with differential privacy"


def test_a_copy_keeps_the_whole_set_in_whatever_the_policy_says(home: Home, tmp_path: Path) -> None:
    site = Site.open(home.folder)
    train = [one for one in site.patients(home.plan.data, home.plan.seed) if one.split is Split.train]
    copy = train[2].samples[0].image.rot90(1, (1, 2))
    others = torch.rand(IMAGES, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    home.ran("local", torch.cat([others, copy[None]]))
    home.trained_with_noise()
    home.sign(release="dp_required", min_holdout=1)
    refused(home, tmp_path / "out", "synthetic.release: there are copies of training patients")
    found = home.check("--json")
    assert found.exit_code == 20
    document = json.loads(found.stdout)
    assert (document["verdict"], document["copies"]["covered_patients"]) == ("BLOCKED", 1)
    assert document["copies"]["copied"] == 1


def test_check_says_what_was_tested_and_what_was_not(home: Home) -> None:
    home.sign(release="dp_or_untrained")
    plain = home.check()
    assert plain.exit_code == 0
    assert "VERDICT  NOT APPLICABLE: the generator was never trained on a patient" in plain.stdout
    assert "COPIES" not in plain.stdout
    looked = home.check("--anyway").stdout
    assert (
        f"COPIES  0 of {TRAIN} training patients have a copy among {IMAGES} images (at most 75.0%" in looked
    )
    home.ran("local")
    found = home.check()
    assert found.exit_code == 20
    assert "MEMBERSHIP  4 patients trained on, 12 others: AUC 0.50" in found.stdout
    assert "TPR at 1% FPR: not measurable with 12 others" in found.stdout
    assert "VERDICT  NO COPY FOUND BY THESE TESTS (that is all it says)" in found.stdout
    assert "trained on patients without differential privacy" in found.stderr
    (home.folder / GENERATOR_FILE).unlink()
    assert "VERDICT  NOT TESTED" in home.check().stdout


def test_what_is_not_as_the_run_left_it_or_has_no_place_is_refused(home: Home, tmp_path: Path) -> None:
    home.sign(release="dp_or_untrained")
    for place in (home.folder / "out", tmp_path):
        assert home.export(place).exit_code == 12
    (home.folder / SYNTHETIC / "patient.png").write_bytes(b"slipped in")
    result = home.export(tmp_path / "out")
    assert (result.exit_code, "patient.png: not of this run" in result.stderr) == (12, True)
    (home.folder / SYNTHETIC / "patient.png").unlink()
    (home.folder / "ledger.jsonl").unlink()
    assert home.export(tmp_path / "out").exit_code == 12
    assert not (tmp_path / "out").exists()
    assert not (home.folder / RECEIPTS).exists()


def test_images_of_own_pixels_leave_under_no_policy(home: Home, tmp_path: Path) -> None:
    home.sign(release="dp_or_untrained")
    home.ran("recolour")
    assert origin_of(home.plan, home.ledger.entries) is Origin.own
    result = home.export(tmp_path / "out")
    assert (result.exit_code, "no policy lets them go" in result.stderr) == (20, True)
    assert not (tmp_path / "out").exists()


def test_where_a_generator_comes_from_is_told_by_the_ledger_alone(home: Home) -> None:
    home.ran("local")
    assert origin_of(home.plan, home.ledger.entries) is Origin.trained
    home.trained_with_noise()
    assert origin_of(home.plan, home.ledger.entries) is Origin.noised
    assert origin_of(replace(home.plan, run_id="another"), home.ledger.entries) is Origin.trained
    home.ledger.declare_unprotected(Context(home.plan.run_id), "generator", ["p001"])
    assert origin_of(home.plan, home.ledger.entries) is Origin.trained
