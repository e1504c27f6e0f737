"""A whole run on the smoke recipe, with the real apps, guard and models: what it leaves, and what it says."""

from __future__ import annotations

import csv
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray
from PIL import Image

import client.generation
import client.workshop
import common.generator
import common.teacher
import simulations.simulate
from client.generation import SyntheticSet
from client.site import Site
from common import wire
from common.adapter import Adapter
from common.canonical import sha256_of_file
from common.config import load_recipe, load_run_config
from common.errors import ConfigError
from common.guard_api import StudentNote
from common.plan import Stage
from common.recipe import PhantomConfig
from server.report.schema import RunReport
from tests.e2e import walks
from tests.e2e.conftest import FinishedRun

SITES = ["east", "west"]
MODELS = {"student", "teacher", "local_only", "local_only_scratch"}
FRAMING = 1.02  # of the adapter's own bytes, at most

# Every field of report.json in contract.md; a list stands for its items, a dict of sites for its values.
CONTRACT: dict[str, set[str]] = {
    "run": {
        "id", "recipe", "seed", "engine", "started", "finished", "wall_s", "cpu_s", "versions", "config_sha256",
        "enforced",
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
          for name in ("receipts.jsonl", "student.safetensors", "student.json", "synthetic")),
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
        for site in SITES for model in MODELS for where in ("own", "all") for metric in ("dice", "hd95", "nsd")
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
    size = report.teacher.trainable * 4
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


# --- what crosses a site's border -------------------------------------------------------------------

PATIENT = "Zofia-Marker-1957"  # planted in every patient id
FILE = "film-of-Zofia"  # planted in every file's name
FOLDER = "ward-of-Zofia"  # planted in every path


@dataclass
class Watched:
    """A run with every message kept, in the order in which they were serialized: down, up, down, up."""

    run: Path
    packed: list[bytes] = field(default_factory=list)
    teachers: int = 0
    generators: int = 0
    sampled: list[tuple[int, int]] = field(default_factory=list)  # images, denoiser calls

    @property
    def up(self) -> list[tuple[str, Message, int]]:
        """(site, message, bytes) of every reply."""
        replies = [(wire.unpack_message(packed), len(packed)) for packed in self.packed[1::2]]
        return [(SITES[reply.metadata.src_node_id - 1000], reply, size) for reply, size in replies]

    def patients(self) -> Iterator[NDArray[np.float32]]:
        """Every image as the site's models see it."""
        for site in SITES:
            opened = Site.open(self.run / "sites" / site)
            plan = opened.accepted_plan(walks.state_of(self.run).plan.digest)  # type: ignore[union-attr]
            for patient in opened.patients(plan.data, plan.seed):
                yield from (sample.image.numpy() for sample in patient.samples)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A run in this process, generator rounds included, whose patients and files have names to look for."""
    seen = Watched(tmp_path_factory.mktemp(FOLDER) / "run")
    recipe = load_recipe("smoke", ["generator.scope=federated", "baselines=[local_teacher]"])
    common.teacher._resident.cache_clear()
    common.generator.resident_generator.cache_clear()
    before = common.teacher.teachers_built, common.generator.generators_built
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            simulations.simulate, "write_site", write_site_with_names(simulations.simulate.write_site)
        )
        patch.setattr(wire, "pack_message", kept_in(seen.packed, wire.pack_message))
        patch.setattr(client.workshop, "synthesise", counted_in(seen.sampled, client.workshop.synthesise))
        simulations.simulate.simulate(recipe, seen.run, resume=False)
    seen.teachers = common.teacher.teachers_built - before[0]
    seen.generators = common.generator.generators_built - before[1]
    return seen


def write_site_with_names(real: Any) -> Any:
    """The same pixels, with names that cannot occur by chance."""

    def write_site(config: PhantomConfig, folder: Path, run_seed: int, site: str) -> Path:
        manifest: Path = real(config, folder, run_seed, site)
        with manifest.open(newline="") as file:
            header, *rows = list(csv.reader(file))
        for row in rows:
            for column in (0, 1):
                old = Path(row[column])
                row[column] = str(old.with_name(f"{FILE}-{old.name}"))
                (folder / old).rename(folder / row[column])
            row[2] = f"{PATIENT}-{row[2]}"
        with manifest.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return manifest

    return write_site


def kept_in(packed: list[bytes], real: Any) -> Any:
    def pack(message: Message) -> bytes:
        packed.append(real(message))
        return packed[-1]

    return pack


def counted_in(sampled: list[tuple[int, int]], real: Any) -> Any:
    def synthesise(*arguments: Any) -> SyntheticSet:
        before = client.generation.denoiser_calls
        made: SyntheticSet = real(*arguments)
        sampled.append((len(made), client.generation.denoiser_calls - before))
        return made

    return synthesise


def test_one_teacher_and_one_generator_serve_every_site(watched: Watched) -> None:
    assert watched.teachers == 1
    assert watched.generators == 1


def test_a_synthetic_image_takes_at_most_twenty_denoiser_calls(watched: Watched) -> None:
    assert len(watched.sampled) == len(SITES)
    assert all(0 < images <= calls <= 20 * images for images, calls in watched.sampled)


def test_names_of_patients_and_files_change_no_weight(watched: Watched, smoke_run: FinishedRun) -> None:
    """The seeds come from site, stage and round alone; the generator's rounds do not touch the teacher."""
    assert walks.digests(watched.run)["teacher"] == walks.digests(smoke_run.run)["teacher"]


def test_no_patient_id_path_or_file_name_is_in_any_message(watched: Watched) -> None:
    assert len(watched.packed) == 2 * len(SITES) * 8, "propose, adapt, adapt, style, generator, student, ..."
    names = [PATIENT, FILE, FOLDER, str(watched.run), "manifest.csv", "p000-0", ".png"]
    assert leaks(watched.packed, [name.encode() for name in names]) == []
    for packed in watched.packed:
        for text in texts(wire.unpack_message(packed).content):
            assert not re.search(r"\bp0\d\d\b", text)
            assert "/" not in text
    control = wire.pack_content(RecordDict({"body": ConfigRecord({"json": f'{{"who":"{PATIENT}-p000"}}'})}))
    assert leaks([control], [PATIENT.encode()]) == [PATIENT.encode()]


def texts(content: RecordDict) -> Iterator[str]:
    for record in content.config_records.values():
        yield from (value for value in record.values() if isinstance(value, str))


def test_no_pixel_of_an_image_real_or_synthetic_is_in_any_message(watched: Watched) -> None:
    files = sorted(watched.run.glob("sites/*/data/images/*.png"))
    synthetic = sorted(
        path for path in watched.run.glob("sites/*/synthetic/*.png") if "mask" not in path.name
    )
    assert len(files) == 2 * 14
    assert synthetic
    stored = [np.asarray(Image.open(path)) for path in (*files, *synthetic)]
    as_seen = list(watched.patients())
    assert len(as_seen) == len(files)
    needles = [
        *(path.read_bytes()[64:96] for path in (*files, *synthetic)),
        *(rows for image in stored for rows in row_bytes(image, np.uint8)),
        *(rows for image in as_seen for kind in (np.float32, np.float16) for rows in row_bytes(image, kind)),
    ]
    assert leaks(watched.packed, needles) == []
    control = wire.pack_content(RecordDict({"x": ConfigRecord({"b": stored[0].tobytes()})}))
    assert leaks([control], row_bytes(stored[0], np.uint8)), "an image in a message is found"


def row_bytes(image: NDArray[Any], kind: type) -> list[bytes]:
    """The middle row of an image, as it would lie in a message with colours apart or together."""
    together = image if image.shape[-1] == 3 else np.moveaxis(image, 0, -1)
    row = together[len(together) // 2].astype(kind)
    return [row.tobytes(), row[:, 0].tobytes()]


def leaks(packed: Iterable[bytes], needles: Iterable[bytes]) -> list[bytes]:
    messages = list(packed)
    return [needle for needle in needles if any(needle in message for message in messages)]


def test_the_server_keeps_no_name_of_a_patient_or_a_file(watched: Watched) -> None:
    kept = [path for path in watched.run.rglob("*") if path.is_file() and "sites" not in path.parts[-4:]]
    assert {"report.json", "events.jsonl", "checkpoint.safetensors", "card.json"} <= {p.name for p in kept}
    for path in kept:
        assert leaks([path.read_bytes()], [PATIENT.encode(), FILE.encode(), FOLDER.encode()]) == [], path


def test_every_adapter_that_went_up_is_on_a_receipt_with_its_digest(watched: Watched) -> None:
    went_up: Counter[tuple[str, str]] = Counter()
    for site, reply, _ in watched.up:
        if "adapter" in reply.content:
            went_up[site, wire.decode_update(reply.content)[1].adapter.digest] += 1
        else:
            went_up[site, digest_of_body(reply)] += 1
    receipts = Counter(
        (site, entry["sha256"]) for site in SITES for entry in walks.receipts_of(watched.run, site)
        if not entry["name"].endswith(".numbers")  # beside an adapter, in the same message
    )  # fmt: skip
    assert went_up == receipts
    adapters = [entry for site in SITES for entry in walks.receipts_of(watched.run, site)
                if entry["name"].endswith(".adapter")]  # fmt: skip
    assert len(adapters) == len(SITES) * 3, "two teacher rounds and one of the generator"


def digest_of_body(reply: Message) -> str:
    """SHA-256 of a reply's numbers, which travel as canonical JSON."""
    import hashlib

    return hashlib.sha256(str(reply.content["body"]["json"]).encode()).hexdigest()


def test_bytes_up_are_the_bytes_of_the_serialized_messages(watched: Watched) -> None:
    report = walks.report_of(watched.run)
    said = Counter({site: sum(record.bytes_up[site] for record in report.rounds) for site in SITES})
    moved: Counter[str] = Counter()
    for site, _, size in watched.up:
        moved[site] += size
    # The roll call sorts nodes, the later stages sites: both are the order of the folders here.
    assert said == moved


def test_notes_and_metrics_hold_no_weights(watched: Watched) -> None:
    """A student never travels: what comes back from its stage is its note."""
    notes = [wire.decode_note(reply.content) for _, reply, _ in watched.up
             if reply.metadata.message_type == wire.ACTIONS[Stage.student]]  # fmt: skip
    assert [note.site for note in notes] == SITES
    assert all(isinstance(note, StudentNote) for note in notes)
    for _, reply, size in watched.up:
        if "adapter" not in reply.content:
            assert not reply.content.array_records
            assert size < 4096


def test_a_run_in_federated_scope_reports_its_generator_rounds(watched: Watched) -> None:
    report = RunReport.load(watched.run / "report.json")
    stages = [(record.stage, record.index) for record in report.rounds]
    assert stages == [
        ("propose", 0), ("adapt", 0), ("adapt", 1), ("style", 0), ("generator", 0), ("student", 0),
        ("evaluate", 0),
    ]  # fmt: skip
    assert {cell.model for cell in report.benefit} == {"student", "teacher", "local_teacher"}


def test_a_recipe_cannot_ask_for_more_than_twenty_denoiser_calls() -> None:
    with pytest.raises(ConfigError, match="generator.sampler_steps"):
        load_recipe("smoke", ["generator.sampler_steps=21"])
