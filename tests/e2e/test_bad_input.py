"""Bad input as a user gives it: its exit code, and a message that names the fix."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from client.manifest_rows import FaultKind
from common.adapter import Adapter
from common.config import load_recipe, save_run_config
from common.recipe import PhantomConfig
from simulations.phantoms import write_site
from tests.e2e import walks
from tests.e2e.conftest import FinishedRun

pytestmark = pytest.mark.usefixtures("elsewhere")


# --- recipes ----------------------------------------------------------------------------------------

FIVE_FAULTS = """
run: {rounds: two, min_sitez: 2}
teacher: {rank: -1}
student: {name: unet-xxl}
sites:
  - {name: north, phantom: {anatomy: cells}}
  - {name: south, phantom: {anatomy: bones}}
"""


def test_a_recipe_with_five_faults_has_five_lines_each_with_its_fix() -> None:
    Path("mine.yaml").write_text(FIVE_FAULTS)
    result = walks.wardround("simulate", "mine.yaml", "--out", "run")
    assert result.returncode == 10
    lines = walks.fault_lines(result.stderr)
    assert len(lines) == 5, result.stderr
    for key in ("run.rounds", "run.min_sitez", "teacher.rank", "student.name", "sites[1].phantom.anatomy"):
        (line,) = [line for line in lines if f"mine.yaml: {key}" in line]
        assert ";" in line, "what is wrong; the fix"
    assert "did you mean run.min_sites?" in result.stderr
    assert not Path("run").exists()


def test_an_unknown_recipe_names_the_nearest() -> None:
    result = walks.wardround("simulate", "smokee")
    assert result.returncode == 10
    assert "did you mean smoke?" in result.stderr
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("root", "fix"), [((), "data.root=FOLDER"), (("data.root=nowhere",), "data.root=FOLDER")]
)
def test_a_missing_data_root_says_how_to_give_it(root: tuple[str, ...], fix: str) -> None:
    result = walks.wardround("simulate", "retina", *root, "--out", "run")
    assert result.returncode == 10
    assert fix in result.stderr
    assert not Path("run").exists()


def test_a_data_root_without_the_sets_names_them() -> None:
    Path("empty").mkdir()
    result = walks.wardround("simulate", "retina", "data.root=empty", "--out", "run")
    assert result.returncode == 10
    assert len(walks.fault_lines(result.stderr)) == 4, "one a site"
    assert str(Path("empty/CHASE_DB1").resolve()) in result.stderr
    assert not Path("run").exists()


def test_a_folder_that_is_taken_is_left_alone() -> None:
    Path("taken").mkdir()
    Path("taken/thesis.txt").write_text("not yours")
    result = walks.wardround("simulate", "smoke", "--out", "taken")
    assert result.returncode == 2
    assert "--resume" in result.stderr
    assert [path.name for path in Path("taken").iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_exits_with_2() -> None:
    Path("file").touch()
    result = walks.invoke("simulate", "smoke", "--out", "file/run")
    assert result.exit_code == 2, result.stderr
    assert "another --out" in result.stderr


# --- data -------------------------------------------------------------------------------------------


def picture(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size), dtype=np.uint8))


def mask(label: int, size: int = 32) -> Image.Image:
    values = np.zeros((size, size), np.uint8)
    values[4:12, 4:12] = label
    return Image.fromarray(values)


def manifest_with_every_fault() -> Path:
    folder = Path("data")
    folder.mkdir()
    rows = [["image", "mask", "patient", "split"]]

    def add(name: str, patient: str, split: str, label: int = 255, mask_size: int = 32) -> None:
        mask(label, mask_size).save(folder / f"{name}-mask.png")
        rows.append([f"{name}.png", f"{name}-mask.png", patient, split])

    for number, name in enumerate(("good", "small", "label", "empty", "copied", "apart", "again")):
        picture(number).save(folder / f"{name}.png")
    add("good", "a", "test")
    add("absent", "b", "train")  # no such file
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:100])
    add("broken", "c", "train")
    add("small", "d", "val", mask_size=16)
    add("label", "e", "val", label=7)
    add("empty", "f", "val", label=0)
    add("copied", "g", "val")
    shutil.copy(folder / "copied.png", folder / "copy.png")
    add("copy", "h", "test")  # the same pixels, another patient and split
    add("apart", "i", "val")
    add("again", "i", "test")  # one patient on both sides
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(folder / "nan.tif")
    rows.append(["nan.tif", "", "j", "val"])
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_data_check_names_every_fault_of_the_contract_at_once() -> None:
    manifest = manifest_with_every_fault()
    result = walks.invoke("data", "check", manifest, "--min-patients", "3", "--json")
    assert result.exit_code == 11
    found = json.loads(result.stdout)
    kinds = {entry["kind"]: entry for entry in found["faults"]}
    assert set(kinds) == {
        FaultKind.missing_file, FaultKind.unreadable_file, FaultKind.size_mismatch,
        FaultKind.undeclared_label, FaultKind.empty_mask, FaultKind.duplicate_pixels,
        FaultKind.patient_in_two_splits, FaultKind.not_finite, FaultKind.too_few_patients,
    }  # fmt: skip
    lines = manifest.read_text().splitlines()
    named = {"missing_file": "absent.png", "unreadable_file": "broken.png", "size_mismatch": "small.png",
             "undeclared_label": "label.png", "empty_mask": "empty.png", "duplicate_pixels": "copy.png",
             "patient_in_two_splits": "again.png", "not_finite": "nan.tif"}  # fmt: skip
    for kind, image in named.items():
        assert lines[kinds[kind]["line"] - 1].startswith(image), kind

    plain = walks.invoke("data", "check", manifest, "--min-patients", "3")
    assert plain.exit_code == 11
    errors = [entry for entry in found["faults"] if not entry["warning"]]
    assert len(walks.fault_lines(plain.stderr)) == len(errors) == len(found["faults"]) - 1
    assert "warning: line 7: mask empty-mask.png is empty" in plain.stdout


def hospitals(label: int) -> Path:
    """A recipe of two hospitals with manifests of their own; one mask at ``west`` has ``label``."""
    plain = yaml.safe_load((walks.ROOT / "configs/smoke.yaml").read_text())
    for site in plain["sites"]:
        phantom = replace(PhantomConfig(), anatomy="cells", train_patients=3, val_patients=1, test_patients=3,
                          images_per_patient=1, image_size=64)  # fmt: skip
        folder = Path("hospitals") / site["name"]
        site.pop("phantom")
        site["manifest"] = str(write_site(phantom, folder, 0, site["name"]).resolve())
    mask(label, 64).save("hospitals/west/masks/p001-0.png")
    Path("two.yaml").write_text(yaml.safe_dump(plain))
    return Path("hospitals/west/manifest.csv")


def test_a_mask_with_an_undeclared_label_ends_the_run_and_is_named_only_at_its_site() -> None:
    manifest = hospitals(label=7)
    result = walks.invoke("simulate", "two.yaml", "--out", "run")
    assert result.exit_code == 30, result.stderr
    (line,) = walks.fault_lines(result.stderr)
    assert line.endswith(": REFUSED_LOCAL"), "why is the site's own business"
    assert "faults.log" in result.stderr
    log = Path("run/sites/west/faults.log").read_text()
    assert "mask p001-0.png has undeclared labels 7" in log
    assert "declare them in data.classes or correct the mask" in log
    for said in (result.stderr, Path("run/events.jsonl").read_text()):
        assert "p001" not in said
        assert "undeclared" not in said
    checked = walks.invoke("data", "check", manifest)
    assert checked.exit_code == 11
    assert "undeclared labels 7" in checked.stderr

    mask(255, 64).save("hospitals/west/masks/p001-0.png")
    assert walks.invoke("data", "check", manifest).exit_code == 0


def test_a_manifest_that_is_gone_exits_with_a_message_that_names_it() -> None:
    manifest = hospitals(label=255)
    manifest.unlink()
    result = walks.wardround("simulate", "two.yaml", "--out", "run")
    assert result.returncode in (10, 11)
    assert str(manifest.resolve()) in result.stderr
    assert "sites[1].manifest" in result.stderr or "sites.west.manifest" in result.stderr


# --- artefacts --------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(smoke_run: FinishedRun, elsewhere: Path) -> None:
    run = smoke_run.copy(elsewhere)
    path = run / "teacher/adapter.safetensors"
    replace(Adapter.load(path), base_sha256="ab" * 32).save(path)
    result = walks.invoke("simulate", "smoke", "--out", run, "--resume")
    assert result.exit_code == 12
    assert f"{path} belongs to base abababababab" in result.stderr
    assert "remove it and run again with --resume" in result.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [({"preset": "wide"}, "is wide of rank 8"), ({"rank": 4}, "is base of rank 4")],
    ids=["preset", "rank"],
)
def test_an_adapter_of_another_preset_or_rank_is_refused(
    smoke_run: FinishedRun, elsewhere: Path, change: dict[str, Any], said: str
) -> None:
    run = smoke_run.copy(elsewhere)
    path = run / "teacher/adapter.safetensors"
    replace(Adapter.load(path), **change).save(path)
    result = walks.invoke("simulate", "smoke", "--out", run, "--resume")
    assert result.exit_code == 12
    assert f"{path} {said}, this run's is base of rank 8" in result.stderr


def test_an_adapter_that_is_not_the_runs_is_refused(smoke_run: FinishedRun, elsewhere: Path) -> None:
    run = smoke_run.copy(elsewhere)
    path = run / "teacher/adapter.safetensors"
    adapter, digest = Adapter.load(path), Adapter.load(path).digest
    name = next(iter(adapter.tensors))
    replace(adapter, tensors={**adapter.tensors, name: adapter.tensors[name] + 1}).save(path)
    result = walks.invoke("simulate", "smoke", "--out", run, "--resume")
    assert result.exit_code == 12
    assert f"{path} is not the adapter that this run ended with" in result.stderr

    path.unlink()  # as the message says
    result = walks.invoke("simulate", "smoke", "--out", run, "--resume")
    assert result.exit_code == 0, result.stderr
    assert Adapter.load(path).digest == digest


def test_a_state_of_another_plan_is_refused_with_the_differences(
    smoke_run: FinishedRun, elsewhere: Path
) -> None:
    run = smoke_run.copy(elsewhere)
    save_run_config(load_recipe("smoke", ["run.seed=1"]), run / "config.yaml")
    result = walks.invoke("simulate", "smoke", "run.seed=1", "--out", run, "--resume")
    assert result.exit_code == 12
    assert "another plan" in result.stderr
    assert walks.fault_lines(result.stderr) == ["  - seed: 0 in the state, 1 now"]
    assert "run into another folder" in result.stderr


def test_a_run_of_other_code_is_not_resumed_in_silence(
    smoke_run: FinishedRun, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = smoke_run.copy(elsewhere)
    monkeypatch.setattr("server.planning.code_sha256", lambda: "0" * 64)
    result = walks.invoke("simulate", "smoke", "--out", run, "--resume")
    assert result.exit_code == 12
    assert "code_sha256" in result.stderr


# --- a student at work ------------------------------------------------------------------------------


def test_a_student_that_is_missing_exits_with_12(smoke_run: FinishedRun) -> None:
    site = smoke_run.run / "sites/east"
    result = walks.invoke(
        "student", "predict", site / "stduent.safetensors", site / "data/images", "--out", "m"
    )
    assert result.exit_code == 12
    assert "stduent.safetensors is missing" in result.stderr
    assert not Path("m").exists()


def test_one_corrupt_image_exits_with_11_and_the_good_ones_are_done(smoke_run: FinishedRun) -> None:
    site = smoke_run.run / "sites/east"
    good = sorted((site / "data/images").glob("*.png"))[:3]
    Path("images").mkdir()
    for path in good:
        shutil.copy(path, "images")
    Path("images/torn.png").write_bytes(good[0].read_bytes()[:200])
    result = walks.invoke("student", "predict", site / "student.safetensors", "images", "--out", "masks")
    assert result.exit_code == 11
    (line,) = walks.fault_lines(result.stderr)
    assert "images/torn.png cannot be read" in line
    assert sorted(path.name for path in Path("masks").iterdir()) == [path.name for path in good]
    for path in good:
        with Image.open(path) as image, Image.open(Path("masks") / path.name) as found:
            assert found.size == image.size
            assert set(np.unique(np.asarray(found))) <= {0, 255}


def test_a_student_is_measured_on_its_runs_own_manifest(smoke_run: FinishedRun) -> None:
    site = smoke_run.run / "sites/east"
    result = walks.invoke(
        "student", "evaluate", site / "student.safetensors", site / "data/manifest.csv", "--json"
    )
    assert result.exit_code == 0, result.stderr
    measured = {entry["metric"]: entry["value"] for entry in json.loads(result.stdout)}
    reported = {
        cell.metric: cell.value for cell in walks.report_of(smoke_run.run).benefit
        if (cell.site, cell.model, cell.tested_on) == ("east", "student", "own")
    }  # fmt: skip
    assert measured == pytest.approx(reported, abs=1e-6)


# --- the report -------------------------------------------------------------------------------------


def test_report_makes_the_same_page_again_byte_for_byte(smoke_run: FinishedRun, elsewhere: Path) -> None:
    before = (smoke_run.run / "report.html").read_bytes()
    Path("run").mkdir()
    shutil.copy(smoke_run.run / "report.json", "run")
    result = walks.wardround("report", "run")
    assert result.returncode == 0, result.stderr
    assert Path("run/report.html").read_bytes() == before, "from report.json alone"
    assert "run/report.html" in result.stdout
