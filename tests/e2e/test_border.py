"""What crosses a site's border in a real run: every message is looked at, for names, paths and pixels."""

from __future__ import annotations

import csv
import hashlib
import re
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
import common.generator
import common.teacher
import simulations.simulate
from client.painters import SyntheticSet
from client.site import Site
from common import wire
from common.config import load_recipe
from common.plan import Stage
from common.recipe import PhantomConfig
from server.report.schema import RunReport
from tests.e2e import walks
from tests.e2e.conftest import FinishedRun

SITES = ["east", "west"]
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
        patch.setattr(
            client.transfer.painting,
            "synthesise",
            counted_in(seen.sampled, client.transfer.painting.synthesise),
        )
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
    assert len(watched.packed) == 2 * len(SITES) * len(walks.report_of(watched.run).rounds)
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
