"""Cutting real sets into hospitals: small sets of the same layout, and the real ones where they are."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.data import load_patients
from client.manifest import ManifestRow, check_manifest, read_manifest
from client.patients import Split
from common.errors import ConfigError, DataError
from common.recipe import CohortConfig, CutConfig, DataConfig, PhantomConfig, Recipe, RunConfig, SiteConfig
from simulations.hospitals import _parts, cut_sites

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real image sets are not at {REAL}")
GROUPS = {"grey": 60, "stained": 24, "rare": 4}


def write_set(root: Path, name: str, rows: list[dict[str, str]]) -> None:
    """A set of the shared layout; every image is a tiny PNG of its own."""
    for folder in ("images", "masks"):
        (root / name / folder).mkdir(parents=True)
    for number, row in enumerate(rows):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 9)).astype(np.uint8)
        row |= {"set": name, "image": f"images/{row['id']}.png", "fov": "", "w": "9", "h": "6"}
        Image.fromarray(pixels).save(root / name / row["image"])
        row.setdefault("mask", f"masks/{row['id']}.png")
        if row["mask"]:
            Image.fromarray(np.where(pixels > 128, 255, 0).astype(np.uint8)).save(root / name / row["mask"])
    with (root / name / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["set", "id", "split", "patient", "eye", "group", "image", "mask", "fov", "w", "h"]
        )
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``eyes``: 6 patients with both eyes and a split; ``cells``: 88 images in three groups, neither."""
    folder = tmp_path_factory.mktemp("sets")
    eyes = [
        {
            "id": f"{n}{eye}",
            "split": "train" if n < 4 else "test",
            "patient": f"child-{n}",
            "eye": eye,
            "group": "ab"[n % 2],
        }
        for n in range(6)
        for eye in "LR"
    ]
    write_set(folder, "eyes", eyes)
    cells = [
        {"id": f"{group}{n}", "split": "", "patient": "", "group": group}
        for group, count in GROUPS.items()
        for n in range(count)
    ]
    write_set(folder, "cells", cells)
    return folder


def eyes_recipe(root: Path, seed: int = 0, **cut: object) -> Recipe:
    site = SiteConfig(name="ward", cut=replace(CutConfig(dataset="eyes"), **cut))  # type: ignore[arg-type]
    return Recipe(run=RunConfig(seed=seed), data=DataConfig(root=str(root)), sites=[site])


def cells_recipe(root: Path, seed: int = 0, **cohort: object) -> Recipe:
    settings = replace(CohortConfig(dataset="cells", sites=2, labelled=8, unlabelled=12), **cohort)  # type: ignore[arg-type]
    return Recipe(run=RunConfig(seed=seed), data=DataConfig(root=str(root)), cohort=settings)


def of(rows: tuple[ManifestRow, ...], split: Split, labelled: bool = True) -> list[ManifestRow]:
    return [row for row in rows if row.split == split and (row.mask is not None) == labelled]


# --- cuts -----------------------------------------------------------------------------------------


def test_a_cut_keeps_the_split_and_carves_one_validation_patient(root: Path, tmp_path: Path) -> None:
    (path,) = cut_sites(eyes_recipe(root), tmp_path)
    assert path == tmp_path / "ward" / "data" / "manifest.csv"
    rows = read_manifest(path).rows
    assert len(rows) == 12
    assert {row.patient for row in of(rows, Split.test)} == {"child-4", "child-5"}
    assert len({row.patient for row in of(rows, Split.val)}) == 1
    assert len(of(rows, Split.val)) == 2  # both eyes
    assert len(of(rows, Split.train)) == 6


def test_a_cut_site_can_be_checked_and_read(root: Path, tmp_path: Path) -> None:
    (path,) = cut_sites(eyes_recipe(root), tmp_path / "deep" / "run")
    assert ".." in path.read_text()  # relative to the manifest
    assert str(root) not in path.read_text()
    assert check_manifest(path, DataConfig().classes, 2).faults == ()
    assert sum(len(patient.samples) for patient in load_patients(path, DataConfig(), 0)) == 12


def test_a_cut_by_group_and_by_suffix(root: Path, tmp_path: Path) -> None:
    rows = read_manifest(cut_sites(eyes_recipe(root, group="b"), tmp_path)[0]).rows
    assert {row.patient for row in rows} == {"child-1", "child-3", "child-5"}
    assert {row.group for row in rows} == {"b"}
    rows = read_manifest(cut_sites(eyes_recipe(root, image_suffix="L"), tmp_path)[0]).rows
    assert len(rows) == 6
    assert all(row.image.stem.endswith("L") for row in rows)


def test_labelled_drops_masks_from_training_images_only(root: Path, tmp_path: Path) -> None:
    rows = read_manifest(cut_sites(eyes_recipe(root, labelled=2), tmp_path)[0]).rows
    assert len(of(rows, Split.train)) == 2
    assert len({row.patient for row in of(rows, Split.train)}) == 1
    assert len(of(rows, Split.train, labelled=False)) == 4
    assert len(of(rows, Split.test)) == 4
    with pytest.raises(DataError, match="7 labelled training images asked of 6"):
        cut_sites(eyes_recipe(root, labelled=7), tmp_path)


def test_a_cut_of_a_set_without_a_split_is_dealt_by_patient(root: Path, tmp_path: Path) -> None:
    rows = read_manifest(cut_sites(eyes_recipe(root, dataset="cells", group="stained"), tmp_path)[0]).rows
    assert Counter(row.split for row in rows) == {Split.train: 14, Split.val: 4, Split.test: 6}


def test_cuts_depend_on_the_seed_alone(root: Path, tmp_path: Path) -> None:
    texts = []
    for seed in (0, 0, 1, 2, 3):
        (path,) = cut_sites(eyes_recipe(root, seed=seed, labelled=2), tmp_path / "run")
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_sites_with_their_own_data_are_left_alone(root: Path, tmp_path: Path) -> None:
    sites = [SiteConfig(name="own", manifest="x.csv"), SiteConfig(name="phantom", phantom=PhantomConfig())]
    assert cut_sites(Recipe(sites=sites), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


# --- cohorts --------------------------------------------------------------------------------------


def test_a_cohort_gives_every_site_what_it_needs(root: Path, tmp_path: Path) -> None:
    paths = cut_sites(cells_recipe(root), tmp_path)
    assert [path.parent.parent.name for path in paths] == ["site-1", "site-2"]
    for path in paths:
        rows = read_manifest(path).rows
        assert len(of(rows, Split.train)) == 8
        assert len(of(rows, Split.val)) == 2
        assert len(of(rows, Split.train, labelled=False)) <= 12
        assert len(of(rows, Split.test)) >= 8
        assert not of(rows, Split.test, labelled=False)
        assert check_manifest(path, DataConfig().classes, 2).faults == ()


def test_no_image_is_at_two_sites_or_in_two_splits(root: Path, tmp_path: Path) -> None:
    images = [
        row.image.resolve()
        for path in cut_sites(cells_recipe(root), tmp_path)
        for row in read_manifest(path).rows
    ]
    assert len(images) == len(set(images))


def test_a_quarter_of_every_group_is_tested_on(root: Path, tmp_path: Path) -> None:
    tests: Counter[str] = Counter()
    for path in cut_sites(cells_recipe(root), tmp_path):
        tests.update(row.group for row in of(read_manifest(path).rows, Split.test))
    assert tests == {group: count // 4 for group, count in GROUPS.items()}


def test_train_and_test_have_the_same_mixture(root: Path, tmp_path: Path) -> None:
    """With nothing left over, each group's share of a site is the same in both up to one image's rounding."""
    recipe = cells_recipe(root, unlabelled=1000)
    sizes: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for path in cut_sites(recipe, tmp_path):
        for row in read_manifest(path).rows:
            sizes[path.parts[-3], row.group][row.split == Split.test] += 1
    for (_, group), (train, test) in sizes.items():
        tested = GROUPS[group] // 4
        assert abs(train / (GROUPS[group] - tested) - test / tested) <= 1 / tested


def test_a_small_alpha_makes_sites_differ(root: Path, tmp_path: Path) -> None:
    def spread(alpha: float) -> float:
        shares = []
        for seed in range(4):
            paths = cut_sites(cells_recipe(root, seed=seed, alpha=alpha, labelled=4), tmp_path / f"{alpha}")
            for path in paths:
                rows = read_manifest(path).rows
                shares.append(sum(row.group == "stained" for row in rows) / len(rows))
        return float(np.std(shares))

    assert spread(0.3) > 2 * spread(100.0)


def test_a_cohort_depends_on_the_seed_alone(root: Path, tmp_path: Path) -> None:
    texts = [
        "".join(path.read_text() for path in cut_sites(cells_recipe(root, seed), tmp_path))
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_cohort_never_cuts_a_patient_in_two(root: Path, tmp_path: Path) -> None:
    many = [
        {"id": f"{n}-{k}", "split": "", "patient": f"p{n}", "group": "g"} for n in range(40) for k in range(3)
    ]
    write_set(tmp_path, "stacks", many)
    recipe = cells_recipe(tmp_path, dataset="stacks", labelled=7, unlabelled=20)
    homes: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for path in cut_sites(recipe, tmp_path / "out"):
        rows = read_manifest(path).rows
        assert len(of(rows, Split.train)) == 7
        for row in rows:
            homes[row.patient].add((path.parts[-3], str(row.split)))
    assert all(len(places) == 1 for places in homes.values())


def test_images_without_a_mask_are_used_as_unlabelled(tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", "split": "", "patient": "", "group": "g"} for n in range(60)]
    rows += [{"id": f"n{n}", "split": "", "patient": "", "group": "g", "mask": ""} for n in range(20)]
    write_set(tmp_path, "partly", rows)
    recipe = cells_recipe(tmp_path, dataset="partly", labelled=4, unlabelled=1000, sites=1)
    listed = read_manifest(cut_sites(recipe, tmp_path / "out")[0]).rows
    assert len(listed) == 80
    bare = [row for row in listed if row.image.stem.startswith("n")]
    assert len(bare) == 20
    assert all(row.split == Split.train and row.mask is None for row in bare)


def test_a_cohort_that_cannot_be_cut_says_what_to_change(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lower cohort\.sites or cohort\.labelled"):
        cut_sites(cells_recipe(root, sites=2, labelled=60), tmp_path)
    assert list(tmp_path.iterdir()) == []


@given(st.integers(0, 200), st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_parts_are_a_partition_in_proportion(count: int, weights: list[float]) -> None:
    units = [(number,) for number in range(count)]
    shares = np.array(weights) / sum(weights)
    parts = _parts(units, shares)  # type: ignore[arg-type]
    assert [unit for part in parts for unit in part] == units
    assert all(abs(len(part) - share * count) <= 1 + 1e-9 for part, share in zip(parts, shares, strict=True))


# --- what is missing ------------------------------------------------------------------------------


def test_a_missing_root_names_the_fix(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root=PATH"):
        cut_sites(replace(eyes_recipe(root), data=DataConfig(root=None)), tmp_path)
    with pytest.raises(ConfigError, match=r"/no/such/folder.*data\.root=PATH"):
        cut_sites(eyes_recipe(Path("/no/such/folder")), tmp_path)


def test_all_that_is_missing_is_told_at_once(root: Path, tmp_path: Path) -> None:
    sites = [
        SiteConfig(name="one", cut=CutConfig(dataset="ears")),
        SiteConfig(name="two", cut=CutConfig(dataset="eyes", group="c")),
        SiteConfig(name="three", cut=CutConfig(dataset="eyes")),
    ]
    recipe = replace(eyes_recipe(root), sites=sites, cohort=CohortConfig(dataset="tissue"))
    with pytest.raises(DataError) as caught:
        cut_sites(recipe, tmp_path)
    one, two, cohort = caught.value.faults
    assert one.startswith("site one: no set 'ears'")
    assert str(root / "ears" / "index.csv") in one
    assert "cells, eyes" in one
    assert "data.root=PATH" in one
    assert "groups: a, b" in two
    assert cohort.startswith("cohort: no set 'tissue'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("id,split\n1,train\n", "no column patient, group, image, mask"),
        ("id,split,patient,group,image,mask\n", "lists no image"),
        ("id,split,patient,group,image,mask\na,exam,,,a.png,\n", "line 2: split 'exam'"),
        ("id,split,patient,group,image,mask\na,test,,,,\n", "line 2: no id or no image"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "eyes").mkdir()
    (tmp_path / "eyes" / "index.csv").write_text(text)
    with pytest.raises(DataError, match=word):
        cut_sites(eyes_recipe(tmp_path), tmp_path / "out")


# --- the real sets --------------------------------------------------------------------------------


@needs_real
def test_retina_four_sites(tmp_path: Path) -> None:
    groups = ["healthy", "diabetic retinopathy", "glaucoma"]
    sites = [SiteConfig(name="chase", cut=CutConfig(dataset="CHASE_DB1"))]
    sites += [SiteConfig(name=group[:4], cut=CutConfig(dataset="HRF", group=group)) for group in groups]
    paths = cut_sites(Recipe(data=DataConfig(root=str(REAL)), sites=sites), tmp_path)
    patients = []
    for path in paths:
        by_split: dict[Split | None, set[str]] = defaultdict(set)
        for row in read_manifest(path).rows:
            by_split[row.split].add(row.patient)
        patients.append([len(by_split[split]) for split in Split])
    assert patients == [[9, 1, 4], [4, 1, 10], [4, 1, 10], [4, 1, 10]]
    assert check_manifest(paths[1], DataConfig().classes, 2).faults == ()


@needs_real
def test_nuclei_four_sites(tmp_path: Path) -> None:
    recipe = Recipe(data=DataConfig(root=str(REAL)), cohort=CohortConfig(dataset="DSB2018_96"))
    paths = cut_sites(recipe, tmp_path)
    assert len(paths) == 4
    tested = 0
    for path in paths:
        rows = read_manifest(path).rows
        assert (len(of(rows, Split.train)), len(of(rows, Split.val))) == (30, 3)
        tested += len(of(rows, Split.test))
    assert tested == 167  # a quarter of every group, as in the design's own measurements
    assert check_manifest(paths[0], DataConfig().classes, 2).ok
