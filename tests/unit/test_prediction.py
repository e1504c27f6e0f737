"""A student on folders and manifests, as the command line uses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import client.prediction
from client.data import load_image
from client.evaluation import predict
from client.prediction import PredictionOptions, evaluate_manifest, label_image, predict_folder
from client.students import LoadedStudent, StudentCard, build_student, save_student
from common.errors import ArtefactError, DataError, UsageError
from common.metrics import METRICS
from common.recipe import ClassConfig, DataConfig

CLASSES = [ClassConfig("bright", 200), ClassConfig("green", 100)]
SIZE = 32
DATA = DataConfig(image_size=SIZE, classes=CLASSES)


class Thresholds(nn.Module):
    """Bright where red is high; green where green alone is high. Reads a picture off pixel by pixel."""

    def forward(self, tiles: Tensor) -> Tensor:
        return torch.stack([20 * (tiles[:, 0] - 0.5), 20 * (tiles[:, 1] - tiles[:, 0] - 0.5)], 1)


def card(**changes: object) -> StudentCard:
    settings = {
        "name": "unet-xs", "classes": CLASSES, "image_size": SIZE, "longest_side": None,
        "field_of_view": False, "params": 0, "sha256": "", "run_id": "run", "model": "student",
    }  # fmt: skip
    return StudentCard(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student whose right answer is known: it stands in for the weights, not for the code under test."""
    use(monkeypatch, card())
    return Path("student.safetensors")


class Everything(nn.Module):
    """Calls every pixel bright."""

    def forward(self, tiles: Tensor) -> Tensor:
        return torch.tensor([9.0, -9.0])[None, :, None, None].expand(len(tiles), -1, *tiles.shape[2:]).clone()


def use(monkeypatch: pytest.MonkeyPatch, its_card: StudentCard, module: type[nn.Module] = Thresholds) -> None:
    monkeypatch.setattr(client.prediction, "load_runnable", lambda path: LoadedStudent(module(), its_card))


def picture(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An RGB picture with a white square and a green bar, and its label values."""
    pixels = np.zeros((height, width, 3), np.uint8)
    labels = np.zeros((height, width), np.uint8)
    square = slice(height // 4, height // 2), slice(width // 4, width // 2)
    bar = slice(3 * height // 4, height), slice(0, width)
    pixels[square], labels[square] = 255, 200
    pixels[bar], labels[bar] = (0, 255, 0), 100
    return pixels, labels


def put(folder: Path, name: str, height: int = 24, width: int = 40) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    pixels, labels = picture(height, width)
    Image.fromarray(pixels).save(folder / name)
    return labels


def read(path: Path) -> np.ndarray:
    with Image.open(path) as mask:
        assert (mask.format, mask.mode) == ("TIFF" if path.suffix == ".tif" else "PNG", "L")
        return np.array(mask)


def test_masks_have_the_image_s_size_and_the_card_s_labels(tmp_path: Path, student: Path) -> None:
    expected = {
        "small.png": put(tmp_path / "in", "small.png", 9, 20),
        "wide.tif": put(tmp_path / "in", "wide.tif", 40, 100),
    }
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    summary = predict_folder(student, tmp_path / "in", tmp_path / "out")
    assert summary.masks == (tmp_path / "out/small.png", tmp_path / "out/wide.tif")
    assert summary.overlays == ()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["small.png", "wide.tif"]
    for name, labels in expected.items():
        assert np.array_equal(read(tmp_path / f"out/{name}"), labels)


def test_masks_of_resized_images_come_back_in_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = put(tmp_path / "in", "large.png", 120, 200)
    use(monkeypatch, card(longest_side=100))
    predict_folder(Path("s"), tmp_path / "in", tmp_path / "out")
    found = read(tmp_path / "out/large.png")
    assert found.shape == labels.shape
    assert (found == labels).mean() > 0.98


def test_nothing_is_marked_outside_the_field_of_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = np.mgrid[:60, :60]
    disc = (rows - 30) ** 2 + (columns - 30) ** 2 < 25**2
    pixels = np.where(disc[..., None], np.array([120, 60, 40]), 0).astype(np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in/fundus.png")
    found = {}
    for field_of_view in (False, True):
        use(monkeypatch, card(field_of_view=field_of_view), Everything)
        predict_folder(Path("s"), tmp_path / "in", tmp_path / f"out-{field_of_view}")
        found[field_of_view] = read(tmp_path / f"out-{field_of_view}/fundus.png")
    assert (found[False] == 200).all()
    assert (found[True][(rows - 30) ** 2 + (columns - 30) ** 2 < 23**2] == 200).all()
    assert not found[True][(rows - 30) ** 2 + (columns - 30) ** 2 > 28**2].any()


def test_corrupt_files_are_named_and_the_rest_is_done(tmp_path: Path, student: Path) -> None:
    for name in ("a.png", "c.png", "e.png"):
        put(tmp_path / "in", name)
    (tmp_path / "in/b.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    whole = (tmp_path / "in/a.png").read_bytes()
    (tmp_path / "in/d.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="2 of 5") as caught:
        predict_folder(student, tmp_path / "in", tmp_path / "out")
    assert [("b.png" in fault, "d.png" in fault) for fault in caught.value.faults] == [
        (True, False),
        (False, True),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png", "e.png"]


def test_images_of_one_stem_get_a_mask_each(tmp_path: Path, student: Path) -> None:
    put(tmp_path / "in", "a.png", 16, 16)
    put(tmp_path / "in", "a.jpg", 20, 20)
    put(tmp_path / "in", "b.tif", 24, 24)
    summary = predict_folder(student, tmp_path / "in", tmp_path / "out")
    assert [path.name for path in summary.masks] == ["a.jpg.png", "a.png.png", "b.tif.tif"]
    assert [read(path).shape for path in summary.masks] == [(20, 20), (16, 16), (24, 24)]


def test_overlay_draws_the_outline_and_keeps_the_rest(tmp_path: Path, student: Path) -> None:
    put(tmp_path / "in", "a.png", 40, 40)
    summary = predict_folder(student, tmp_path / "in", tmp_path / "out", PredictionOptions(overlay=True))
    assert summary.overlays == (tmp_path / "out/overlays/a.png",)
    pixels, _ = picture(40, 40)
    with Image.open(summary.overlays[0]) as drawn:
        changed = (np.array(drawn) != pixels).any(axis=2)
    edge = np.zeros((40, 40), bool)
    edge[10:20, 10:20], edge[30:, :] = True, True
    edge[11:19, 11:19], edge[31:39, 1:39] = False, False
    assert np.array_equal(changed, edge)


def test_threshold_decides_from_when_on_a_pixel_counts() -> None:
    probabilities = torch.tensor([[[0.1, 0.5, 0.7, 0.8]], [[0.2, 0.3, 0.6, 0.9]]])
    assert label_image(probabilities, DATA, 0.5).tolist() == [[0, 200, 200, 100]]
    assert label_image(probabilities, DATA, 0.75).tolist() == [[0, 0, 0, 100]]
    assert label_image(probabilities, DATA, 0.0).tolist() == [[100, 200, 200, 100]]


def test_the_innermost_class_gives_its_label() -> None:
    """Whole, part and part of the part, in any order; each within the one before."""
    classes = [ClassConfig("part", 2, also=[3]), ClassConfig("whole", 1, also=[2, 3]), ClassConfig("core", 3)]
    data = DataConfig(classes=classes)
    probability = torch.tensor(
        [[[0.2, 0.1, 0.6, 0.6, 0.1]], [[0.1, 0.9, 0.9, 0.9, 0.9]], [[0.3, 0.1, 0.4, 0.5, 0.5]]]
    )
    assert label_image(probability, data, 0.5).tolist() == [[0, 1, 2, 3, 3]]


def test_exclusive_classes_are_weighed_against_the_background() -> None:
    """Neither class has half of the second pixel, and yet it is no background."""
    probability = torch.tensor([[[0.2, 0.4, 0.1]], [[0.3, 0.35, 0.6]]])
    data = DataConfig(classes=CLASSES, exclusive=True)
    assert label_image(probability, data, 0.5).tolist() == [[0, 200, 100]]
    assert label_image(probability, DATA, 0.5).tolist() == [[0, 0, 100]]
    assert label_image(probability, data, 0.9).tolist() == [[0, 0, 0]]


def test_folders_that_cannot_serve_are_refused(tmp_path: Path, student: Path) -> None:
    put(tmp_path / "in", "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    before = (tmp_path / "in/a.png").read_bytes()
    with pytest.raises(DataError, match="not a folder"):
        predict_folder(student, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(DataError, match="no image"):
        predict_folder(student, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UsageError, match="over the images"):
        predict_folder(student, tmp_path / "in", tmp_path / "empty" / ".." / "in")
    with pytest.raises(UsageError, match="cannot be made"):
        predict_folder(student, tmp_path / "in", tmp_path / "file")
    assert (tmp_path / "in/a.png").read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_saved_student_predicts_what_its_network_says(tmp_path: Path) -> None:
    """The lead's own format, with random weights: the mask is the network's, tile by tile."""
    data = DataConfig(image_size=SIZE, classes=CLASSES)
    network = build_student("unet-xs", data, pretrained=False, seed=5)
    weights = tmp_path / "student.safetensors"
    save_student(network, weights, "unet-xs", data, {"run_id": "run", "model": "student"})
    put(tmp_path / "in", "a.png", 40, 50)
    (mask,) = predict_folder(weights, tmp_path / "in", tmp_path / "out").masks
    image = load_image(tmp_path / "in/a.png", data).image
    probabilities = predict(network.eval(), image, data, 0.25)
    assert np.array_equal(read(mask), label_image(probabilities, data, 0.5))
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ArtefactError, match="sha256"):
        predict_folder(weights, tmp_path / "in", tmp_path / "out")


def manifest(folder: Path, splits: bool) -> Path:
    """Three patients of two images; the third's masks are all empty, so that everything found is wrong."""
    folder.mkdir()
    lines = ["image,mask,patient" + (",split" if splits else "")]
    for number, patient in enumerate(["p", "p", "q", "q", "r", "r"]):
        labels = put(folder, f"{number}.png")
        if patient == "r":
            labels = np.zeros_like(labels)
        Image.fromarray(labels).save(folder / f"{number}_mask.png")
        split = {"p": ",train", "q": ",test", "r": ",test"}[patient] if splits else ""
        lines.append(f"{number}.png,{number}_mask.png,{patient}{split}")
    path = folder / "manifest.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_evaluation_takes_the_test_split_or_everybody(tmp_path: Path, student: Path) -> None:
    for splits, patients, dice in ((True, 2, 1 / 2), (False, 3, 2 / 3)):
        rows = evaluate_manifest(student, manifest(tmp_path / str(splits), splits))
        assert [(row.metric, row.class_name) for row in rows] == [
            (metric, item.name) for metric in METRICS for item in CLASSES
        ]
        for row in rows:
            assert row.model == "student"
            if row.metric == "hd95":
                assert (row.value, row.patients) == (0.0, patients - 1)
                assert row.reason == "undefined for 1 more patients"
            else:
                assert (row.value, row.patients) == (pytest.approx(dice), patients)
                assert row.ci95 is not None
                assert row.ci95[0] < dice < row.ci95[1]
    again = evaluate_manifest(student, tmp_path / "False" / "manifest.csv")
    assert again == rows


def test_manifest_without_labelled_test_images_is_refused(tmp_path: Path, student: Path) -> None:
    path = manifest(tmp_path / "set", splits=True)
    path.write_text(path.read_text().replace(",test", ",val"))
    with pytest.raises(DataError, match="no labelled image in its test split"):
        evaluate_manifest(student, path)
