"""Public factors: what they hold, that they are pinned to their teacher, and that anybody can make them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from client.losses import image_losses
from client.shapes import lesion
from common import checkpoints, public_factors
from common.config import load_recipe
from common.errors import ArtefactError, ConfigError
from common.foundation.importing import ImportOptions, import_teacher
from common.precision import pack_down, unpack
from common.public_factors import MOST_ROWS, ROW_NORM, with_public_rows
from common.recipe import ClassConfig, DataConfig, DecoderTraining, TeacherConfig, WireDtype
from common.teacher import (
    initial_adapter,
    private_initial_adapter,
    resident_teacher,
    shipped_teacher,
    teacher_info,
)
from common.tuning.presets import PRESETS, Kind
from simulations.public_factors import leading_rows, main, measured_layers, moments, public_images
from tests.foundation_checkpoints import SIDE, folder_of

NAME = "ward-sam-tiny"
DATA = DataConfig(image_size=64, classes=[ClassConfig(like="region")])
ANY = ImportOptions(accept_licence=True)
DP = TeacherConfig(NAME, "dp", decoder=DecoderTraining.head)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped teacher and its factors in a folder of their own; the path of the factors' weights."""
    for source in checkpoints.FOLDER.rglob(f"{NAME}.*"):
        target = tmp_path / source.relative_to(checkpoints.FOLDER)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    return tmp_path / public_factors.FOLDER / f"{NAME}.safetensors"


# --- what ships ---------------------------------------------------------------------------------------


def test_the_shipped_factors_are_small_and_say_how_they_were_made() -> None:
    card = public_factors.card(NAME)
    assert card["bytes"] < 2**19
    assert card["base_sha256"] == checkpoints.base_sha256(NAME)
    made = f"{public_factors.making(NAME)} --seed {card['seed']} --images {card['images']}"
    assert card["reproduce"] == f"{made} --image-size {card['image_size']}"


@pytest.mark.parametrize("preset", [name for name, about in PRESETS.items() if about.kind is Kind.lora])
def test_every_layer_that_a_preset_gives_factors_to_has_rows(preset: str) -> None:
    config = TeacherConfig(NAME, preset, rank=MOST_ROWS, decoder=DecoderTraining.lora)
    start = private_initial_adapter(config, DATA, 0)
    rows = public_factors.load(NAME)
    for layer in start.layers():
        assert torch.equal(start.tensors[f"{layer}.lora_A"], rows[layer])


def test_rows_are_orthogonal_and_as_long_as_those_of_a_random_start() -> None:
    """Up to bfloat16: a step of B, or noise on it, then changes a weight as much as it did."""
    for layer, rows in public_factors.load(NAME).items():
        assert rows.shape[0] == MOST_ROWS
        eye = torch.eye(MOST_ROWS) * ROW_NORM**2
        assert torch.allclose(rows @ rows.T, eye, atol=2e-3), layer
    start = initial_adapter(TeacherConfig(NAME, "wide"), DATA, 0)
    factors = [t for name, t in start.tensors.items() if name.endswith(".lora_A")]
    squares = torch.cat([rows.square().sum(1) for rows in factors])
    assert float(squares.mean()) == pytest.approx(ROW_NORM**2, rel=0.02)


def test_the_first_rows_are_the_same_at_every_rank() -> None:
    low, high = (private_initial_adapter(replace(DP, rank=rank), DATA, 0) for rank in (2, 8))
    for layer in low.layers():
        assert torch.equal(low.tensors[f"{layer}.lora_A"], high.tensors[f"{layer}.lora_A"][:2])
        assert not high.tensors[f"{layer}.lora_B"].any()


@pytest.mark.parametrize("dtype", WireDtype)
def test_a_has_one_digest_for_every_wire_dtype(dtype: WireDtype) -> None:
    start = private_initial_adapter(DP, DATA, 0)
    assert unpack(pack_down(start, dtype)).a_sha256 == start.a_sha256 != ""


def test_the_digest_is_of_a_alone_and_of_all_of_it() -> None:
    start = private_initial_adapter(DP, DATA, 0)
    name = next(name for name in start.tensors if name.endswith(".lora_A"))
    moved = {key: t if key.endswith(".lora_A") else t + 1 for key, t in start.tensors.items()}
    assert replace(start, tensors=moved).a_sha256 == start.a_sha256
    for changed in ({**start.tensors, name: start.tensors[name].nextafter(torch.tensor(1.0))},
                    {key: t for key, t in start.tensors.items() if key != name}):  # fmt: skip
        assert replace(start, tensors=changed).a_sha256 != start.a_sha256
    assert start.a_sha256 != private_initial_adapter(replace(DP, rank=2), DATA, 0).a_sha256
    assert initial_adapter(TeacherConfig(NAME, "decoder"), DATA, 0).a_sha256 == ""


def test_teacher_info_shows_the_digest_that_a_policy_lists() -> None:
    presets = teacher_info(NAME)["presets"]
    for rank in (4, 9):
        pinned = private_initial_adapter(replace(DP, rank=rank), DATA, 3).a_sha256
        assert presets["dp"]["a_matrix_sha256"][str(rank)] == pinned
    assert "a_matrix_sha256" not in presets["base"]


def test_public_rows_hold_most_of_a_gradient_that_random_rows_miss() -> None:
    """Of lesions that the factors were not made from, one image each; at B's start, by the whole weight."""
    rng = np.random.default_rng(5)
    masks = np.stack([lesion(rng, 64, (6, 18), 1) > 0 for _ in range(6)])
    images = 0.55 - 0.3 * masks[:, None] + rng.normal(0, 0.06, (6, 3, 64, 64))
    taken = [
        gradients_at(torch.from_numpy(image).float(), torch.from_numpy(mask).float())
        for image, mask in zip(images, masks, strict=True)
    ]
    shares = {}
    for name, start in (("public", private_initial_adapter), ("random", initial_adapter)):
        tensors = start(DP, DATA, 0).tensors
        held = whole = 0.0
        for gradients in taken:
            for layer, gradient in gradients.items():
                basis = torch.linalg.qr(tensors[f"{layer}.lora_A"].T)[0]
                held += float((gradient @ basis).square().sum())
                whole += float(gradient.square().sum())
        shares[name] = held / whole
    assert shares["public"] > 0.8
    assert shares["random"] < 0.1


def gradients_at(image: Tensor, mask: Tensor) -> dict[str, Tensor]:
    network = shipped_teacher(NAME, 64)
    network.encoder.split_qkv()
    layers = [f"encoder.{name}" for name in network.encoder.layers(["q", "v"])]
    weights = [network.get_submodule(layer).weight for layer in layers]
    loss = image_losses(network(image[None]).logits[:, 2:3], mask[None, None], exclusive=False).sum()
    return dict(zip(layers, torch.autograd.grad(loss, weights), strict=True))


# --- how they are made --------------------------------------------------------------------------------


def test_rows_are_the_right_singular_vectors_of_the_images_gradients() -> None:
    """Against the decomposition of the stacked gradients: of a fused layer, its parts and a convolution."""
    network = shipped_teacher(NAME, 64).eval()
    network.encoder.split_qkv()
    images, targets = public_images(1, 4, 64)
    layers = measured_layers(NAME)
    fused = next(name for name, parts in layers.items() if len(parts) == 3)
    chosen = [*layers[fused], "decoder.project"]
    found = moments(network, chosen, images, targets)
    stacked: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for image, target in zip(images, targets, strict=True):
        network.zero_grad()
        network.requires_grad_(True)
        image_losses(network(image[None]).logits, target[None], exclusive=False).sum().backward()
        grads = {name: network.get_submodule(name).weight.grad.flatten(1).double() for name in chosen}
        of_encoder = torch.stack([grads[name].square().sum() for name in layers[fused]]).sum().sqrt()
        for name, gradient in grads.items():
            stacked[name].append(gradient / (of_encoder if name in layers[fused] else gradient.norm()))
    whole = {name: torch.cat(parts) for name, parts in stacked.items()}
    whole[fused] = torch.cat([whole[part] for part in layers[fused]])
    sums = {**found, fused: torch.stack([found[part] for part in layers[fused]]).sum(0)}
    for name, gradients in whole.items():
        vt = torch.linalg.svd(gradients, full_matrices=False)[2][:2]
        rows = leading_rows(sums[name], 2)
        assert torch.allclose((rows @ vt.T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-4), name


@pytest.mark.parametrize("family", ["SamModel", "Dinov2Model"])
def test_anybody_can_make_them_for_an_imported_teacher(
    family: str, tmp_path: Path, teachers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = import_teacher(str(folder_of(family, tmp_path)), teachers, ANY)["name"]
    config = TeacherConfig(name, "dp", decoder=DecoderTraining.head)
    with pytest.raises(ArtefactError, match=f"python -m simulations.public_factors {name}"):
        private_initial_adapter(config, DataConfig(image_size=SIDE), 0)
    assert teacher_info(name)["presets"]["dp"]["a_matrix_sha256"] == {}
    main([name, "--images", "2"])
    card = json.loads((teachers / public_factors.FOLDER / f"{name}.json").read_text())
    assert card["sha256"] in capsys.readouterr().out
    start = private_initial_adapter(config, DataConfig(image_size=SIDE), 0)
    assert teacher_info(name)["presets"]["dp"]["a_matrix_sha256"]["4"] == start.a_sha256


def test_the_same_seed_makes_the_same_rows_and_another_seed_others(copied: Path) -> None:
    digests = []
    for seed in ("1", "1", "2"):
        main([NAME, "--images", "2", "--image-size", "64", "--seed", seed])
        digests.append(public_factors.card(NAME)["sha256"])
    assert digests[0] == digests[1] != digests[2]


# --- what is refused ----------------------------------------------------------------------------------


def test_factors_that_are_changed_or_of_other_weights_are_refused(copied: Path) -> None:
    card, whole = copied.with_suffix(".json"), copied.read_bytes()
    assert public_factors.card(NAME)
    copied.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtefactError, match="not those of their card"):
        public_factors.load(NAME)
    copied.write_bytes(whole)
    card.write_text(json.dumps(json.loads(card.read_text()) | {"base_sha256": "0f" * 32}))
    with pytest.raises(ArtefactError, match="other weights"):
        public_factors.load(NAME)
    card.unlink()
    with pytest.raises(ArtefactError, match="no card"):
        public_factors.load(NAME)


def test_without_public_factors_a_is_never_random_under_noise(copied: Path) -> None:
    copied.unlink()
    with pytest.raises(ArtefactError, match=f"simulations.public_factors {NAME}"):
        private_initial_adapter(DP, DATA, 0)
    decoder = TeacherConfig(NAME, "decoder")
    assert private_initial_adapter(decoder, DATA, 0).digest == initial_adapter(decoder, DATA, 0).digest
    asked = ["teacher.adapter=dp", "aggregation.rule=ffa", "privacy.noise_multiplier=1"]
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", asked)
    assert any(f"simulations.public_factors {NAME}" in fault for fault in caught.value.faults)


def test_too_few_rows_are_a_fault_by_layer() -> None:
    start = resident_teacher(DP, DATA).slots.initial(0)
    rows = public_factors.load(NAME)
    first = start.layers()[0]
    with pytest.raises(ArtefactError) as caught:
        with_public_rows(start, {**rows, first: rows[first][:3]})
    assert caught.value.faults == (f"{first} has 3 public rows, and rank 4 is asked for",)
    with pytest.raises(ArtefactError):
        with_public_rows(start, {})
