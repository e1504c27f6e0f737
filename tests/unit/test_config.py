"""Recipes and site files: what is read, and that every fault is told at once with its fix."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common import config
from common.errors import ConfigError
from common.recipe import Anatomy, Engine, PolicyConfig, Recipe, SiteFile
from common.recipe_ranges import RANGES, Range

TWO_SITES = "sites:\n  - {name: east, phantom: {}}\n  - {name: west, phantom: {}}\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def to_file(text: str) -> str:
        path = tmp_path / "trial.yaml"
        path.write_text(text)
        return str(path)

    return to_file


def faults_of(path: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load_recipe(path, overrides)
    assert caught.value.exit_code == 10
    return list(caught.value.faults)


def test_five_faults_give_five_lines(write: Callable[[str], str]) -> None:
    text = (
        "run: {roundz: 3, threads: two, engine: lopback}\ndata: {image_size: 70}\nstudent: {temperature: 0}\n"
        + TWO_SITES
    )
    faults = faults_of(write(text))
    assert len(faults) == 5
    wanted = {
        "run.roundz": "did you mean run.rounds?",
        "run.threads": "expects a whole number, not 'two'; write it as in run.threads=1",
        "run.engine": "did you mean loopback? choose from loopback, ray",
        "data.image_size": "is not a multiple of 32; use 64 or 96",
        "student.temperature": "it must be above 0",
    }
    for key, fix in wanted.items():
        (line,) = [fault for fault in faults if f": {key}: " in fault]
        assert line.startswith("trial.yaml: ")
        assert fix in line


# A setting; the key that its fault names; what is said of it.
ONE_FAULT = [
    ("rounds=3", "rounds", "unknown key; did you mean run.rounds?"),
    ("student.keep_dice=1", "student.keep_dice", "unknown key; did you mean generator.keep_dice?"),
    ("run.seed=true", "run.seed", "expects a whole number, not True; write it as in run.seed=0"),
    ("run.seed=1.5", "run.seed", "expects a whole number, not 1.5; write it as in run.seed=0"),
    ("teacher=null", "teacher", "is empty; give it keys (name, adapter, rank, decoder, ...)"),
    ("aggregation.energy=.nan", "aggregation.energy", "expects a number, not nan"),
    ("run.rounds=0", "run.rounds", "0 is out of range; it must be at least 1"),
    ("teacher.batch_size=0", "teacher.batch_size", "0 is out of range; it must be at least 1"),
    ("student.batch_size=0", "student.batch_size", "0 is out of range; it must be at least 1"),
    ("student.temperature=0", "student.temperature", "0.0 is out of range; it must be above 0"),
    ("generator.keep_dice=1.5", "generator.keep_dice", "it must be at least 0 and at most 1"),
    ("data.image_size=80", "data.image_size", "80 is not a multiple of 32; use 64 or 96"),
    ("aggregation.rule=fedi", "aggregation.rule", "there is no 'fedi'; did you mean fedit?"),
    ("teacher.name=sam", "teacher.name", "there is no 'sam'; choose from ward-sam-tiny"),
    ("teacher.adapter=bse", "teacher.adapter", "there is no 'bse'; did you mean base?"),
    ("student.name=unet-m", "student.name", "did you mean unet-s? choose from unet-xs, unet-s, m"),
    ("sites.west.student=x", "sites[1].student", "there is no 'x'; choose from unet-xs, unet-s"),
    ("generator.name=x", "generator.name", "there is no 'x'; choose from ward-diffusion-tiny"),
    ("generator.name=ward-diffusion-latent", "generator.name", "or a data.image_size that is a multiple"),
    ("generator.scope=styl", "generator.scope", "did you mean style?"),
    ("generator.site_token=true", "generator.site_token", "take generator.scope=federated"),
    ("generator.style_detail=fine", "generator.style_detail", "choose from colour, texture, spectrum"),
    ("privacy.steps=9", "privacy", "settings of differential privacy, and no noise; add privacy.noise_mult"),
    ("run.min_sites=3", "run.min_sites", "it asks for 3 sites and the recipe has 2"),
    ("generator.sampler_steps=50", "generator.sampler_steps", "at most 20"),
    ("name=../up", "name", "'../up' cannot name a folder; use letters, digits"),
    ("sites.west.name=east", "sites[1].name", "another site is called 'east'"),
    ("sites.west.name=../up", "sites[1].name", "use lower-case letters, digits and '-'"),
    ("sites.west.phantom=null", "sites[1]", "give exactly one of manifest, cut and phantom"),
    (
        "sites.east.phantom.train_patients=1",
        "sites[0].phantom.train_patients",
        "fewer than data.min_patients (2)",
    ),
    ("sites.east.phantom.scanner.tint=[1,1]", "sites[0].phantom.scanner.tint", "give three factors"),
    ("sites.0.phantom.object_size=[0.3,0.1]", "sites[0].phantom.object_size", "give two shares of the side"),
]


@pytest.mark.parametrize(("override", "key", "said"), ONE_FAULT, ids=[entry[0] for entry in ONE_FAULT])
def test_each_fault_names_its_key_and_its_fix(
    write: Callable[[str], str], override: str, key: str, said: str
) -> None:
    (line,) = faults_of(write(TWO_SITES), override)
    assert line.startswith(f"override: {key}: ")
    assert said in line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sites.wes.student=unet-xs", "there is no site 'wes'; did you mean west? choose from east, west"),
        ("sites.2.student=unet-xs", "there is no site '2'; choose from east, west"),
        ("run.rounds", "not a setting; write key=value, as in run.rounds=5"),
        ("sites=[", "its value is not YAML; check brackets and quotes"),
    ],
)
def test_an_override_that_cannot_be_applied_is_told(
    write: Callable[[str], str], override: str, said: str
) -> None:
    assert faults_of(write(TWO_SITES), override) == [f"override {override!r}: {said}"]


def test_baselines_are_known_and_named_once(write: Callable[[str], str]) -> None:
    faults = faults_of(write(TWO_SITES), "baselines=[local_onli,local_teacher,local_teacher]")
    assert len(faults) == 2
    assert "did you mean local_only?" in faults[0]
    assert "'local_teacher' is named twice" in faults[1]


def test_classes_have_their_own_names_and_labels(write: Callable[[str], str]) -> None:
    faults = faults_of(
        write(TWO_SITES), "data.classes=[{name: a, label: 1}, {name: a, label: 1, like: vesel}]"
    )
    assert [fault.split(": ")[1] for fault in faults] == [
        "data.classes[1].like",
        "data.classes[1].name",
        "data.classes[1].label",
    ]
    assert faults_of(write(TWO_SITES), "data.classes=[]")[0].startswith(
        "override: data.classes: there is no class"
    )


def test_a_class_may_name_the_labels_of_its_parts(write: Callable[[str], str]) -> None:
    nested = "data.classes=[{name: kidney, label: 1, also: [2]}, {name: medulla, label: 2}]"
    data = config.load_recipe(write(TWO_SITES), [nested]).data
    assert [item.values for item in data.classes] == [(1, 2), (2,)]
    (shared,) = faults_of(write(TWO_SITES), nested, "data.exclusive=true")
    assert "data.classes[1].also: classes exclude each other and kidney has [2] too" in shared
    apart = nested.replace("also: [2]", "also: [3]")
    assert config.load_recipe(write(TWO_SITES), [apart, "data.exclusive=true"]).data.exclusive
    faults = faults_of(write(TWO_SITES), "data.classes=[{name: a, label: 1, also: [1, 300, 4, 4]}]")
    assert [fault.split("also: ")[1].split(";")[0] for fault in faults] == [
        "[300] are out of range",
        "the class has the label value 1 twice",
        "the class has the label value 4 twice",
    ]


def test_cached_views_are_a_count(write: Callable[[str], str]) -> None:
    (fault,) = faults_of(write(TWO_SITES), "teacher.cached_views=-1", "teacher.adapter=last3")
    assert "teacher.cached_views: -1 is out of range" in fault


def test_cached_views_need_a_preset_that_leaves_a_prefix_frozen(write: Callable[[str], str]) -> None:
    (fault,) = faults_of(write(TWO_SITES), "teacher.cached_views=8", "teacher.adapter=base")
    assert "teacher.adapter: adapter base trains the first blocks" in fault
    for adapter in ("last3", "decoder"):
        chosen = [f"teacher.adapter={adapter}", "teacher.cached_views=8"]
        assert config.load_recipe(write(TWO_SITES), chosen).teacher.cached_views == 8


def test_sites_or_a_cohort_but_not_both_and_not_neither(write: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "Set").mkdir()
    (tmp_path / "Set" / "index.csv").touch()
    root = f"data.root={tmp_path}"
    (both,) = faults_of(write(TWO_SITES + "cohort: {dataset: Set}\n"), root)
    assert "there are sites and a cohort" in both
    (neither,) = faults_of(write("run: {rounds: 1}\n"))
    assert "neither sites nor a cohort" in neither
    cohort = config.load_recipe(write("cohort: {dataset: Set, sites: 3}\n"), [root])
    assert cohort.cohort is not None
    assert cohort.cohort.sites == 3
    (few,) = faults_of(write("cohort: {dataset: Set, sites: 1}\n"), root)
    assert "run.min_sites" in few


def test_exactly_one_source_a_site(write: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "list.csv").touch()
    text = f"sites:\n  - {{name: a, phantom: {{}}, manifest: {tmp_path}/list.csv}}\n  - {{name: b}}\n"
    faults = faults_of(write(text))
    assert len(faults) == 2
    assert "sites[0]: it has manifest and phantom" in faults[0]
    assert "sites[1]: it has no images" in faults[1]


def test_two_sites_may_not_hold_the_same_patients(write: Callable[[str], str]) -> None:
    text = "sites:\n  - {name: a, cut: {dataset: HRF}}\n  - {name: b, cut: {dataset: HRF, group: healthy}}\n"
    faults = faults_of(write(text))
    assert any("sites[1].cut: it holds patients of sites[0] too" in fault for fault in faults)


def test_real_images_need_a_root_that_is_there(write: Callable[[str], str], tmp_path: Path) -> None:
    path = write(
        "sites:\n  - {name: a, cut: {dataset: HRF, group: x}}\n  - {name: b, cut: {dataset: HRF, group: y}}\n"
    )
    (missing,) = faults_of(path)
    assert "add data.root=FOLDER" in missing
    (absent,) = faults_of(path, f"data.root={tmp_path}/nowhere")
    assert f"there is no folder {tmp_path}/nowhere" in absent
    (tmp_path / "HRFF").mkdir()
    (tmp_path / "HRFF" / "index.csv").touch()
    faults = faults_of(path, f"data.root={tmp_path}")
    assert len(faults) == 2
    assert all("did you mean HRFF?" in fault for fault in faults)


def test_a_missing_root_is_a_note_to_whoever_only_checks(write: Callable[[str], str]) -> None:
    path = write("cohort: {dataset: Set}\nrun: {rounds: 0}\n")
    check = config.check_recipe(path)
    assert [fault.split(": ")[1] for fault in check.faults] == ["run.rounds"]
    assert "data.root=FOLDER" in check.notes[0]


def test_a_relative_root_counts_from_the_working_directory(
    write: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets" / "Set").mkdir(parents=True)
    (tmp_path / "sets" / "Set" / "index.csv").touch()
    (tmp_path / "sets" / "list.csv").touch()
    monkeypatch.chdir(tmp_path)
    recipe = config.load_recipe(write("cohort: {dataset: Set}\n"), ["data.root=sets"])
    assert recipe.data.root == str(tmp_path / "sets")
    sites = "sites:\n  - {name: a, manifest: list.csv}\n  - {name: b, phantom: {}}\n"
    assert config.load_recipe(write(sites), ["data.root=sets"]).sites[0].manifest == str(
        tmp_path / "sets/list.csv"
    )
    (absent,) = faults_of(write(sites))
    assert f"there is no file {tmp_path}/list.csv" in absent


def test_a_broken_value_hides_no_other_fault_and_causes_none(write: Callable[[str], str]) -> None:
    # Both sites' names are wrong in type: nothing more may be said of names, and the rounds still are.
    text = "run: {rounds: 0}\nsites:\n  - {name: 1, phantom: {}}\n  - {name: 2, phantom: {}}\n"
    faults = faults_of(write(text))
    assert [fault.split(": ")[1] for fault in faults] == ["sites[0].name", "sites[1].name", "run.rounds"]


def test_an_unknown_recipe_lists_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean demo\? choose from demo, five, nuclei"):
        config.load_recipe("dmo")
    with pytest.raises(ConfigError, match=r"there is no file somewhere/demo\.yaml"):
        config.load_recipe("somewhere/demo.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: [1\n", "is not YAML"),
        ("- a\n- b\n", "is a list"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "duplicate"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(write: Callable[[str], str], text: str, said: str) -> None:
    faults = faults_of(write(text))
    assert len(faults) == 1
    assert said in faults[0]


def test_an_unresolved_interpolation_is_a_fault(write: Callable[[str], str]) -> None:
    (fault,) = faults_of(write(TWO_SITES + "description: ${nothing.here}\n"))
    assert "description" in fault
    assert "give it a value" in fault


def test_overrides_replace_settings_and_give_typed_values() -> None:
    overrides = ["run.rounds=7", "run.engine=ray", "teacher.learning_rate=1", "sites.harbour.student=unet-xs"]
    recipe = config.load_recipe("demo", [*overrides, "baselines=[]", "data.root="])
    assert recipe.run.rounds == 7
    assert recipe.run.engine is Engine.ray
    assert isinstance(recipe.teacher.learning_rate, float)
    assert [site.student for site in recipe.sites] == [None, "unet-xs", None]
    assert recipe.baselines == []
    assert recipe.data.root is None
    assert recipe.sites[0].phantom is not None
    assert recipe.sites[0].phantom.anatomy is Anatomy.lesions


def test_a_recipe_without_a_name_takes_its_files(write: Callable[[str], str]) -> None:
    assert config.load_recipe(write(TWO_SITES)).name == "trial"


def test_base_yaml_shows_the_schemas_defaults() -> None:
    base = OmegaConf.to_container(OmegaConf.load(config.CONFIG_DIR / "base.yaml"))
    wanted = asdict(Recipe())
    for own in ("name", "description", "sites", "cohort"):  # what only a recipe can say
        del wanted[own]
    assert base == wanted, "configs/base.yaml and common/recipe.py differ: change both"


def test_the_run_config_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = config.load_recipe("demo", ["run.seed=3"])
    config.save_run_config(recipe, tmp_path / "run" / "config.yaml")
    again = config.load_run_config(tmp_path / "run" / "config.yaml")
    assert again == recipe
    assert config.recipe_digest(again) == config.recipe_digest(recipe)


def test_the_run_config_reads_back_when_its_images_are_gone(tmp_path: Path) -> None:
    root = tmp_path / "sets"
    (root / "DSB2018_96").mkdir(parents=True)
    (root / "DSB2018_96" / "index.csv").touch()
    recipe = config.load_recipe("nuclei", [f"data.root={root}"])
    config.save_run_config(recipe, tmp_path / "config.yaml")
    shutil.rmtree(root)
    assert config.load_run_config(tmp_path / "config.yaml") == recipe


def test_a_damaged_run_config_is_told_with_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run: {rounds: 0, seedd: 1}\n")
    with pytest.raises(ConfigError) as caught:
        config.load_run_config(path)
    assert "did you mean run.seed?" in caught.value.faults[0]
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load_run_config(tmp_path / "none.yaml")


@settings(deadline=None)
@example(seed=0, rounds=1, rate=1e-5, text="${nothing.here} and ${")
@example(seed=0, rounds=1, rate=1.0, text="a line\x85")
@given(
    seed=st.integers(0, 2**31),
    rounds=st.integers(1, 50),
    rate=st.floats(1e-6, 1.0),
    text=st.text(max_size=30),
)
def test_any_recipe_survives_its_run_config(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rounds: int, rate: float, text: str
) -> None:
    recipe = config.load_recipe(
        "smoke", [f"run.seed={seed}", f"run.rounds={rounds}", f"teacher.learning_rate={rate!r}"]
    )
    described = Recipe(**{**vars(recipe), "description": text})
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    config.save_run_config(described, path)
    assert config.load_run_config(path) == described


def test_the_digest_is_that_of_every_setting() -> None:
    digest = config.recipe_digest(config.load_recipe("demo"))
    assert digest == config.recipe_digest(config.load_recipe("demo"))
    assert digest != config.recipe_digest(config.load_recipe("demo", ["policy.max_weight=999"]))


def test_differences_name_every_setting_that_changed() -> None:
    before, now = (config.load_recipe("demo", [f"run.seed={seed}", "run.rounds=2"]) for seed in (1, 2))
    assert config.differences(before, now) == [("run.seed", 1, 2)]
    assert config.differences(before, before) == []


def test_a_site_file_is_read_and_its_faults_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("name: harbour\nmanifest: list.csv\npolicy: {min_group_patients: 9}\n")
    site = config.load_site(path)
    assert isinstance(site, SiteFile)
    assert (site.name, site.manifest, site.policy.min_group_patients) == ("harbour", "list.csv", 9)
    path.write_text(
        "name: The Harbour\nmanifst: x\nstudent: unet\npolicy: {max_weight: 0, allow_style: perhaps}\n"
    )
    with pytest.raises(ConfigError) as caught:
        config.load_site(path)
    assert len(caught.value.faults) == 5
    assert any("did you mean manifest?" in fault for fault in caught.value.faults)
    assert any("expects true or false, not 'perhaps'" in fault for fault in caught.value.faults)


def test_a_saved_site_reads_back_as_the_same_site(tmp_path: Path) -> None:
    policy = PolicyConfig(max_payload_mb=1.0, allow_style=False)
    site = SiteFile("harbour", "/data/list.csv", "unet-xs", "lite", 2, policy)
    config.save_site(site, tmp_path / "new" / "site.yaml")
    assert config.load_site(tmp_path / "new" / "site.yaml") == site


def test_the_listed_recipes_have_descriptions() -> None:
    listed = config.list_recipes()
    assert [name for name, _ in listed] == [
        "demo",
        "five",
        "nuclei",
        "nuclei-dp",
        "phantom-dp",
        "retina",
        "smoke",
        "speckle",
    ]
    assert all(len(description) > 20 for _, description in listed)


def test_ranges_name_fields_that_exist() -> None:
    for kind, ranges in RANGES.items():
        assert set(ranges) <= {item.name for item in fields(kind)}


def test_an_open_end_does_not_belong_to_a_range() -> None:
    assert not Range(0, 1, open_low=True).holds(0)
    assert Range(0, 1, open_low=True).holds(1)
    assert not Range(0, 1, open_high=True).holds(1)
    assert Range(0).holds(0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["baselines=[paint]", "generator.scope=local"], "with scope local no site shares its own"),
        (["baselines=[recolour]", "generator.scope=none"], "with scope none no site shares its own"),
        (["baselines=[amplitude]"], "take generator.style_detail=spectrum, or leave it out"),
        (["baselines=[amplitude]", "generator.style_detail=spectrum"], ""),
        (["baselines=[augment,random_colour]", "generator.scope=none"], ""),
        (["baselines=[histogram]", "generator.scope=paint"], ""),
    ],
)
def test_a_painter_that_wants_what_no_site_shares_is_a_fault(
    write: Callable[[str], str], overrides: list[str], said: str
) -> None:
    if not said:
        config.load_recipe(write(TWO_SITES), overrides)
        return
    (line,) = faults_of(write(TWO_SITES), *overrides)
    assert "baselines[0]: " in line
    assert said in line
