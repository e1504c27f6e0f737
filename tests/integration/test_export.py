"""Exports: each format is the student, says what it is, and can be used in the student's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

import client.export.onnx_file
from client.data import load_patients
from client.evaluation import predict
from client.export import FORMATS, ExportRequest, export_student, load_runnable
from client.export.onnx_file import OnnxNetwork
from client.export.probing import TOLERANCE, probe_tiles
from client.export.torchscript import export_torchscript
from client.prediction import evaluate_manifest, predict_folder
from client.student_commands import FORMAT_NAMES
from client.students import STUDENTS, LoadedStudent, build_student, load_student, save_student
from common.errors import ArtefactError, DataError, UsageError
from common.recipe import Anatomy, ClassConfig, DataConfig, PhantomConfig
from simulations.phantoms import write_site
from tests.unit.test_data import REAL, needs_real
from wardround import main

ABOUT = {"run_id": "run-1", "model": "student"}
DATA = DataConfig(image_size=64, classes=[ClassConfig("cell", 255, "blob")])
NAMES = {"onnx": "student.onnx", "onnx-int8": "int8.onnx", "torchscript": "student.ts", "monai": "bundle"}


def save(folder: Path, name: str = "unet-xs", data: DataConfig = DATA) -> Path:
    shipped = name == "unet-xs"
    student = build_student(name, data, pretrained=shipped, seed=3)
    save_student(student, folder / "student.safetensors", name, data, ABOUT)
    return folder / "student.safetensors"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a labelled site of procedural patients."""
    config = PhantomConfig(
        anatomy=Anatomy.cells, train_patients=6, val_patients=0, test_patients=6, images_per_patient=1
    )
    return write_site(config, tmp_path_factory.mktemp("phantoms"), 0, "north")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> dict[str, Path]:
    """The shipped student in every format, in one folder, with its weights."""
    folder = tmp_path_factory.mktemp("exports")
    weights = save(folder)
    found = {"safetensors": weights}
    for kind in FORMATS:
        found[kind] = folder / NAMES[kind]
        calibrate = phantoms if FORMATS[kind].calibrated else None
        export_student(weights, ExportRequest(kind, found[kind], calibrate))
    return found


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="wardround")


def test_the_command_line_offers_every_format() -> None:
    assert set(FORMAT_NAMES) == set(FORMATS) == set(NAMES)


# --- the same network -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
@pytest.mark.parametrize("size", [64, 96])
def test_every_student_is_the_same_network_in_every_format(
    tmp_path: Path, name: str, kind: str, size: int
) -> None:
    classes = [ClassConfig("a", 1, "blob"), ClassConfig("b", 2, "region")]
    data = replace(DATA, image_size=size, classes=classes)
    weights = save(tmp_path, name, data)
    out = tmp_path / NAMES[kind]
    card = export_student(weights, ExportRequest(kind, out))
    (entry,) = card["exports"]
    assert entry["about"]["largest_difference"] <= TOLERANCE
    trained, exported = load_student(weights), load_runnable(out)
    assert exported.card == trained.card
    shapes = [(1, size, size), (5, size, size)] + [(2, 2 * size, size + 32)] * entry["about"]["any_size"]
    for batch, height, width in shapes:
        tiles = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            assert (trained.module(tiles) - exported.module(tiles)).abs().max() <= TOLERANCE


def test_unet_xs_takes_tiles_of_other_sizes(exports: dict[str, Path]) -> None:
    entries = json.loads((exports["onnx"].parent / "model-card.json").read_text())["exports"]
    about = {entry["file"]: entry["about"] for entry in entries}
    assert about["student.onnx"]["any_size"]
    assert about["student.ts"]["any_size"]


def test_an_export_that_is_another_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = save(tmp_path)
    other = build_student("unet-xs", DATA, pretrained=True, seed=0)
    with torch.no_grad():
        other.head.bias += 2 * TOLERANCE
    write = client.export.onnx_file._write
    wrong = LoadedStudent(other.eval(), load_student(weights).card)
    monkeypatch.setattr(
        client.export.onnx_file, "_write", lambda _, path, any_size: write(wrong, path, any_size)
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out/student.onnx").write_bytes(b"what was there before")
    with pytest.raises(ArtefactError, match=r"differs from the student by 0\.0002"):
        export_student(weights, ExportRequest("onnx", tmp_path / "out/student.onnx"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["student.onnx"]
    assert (tmp_path / "out/student.onnx").read_bytes() == b"what was there before"


class OneSize(nn.Module):
    """A network with its size built in, which no trace can take to another."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.ramp = nn.Parameter(torch.linspace(-1, 1, 64))

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(tiles) + self.ramp
        return logits


class CountsPixels(nn.Module):
    """Runs at any size, but a trace keeps the width that it saw."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(tiles) * (int(tiles.shape[-1]) / 64)
        return logits


@pytest.mark.parametrize("network", [OneSize, CountsPixels])
def test_a_network_of_one_size_is_exported_for_that_size(
    tmp_path: Path, network: Callable[[nn.Module], nn.Module]
) -> None:
    trained = load_student(save(tmp_path))
    student = LoadedStudent(network(trained.module).eval(), trained.card)  # type: ignore[arg-type]
    for module, kind in ((client.export.onnx_file.export_onnx, "a.onnx"), (export_torchscript, "a.ts")):
        fidelity = module(student, tmp_path / kind)
        assert not fidelity.any_size
        assert fidelity.largest_difference <= TOLERANCE
    if network is OneSize:
        with pytest.raises(ArtefactError, match="cannot take tiles of 128 x 64 pixels"):
            client.export.onnx_file.OnnxNetwork(tmp_path / "a.onnx")(torch.zeros(1, 3, 128, 64))


# --- used in the student's place ------------------------------------------------------------------


def dice(student: Path, manifest: Path) -> float:
    (value,) = (cell.value for cell in evaluate_manifest(student, manifest) if cell.metric == "dice")
    assert value is not None
    return value


def test_every_format_is_measured_alike(exports: dict[str, Path], phantoms: Path) -> None:
    trained = dice(exports["safetensors"], phantoms)
    assert trained > 0.3  # it finds something: else all formats could agree on nothing
    for kind in ("onnx", "torchscript", "monai"):
        assert dice(exports[kind], phantoms) == pytest.approx(trained, abs=0.001), kind
    assert dice(exports["onnx-int8"], phantoms) == pytest.approx(trained, abs=0.01)


@needs_real
def test_every_format_is_measured_alike_on_real_nuclei(tmp_path: Path) -> None:
    images = sorted((REAL / "DSB2018_96/images").glob("*.png"))[::9]
    rows = ["image,mask,patient,split"]
    for number, path in enumerate(images):
        split = "train" if number < 16 else "test"
        rows.append(f"{path},{REAL / 'DSB2018_96/masks' / path.name},p{number},{split}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    weights = save(tmp_path, data=replace(DATA, image_size=96))
    trained = dice(weights, tmp_path / "manifest.csv")
    assert trained > 0.6
    manifest = tmp_path / "manifest.csv"
    for kind, tolerance in {"onnx": 0.001, "torchscript": 0.001, "onnx-int8": 0.01}.items():
        calibrate = manifest if kind == "onnx-int8" else None
        export_student(weights, ExportRequest(kind, tmp_path / NAMES[kind], calibrate))
        assert dice(tmp_path / NAMES[kind], manifest) == pytest.approx(trained, abs=tolerance)


def test_int8_is_whole_numbers_and_smaller(exports: dict[str, Path]) -> None:
    import onnx

    kinds = {node.op_type for node in onnx.load(exports["onnx-int8"]).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds
    assert exports["onnx-int8"].stat().st_size < 0.4 * exports["onnx"].stat().st_size
    tiles = probe_tiles(2, 64, 64)
    change = OnnxNetwork(exports["onnx-int8"])(tiles) - OnnxNetwork(exports["onnx"])(tiles)
    assert 1e-3 < change.abs().max() < 5


def test_a_bundle_runs_without_an_installation_of_ours(
    exports: dict[str, Path], phantoms: Path, tmp_path: Path
) -> None:
    """MONAI's own runner, offline, in a process that cannot import Wardround; the same masks as ours."""
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((phantoms.parent / "images").iterdir())[:3]:
        (images / path.name).write_bytes(path.read_bytes())
    Image.fromarray(np.random.default_rng(0).integers(0, 60000, (40, 90)).astype(np.uint16)).save(
        images / "wide.tif"
    )
    script = (
        "import sys; sys.path = [part for part in sys.path if part != sys.argv[3]]\n"
        "sys.modules['client'] = sys.modules['common'] = None\n"
        "from monai.bundle import ConfigParser, run\n"
        "run(config_file='configs/inference.json', image_dir=sys.argv[1], output_dir=sys.argv[2])\n"
        "parser = ConfigParser(); parser.read_config('configs/inference.json')\n"
        "print(type(parser.get_parsed_content('network_def')).__name__)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", script, str(images), str(tmp_path / "masks"), str(Path.cwd())],
        cwd=exports["monai"], env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("ScriptModule")
    ours = predict_folder(exports["safetensors"], images, tmp_path / "ours")
    for mask in ours.masks:
        (name,) = (path.name for path in images.iterdir() if path.stem == mask.stem)
        with Image.open(mask) as one, Image.open(tmp_path / "masks" / f"{name}.png") as other:
            assert np.array_equal(np.array(one), np.array(other)), name
    assert any(np.array(Image.open(mask)).any() for mask in ours.masks)


def test_a_bundle_has_what_monai_asks_for(exports: dict[str, Path]) -> None:
    folder = exports["monai"]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "configs/metadata.json", "configs/inference.json", "models/model.pt", "models/model.ts",
        "docs/README.md", "LICENSE", "model-card.md", "model-card.json",
    } <= names  # fmt: skip
    metadata = json.loads((folder / "configs/metadata.json").read_text())
    needed = {"version", "monai_version", "pytorch_version", "numpy_version", "network_data_format", "schema"}
    assert needed <= set(metadata)
    state = torch.load(folder / "models/model.pt", weights_only=True)
    rebuilt = STUDENTS["unet-xs"](1)
    rebuilt.load_state_dict(state)
    tiles = probe_tiles(1, 64, 64)
    assert torch.equal(rebuilt.eval()(tiles), load_runnable(folder).module(tiles))


# --- the model card -------------------------------------------------------------------------------


def in_a_run(folder: Path, guarantee: bool = True, run_id: str = "run-1") -> Path:
    """A student where a run leaves it, with the run's report and the site's privacy page."""
    site = folder / "run/sites/north"
    site.mkdir(parents=True)
    weights = save(site)
    cell = {"tested_on": "own", "metric": "dice", "class": "cell", "site": "north", "reason": ""}
    report = {
        "run": {"id": run_id},
        "sites": [
            {"id": "north", "patients": 31, "images": 62, "train": 20, "val": 2, "test": 9},
            {"id": "south", "patients": 4711, "images": 4711, "train": 4711, "val": 0, "test": 0},
        ],
        "benefit": [
            cell | {"model": "student", "value": 0.8125, "ci95": [0.75, 0.875], "patients": 9},
            cell | {"model": "teacher", "value": 0.9375, "ci95": [0.9, 0.95], "patients": 9},
            cell | {"model": "student", "site": "south", "value": 0.1875, "ci95": [0.1, 0.2], "patients": 9},
        ],
    }
    (folder / "run/report.json").write_text(json.dumps(report))
    page = {
        "run": {"id": "run-1"}, "guarantee": guarantee,
        "statement": [{"title": "Statement", "text": "Epsilon is 3.5 at most."}],
    }  # fmt: skip
    (site / "privacy.json").write_text(json.dumps(page))
    return weights


def test_the_card_tells_of_data_quality_privacy_and_the_files(tmp_path: Path) -> None:
    weights = in_a_run(tmp_path)
    card = export_student(weights, ExportRequest("onnx", tmp_path / "out/a.onnx"))
    text = (tmp_path / "out/model-card.md").read_text()
    assert card["data"] == {"id": "north", "patients": 31, "images": 62, "train": 20, "val": 2, "test": 9}
    assert "| cell | dice | own | 0.812 | 0.750 to 0.875 | 9 |" in text
    for absent in ("0.9375", "0.938", "0.188", "south", "4711", str(tmp_path), "north/student"):
        assert absent not in text, absent
        assert absent not in (tmp_path / "out/model-card.json").read_text(), absent
    assert load_student(weights).card.sha256 in text
    assert "GUARANTEE for what the site sent in this run. Epsilon is 3.5 at most." in text
    # A student saw labelled images without noise: the teacher's guarantee is not its own.
    assert card["privacy"]["verdict"] == "NO GUARANTEE"
    assert "**NO GUARANTEE.**" in text
    assert not card["privacy"]["covered"]


def test_the_card_claims_nothing_that_its_files_do_not_say(tmp_path: Path) -> None:
    for number, changes in enumerate(({"guarantee": False}, {"run_id": "run-2"})):
        weights = in_a_run(tmp_path / str(number), **changes)  # type: ignore[arg-type]
        card = export_student(weights, ExportRequest("onnx", tmp_path / f"out{number}/a.onnx"))
        if "run_id" in changes:
            assert card["data"] is None
            assert card["metrics"] == []
        else:
            assert card["privacy"]["of_what_was_sent"].startswith("NO GUARANTEE for what the site sent")
    (weights.parent / "privacy.json").unlink()
    card = export_student(weights, ExportRequest("onnx", tmp_path / "out2/a.onnx"))
    assert "No privacy.json" in card["privacy"]["of_what_was_sent"]
    (weights.parent / "privacy.json").write_text("{}")
    with pytest.raises(ArtefactError, match="make the page again"):
        export_student(weights, ExportRequest("onnx", tmp_path / "out3/a.onnx"))


def test_cards_of_several_exports_are_one_and_another_student_s_is_left_alone(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    folder = exports["onnx"].parent
    listed = json.loads((folder / "model-card.json").read_text())["exports"]
    assert {entry["file"] for entry in listed} == {"student.onnx", "int8.onnx", "student.ts"}
    other = save(tmp_path, data=replace(DATA, classes=[ClassConfig("vessel", 255, "vessel")]))
    with pytest.raises(UsageError, match="another student"):
        export_student(other, ExportRequest("torchscript", folder / "other.ts"))
    assert not (folder / "other.ts").exists()


def test_what_is_measured_for_a_card_is_withheld_where_patients_are_few(
    tmp_path: Path, phantoms: Path
) -> None:
    weights = save(tmp_path)
    few = phantoms.with_name("few.csv")
    lines = phantoms.read_text().splitlines()
    few.write_text("\n".join([line for line in lines if ",train" not in line][:4]) + "\n")
    for manifest, shown in ((phantoms, True), (few, False)):
        result = run(
            "student", "export", weights, "--format", "onnx", "--out", tmp_path / f"{shown}/a.onnx",
            "--evaluate", manifest, "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        card = json.loads((tmp_path / f"{shown}/model-card.json").read_text())
        assert all((cell["value"] is not None) == shown for cell in card["metrics"])
        assert {cell["metric"] for cell in card["metrics"]} == {"dice", "hd95", "nsd"}


# --- faults ---------------------------------------------------------------------------------------


def test_a_changed_export_and_files_that_are_none_are_refused(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    import onnx

    folder = tmp_path / "copy"
    folder.mkdir()
    for path in exports["onnx"].parent.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    load_runnable(folder / "student.onnx")
    model = onnx.load(folder / "student.onnx")
    model.producer_name = "somebody"
    onnx.save(model, folder / "student.onnx")
    with pytest.raises(ArtefactError, match="sha256"):
        load_runnable(folder / "student.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    (tmp_path / "broken.ts").write_bytes(b"no network")
    (tmp_path / "a.pkl").touch()
    words = {
        "bare.onnx": "no student's card", "broken.onnx": "no ONNX file", "broken.ts": "no TorchScript",
        "a.pkl": "no student", "gone.ts": "missing", "copy": "missing",
    }  # fmt: skip
    for name, word in words.items():
        with pytest.raises(ArtefactError, match=word):
            load_runnable(tmp_path / name)


def test_every_fault_of_a_request_is_named_at_once(tmp_path: Path) -> None:
    weights = save(tmp_path)
    result = run("student", "export", weights, "--format", "onnx-int8", "--out", tmp_path / "a.bin")
    assert result.exit_code == 2
    assert "must end in .onnx" in result.stderr
    assert "needs --calibrate" in result.stderr
    result = run(
        "student",
        "export",
        weights,
        "--format",
        "torchscript",
        "--out",
        tmp_path / "a.ts",
        "--calibrate",
        tmp_path,
    )
    assert "no use for torchscript" in result.stderr
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").touch()
    result = run("student", "export", weights, "--format", "monai", "--out", tmp_path / "taken")
    assert result.exit_code == 2
    assert (tmp_path / "taken/notes.txt").exists()
    assert (
        run(
            "student", "export", tmp_path / "none.safetensors", "--format", "onnx", "--out", "a.onnx"
        ).exit_code
        == 12
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="no image"):
        export_student(weights, ExportRequest("onnx-int8", tmp_path / "a.onnx", empty))
    assert not list(tmp_path.glob("*.onnx"))


def test_the_command_prints_what_was_checked(tmp_path: Path, phantoms: Path) -> None:
    weights = save(tmp_path)
    result = run(
        "student", "export", weights, "--format", "onnx-int8", "--out", tmp_path / "a.onnx",
        "--calibrate", phantoms.parent / "images",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "dice: " in result.stdout
    assert "NO GUARANTEE" in result.stdout
    predicted = run(
        "student",
        "predict",
        tmp_path / "a.onnx",
        phantoms.parent / "images",
        "--out",
        tmp_path / "m",
        "--json",
    )
    assert predicted.exit_code == 0, predicted.stderr
    assert len(json.loads(predicted.stdout)["masks"]) == 12


def test_prediction_names_what_failed_and_still_answers_in_json(tmp_path: Path, phantoms: Path) -> None:
    weights = save(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    (images / "good.png").write_bytes(next((phantoms.parent / "images").iterdir()).read_bytes())
    (images / "bad.nii.gz").write_bytes(b"bad")
    result = run("student", "predict", weights, images, "--out", tmp_path / "masks", "--json")
    assert result.exit_code == 11
    assert "bad.nii.gz" in result.stderr
    document = json.loads(result.stdout)
    assert [Path(path).name for path in document["masks"]] == ["good.png"]
    assert "bad.nii.gz" in document["failed"][0]


def test_tiles_and_masks_take_the_same_path_in_every_format(exports: dict[str, Path], phantoms: Path) -> None:
    patient = load_patients(phantoms, DATA, 0)[0]
    found = [
        predict(load_runnable(exports[kind]).module, patient.samples[0].image, DATA, 0.25)
        for kind in ("safetensors", "onnx", "torchscript", "monai")
    ]
    for other in found[1:]:
        assert (found[0] - other).abs().max() < TOLERANCE
