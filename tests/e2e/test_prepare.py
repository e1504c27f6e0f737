"""Public sets as a user prepares them: `data prepare`, `data check`, `simulate`; and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from client.preparation.catalogue import CATALOGUE
from client.preparation.pictures import read_labels
from tests.e2e import walks
from tests.official_layouts import LAYOUTS
from tests.official_pixels import Layout, save
from wardround import main

pytestmark = pytest.mark.usefixtures("elsewhere")

EVERY = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def prepare(layout: Layout, dest: str = "made", *options: str) -> Result:
    if not Path("source").exists():
        layout.write(Path("source"), 0)
    return walks.invoke("data", "prepare", layout.name, "source", dest, "--accept-licence", *options)


def check(manifest: Path, name: str) -> Result:
    values = dict.fromkeys(value for item in CATALOGUE[name].classes for value in item.values)
    return walks.invoke("data", "check", manifest, *(f"--label={value}" for value in values), "--json")


def rows_of(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_set_of_the_catalogue_has_a_layout_here() -> None:
    assert set(LAYOUTS) == set(CATALOGUE)
    assert len(LAYOUTS) == 11, "ten sets, one of them in two halves"


# --- what comes out ---------------------------------------------------------------------------------


@EVERY
def test_the_official_layout_becomes_a_manifest_that_data_check_passes(layout: Layout) -> None:
    done = prepare(layout, "made", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    manifest = Path("made/manifest.csv")
    checked = check(manifest, layout.name)
    assert checked.exit_code == 0, checked.stderr
    found = json.loads(checked.stdout)
    assert found["faults"] == [], "not even a warning: no mask is empty and no image there twice"
    assert (found["images"], found["patients"]) == (layout.images, layout.patients)
    assert (told["images"], told["labelled"], told["patients"]) == (
        layout.images,
        layout.images,
        layout.patients,
    )
    rows = rows_of(manifest)
    assert sum(told["splits"].values()) == len({row["patient"] for row in rows}) == layout.patients
    assert told["splits"]["train"] >= 2
    assert told["splits"]["test"] >= 2
    assert {path.name for path in Path("made").iterdir()} == {"manifest.csv", "about.json", "images", "masks"}
    assert not list(Path.cwd().glob(".made*")), "nothing is left beside it"
    named = {row["image"] for row in rows} | {row["mask"] for row in rows}
    assert named == {path.relative_to("made").as_posix() for path in Path("made").rglob("*.png")}


@EVERY
def test_masks_hold_the_classes_that_are_told_and_cover_what_is_bright(layout: Layout) -> None:
    """The bright things of the copies are their objects: a mask turned, shifted or of another slice shows."""
    assert prepare(layout).exit_code == 0
    known = {0} | {value for item in CATALOGUE[layout.name].classes for value in item.values}
    seen = set()
    for row in rows_of(Path("made/manifest.csv")):
        image = np.asarray(Image.open(Path("made") / row["image"])).astype(float)
        mask = np.asarray(Image.open(Path("made") / row["mask"]))
        grey = image if image.ndim == 2 else image.mean(axis=2)
        assert grey.shape == mask.shape
        seen |= set(np.unique(mask).tolist())
        inside, outside = grey[mask > 0], grey[mask == 0]
        assert np.percentile(inside, 20) > np.percentile(outside, 80), row
    assert seen == known


@EVERY
def test_preparing_twice_gives_the_same_bytes(layout: Layout) -> None:
    for dest in ("one", "two"):
        assert prepare(layout, dest).exit_code == 0
    files = sorted(path.relative_to("one") for path in Path("one").rglob("*") if path.is_file())
    for path in files:
        assert (Path("one") / path).read_bytes() == (Path("two") / path).read_bytes(), path


def test_another_seed_deals_otherwise_and_is_told() -> None:
    layout = LAYOUTS["ph2"]
    for seed in ("0", "1"):
        told = json.loads(prepare(layout, f"seed{seed}", "--seed", seed, "--json").stdout)
        assert told["seed"] == int(seed)
    splits = [[row["split"] for row in rows_of(Path(f"seed{seed}/manifest.csv"))] for seed in "01"]
    assert splits[0] != splits[1]
    assert sorted(splits[0]) == sorted(splits[1])
    assert json.loads(prepare(LAYOUTS["ph2"], "again", "--json").stdout)["splits"] == {
        "train": 5,
        "val": 1,
        "test": 2,
    }


# --- a run over each ---------------------------------------------------------------------------------

RUNS = {
    "binary": [name for name, known in CATALOGUE.items() if known.classes[0].label == 255],
    "abdomen": ["chaos-ct", "chaos-mr"],
    "kidneys": ["kidneyus", "kidneyus"],
}


def test_every_set_is_in_a_run() -> None:
    assert {name for names in RUNS.values() for name in names} == set(CATALOGUE)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_run_over_the_prepared_manifests(run: str) -> None:
    """A site a set (of KidneyUS two copies): every stage, from the manifests to students and a report."""
    sites = []
    for number, name in enumerate(RUNS[run]):
        LAYOUTS[name].write(Path(f"source-{number}"), number)
        site = f"{name.replace('_', '-')}-{number}"
        done = walks.invoke("data", "prepare", name, f"source-{number}", site, "--accept-licence")
        assert done.exit_code == 0, done.stderr
        sites.append({"name": site, "manifest": str(Path(site, "manifest.csv").resolve())})
    recipe = recipe_of(sites, RUNS[run][-1])
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = walks.invoke("simulate", "recipe.yaml", "--out", "run", "--quiet")
    assert done.exit_code == 0, done.stderr
    report = walks.report_of(Path("run"))
    told = {site.id: (site.patients, site.images) for site in report.sites}
    layouts = [LAYOUTS[name] for name in RUNS[run]]
    assert told == {
        site["name"]: (layout.patients, layout.images) for site, layout in zip(sites, layouts, strict=True)
    }
    assert set(report.students) == set(told)


def recipe_of(sites: list[dict[str, str]], classes_of: str) -> dict[str, Any]:
    classes = [
        {"name": item.name, "label": item.label, "like": item.like, "also": list(item.also)}
        for item in CATALOGUE[classes_of].classes
    ]
    return {
        "name": "prepared",
        "description": "Small copies of public sets, one step of everything.",
        "run": {"rounds": 1},
        "data": {"image_size": 32, "longest_side": 48, "classes": classes},
        "sites": sites,
        "teacher": {"steps": 1, "batch_size": 2},
        "generator": {"scope": "none"},
        "student": {"steps": 1, "batch_size": 2, "transfer_batch_size": 2},
        "policy": {"min_group_patients": 2, "min_cell_patients": 2},
        "evaluation": {"bootstrap": 20},
        "baselines": [],
    }


# --- what is refused --------------------------------------------------------------------------------


@EVERY
def test_a_missing_folder_a_renamed_file_and_a_miscoded_mask_are_told_at_once(layout: Layout) -> None:
    layout.write(Path("source"), 0)
    spoiled = layout.spoil(Path("source"))
    done = prepare(layout, "made", "--json")
    assert done.exit_code == 11, done.stderr
    lines = walks.fault_lines(done.stderr)
    for told in vars(spoiled).values():
        assert [line for line in lines if told in line], f"{told!r} is not in {lines}"
    assert len(lines) <= 5, "few lines more than there are causes"
    assert all(": " in line for line in lines), "each with its fix"
    assert json.loads(done.stdout)["faults"] == [line.removeprefix("  - ") for line in lines]
    assert {path.name for path in Path.cwd().iterdir()} == {"source"}, "no DEST, and no half of one"


@pytest.mark.parametrize(
    ("name", "folder"), [(layout.name, folder) for layout in LAYOUTS.values() for folder in layout.folders]
)
def test_each_missing_folder_is_named_once_and_not_file_by_file(name: str, folder: str) -> None:
    LAYOUTS[name].write(Path("source"), 0)
    Path("source", folder).rename("elsewhere")
    done = prepare(LAYOUTS[name])
    assert done.exit_code == 11
    (line,) = walks.fault_lines(done.stderr)
    assert f"{folder} is missing" in line


PICTURES = [layout for layout in LAYOUTS.values() if layout.name != "kidneyus"]  # its masks are polygons


@pytest.mark.parametrize("layout", PICTURES, ids=lambda layout: layout.name)
def test_a_broken_file_and_a_mask_of_another_size_are_told(layout: Layout) -> None:
    layout.write(Path("source"), 0)
    image, mask = broken_and_shrunk(layout)
    done = prepare(layout)
    assert done.exit_code == 11, done.stderr
    lines = walks.fault_lines(done.stderr)
    assert [line for line in lines if image in line and "cannot be read" in line], lines
    assert [line for line in lines if mask in line and ("size" in line or "pixels (rows" in line)], lines
    assert not Path("made").exists()


def broken_and_shrunk(layout: Layout) -> tuple[str, str]:
    """Cut one image off, and leave out every other column of another's mask; what each is told by."""
    files = sorted(path for path in Path("source").rglob("*") if path.is_file())
    words = (
        "1st_manual",
        "_1stHO",
        "manual1",
        "labels-ah",
        "vessel-seg",
        "_lesion",
        "Ground",
        "masks",
        "mask_t",
    )
    masks = [path for path in files if any(word in path.as_posix() for word in words)]
    aside = ("2ndHO", "/mask/", ".xlsx", ".csv")
    images = [
        path for path in files if path not in masks and not any(word in path.as_posix() for word in aside)
    ]
    images[0].write_bytes(images[0].read_bytes()[:60])
    save(read_labels(masks[-1])[:, ::2], masks[-1])
    return images[0].name, masks[-1].name


def test_the_terms_are_shown_and_must_be_accepted() -> None:
    LAYOUTS["autooral"].write(Path("source"), 0)
    refused = walks.invoke("data", "prepare", "autooral", "source", "made")
    assert refused.exit_code == 2
    for told in (
        "not allowed",
        "do not publish the weights",
        "github.com/wurenkai",
        "Jiang et al.",
        "--accept-licence",
    ):
        assert told in " ".join(refused.stderr.split()), told
    assert not Path("made").exists()
    assert not refused.stdout


@pytest.mark.parametrize(("answer", "made"), [("y", True), ("n", False)])
def test_on_a_terminal_the_terms_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, answer: str, made: bool
) -> None:
    LAYOUTS["stare"].write(Path("source"), 0)
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True)
    done = CliRunner().invoke(main, ["data", "prepare", "stare", "source", "made"], input=f"{answer}\n")
    assert "accept them?" in done.stderr
    assert done.exit_code == (0 if made else 2), done.stderr
    assert Path("made").exists() == made


def test_an_existing_destination_is_left_alone() -> None:
    Path("made").mkdir()
    Path("made/thesis.txt").write_text("not yours")
    done = prepare(LAYOUTS["stare"])
    assert done.exit_code == 2
    assert "new folder" in done.stderr
    assert [path.name for path in Path("made").iterdir()] == ["thesis.txt"]


def test_an_unknown_set_names_the_nearest() -> None:
    done = walks.invoke("data", "prepare", "chase", "source", "made", "--accept-licence")
    assert done.exit_code == 2
    assert "chase_db1" in done.stderr


@pytest.mark.parametrize("made", [False, True])
def test_a_source_that_is_missing_or_empty_is_told(made: bool) -> None:
    if made:
        Path("source").mkdir()
    done = walks.invoke("data", "prepare", "drive", "source", "made", "--accept-licence")
    assert done.exit_code == 11
    assert "is missing" in done.stderr
    assert not Path("made").exists()


def test_an_interrupt_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from client.preparation import preparing

    monkeypatch.setattr(
        preparing, "_write_manifest", walks.raising(KeyboardInterrupt(), preparing._write_manifest)
    )
    done = prepare(LAYOUTS["hrf"])
    assert done.exit_code == 130
    assert {path.name for path in Path.cwd().iterdir()} == {"source"}


def test_the_overview_lists_every_set_and_one_in_full() -> None:
    listed = walks.invoke("data", "sets")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(CATALOGUE)
    one = walks.invoke("data", "sets", "chaos-mr")
    for told in ("T2SPIR", "CC BY-NC-SA 4.0", "Kavur", "every slice"):
        assert told in one.stdout
    (entry,) = json.loads(walks.invoke("data", "sets", "chase_db1", "--json").stdout)
    assert entry["terms"]["commercial"] is True
    assert entry["unit"].startswith("a child")


def test_a_source_that_may_not_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    LAYOUTS["ph2"].write(Path("source"), 0)
    refused = PermissionError(13, "Permission denied", "source/PH2 Dataset images")
    monkeypatch.setattr(Path, "iterdir", walks.raising(refused, Path.iterdir))
    done = walks.invoke("data", "prepare", "ph2", "source", "made", "--accept-licence")
    assert done.exit_code == 11
    assert "Permission denied" in done.stderr
