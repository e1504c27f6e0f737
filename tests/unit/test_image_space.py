"""The spaces that a generator denoises in: round trips, what depends on what, a user's own autoencoder."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from common.errors import ArtefactError
from common.generator import shipped_generator
from common.image_space import WEIGHTS, HaarSpace, ImageSpace, LatentSpace, codec_from, haar, inverse_haar
from common.recipe import Anatomy, PhantomConfig, ScannerConfig
from common.seeding import derive_rng
from simulations.latent_pretraining import CODEC, COMPONENTS, PATCH, start_from_components
from simulations.phantoms import draw_objects, random_tissue, scan

LATENT = "ward-diffusion-latent"
# An official autoencoder's config, but for its widths: two and not one or four numbers a level.
OFFICIAL = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1, "norm_num_groups": 8, "scaling_factor": 0.18215,
}  # fmt: skip


@lru_cache(maxsize=1)
def latent_space() -> ImageSpace:
    return shipped_generator(LATENT).eval().space


@lru_cache(maxsize=4)
def phantoms(side: int) -> Tensor:
    """(3, 3, S, S) in [-1, 1]: a phantom of each anatomy, under scanners of their own."""
    images = []
    for number, anatomy in enumerate(Anatomy):
        config = PhantomConfig(
            anatomy=anatomy,
            image_size=side,
            object_size=[0.03, 0.1],
            scanner=ScannerConfig(tint=[1.0, 0.8, 0.6], speckle=0.1, bright_objects=number == 2),
        )
        rng = derive_rng(7, str(anatomy))
        tissue = random_tissue(rng, config)
        images.append(torch.from_numpy(scan(rng, draw_objects(rng, config, tissue), tissue, config.scanner)))
    return torch.stack(images).permute(0, 3, 1, 2) * 2 - 1


@torch.inference_mode()
def fidelity(space: ImageSpace, image: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each image, encoded and decoded, dB."""
    made = space.decode(space.encode(image)).clamp(-1, 1)
    return (-10 * ((made - image) / 2).square().mean((1, 2, 3)).log10()).tolist()


def test_haar_is_inverted_exactly() -> None:
    image = torch.rand(2, 3, 16, 16)
    assert torch.allclose(inverse_haar(haar(image)), image, atol=1e-6)


@pytest.mark.parametrize("side", [192, 256])
def test_latents_give_phantoms_back_and_untrained_ones_do_not(side: int) -> None:
    torch.manual_seed(0)
    untrained = LatentSpace(AutoencoderTiny.from_config(CODEC))
    assert min(fidelity(latent_space(), phantoms(side))) > 27
    assert max(fidelity(untrained, phantoms(side))) < 20


@pytest.mark.parametrize("space", [HaarSpace(), latent_space], ids=["haar", "latent"])
def test_a_state_is_of_the_stated_shape_and_of_its_image_alone(space: object) -> None:
    made = space() if callable(space) and not isinstance(space, ImageSpace) else space
    assert isinstance(made, ImageSpace)
    images = phantoms(192)
    with torch.inference_mode():
        states = made.encode(images)
        assert tuple(states.shape) == made.shape(3, 192)
        assert torch.allclose(states[:1], made.encode(images[:1]), atol=1e-4)
        assert made.decode(states).shape == images.shape


def test_latents_have_about_mean_0_and_deviation_1() -> None:
    with torch.inference_mode():
        state = latent_space().encode(phantoms(192))
    assert state.mean().abs() < 0.6
    assert 0.4 < state.std() < 2


def test_half_precision_around_a_codec_does_not_reach_it() -> None:
    image = phantoms(192)[:1]
    with torch.inference_mode():
        plain = latent_space().encode(image)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(latent_space().encode(image), plain)
            assert latent_space().decode(plain).dtype == torch.float32


def test_the_codec_starts_as_the_best_linear_one() -> None:
    """Before any step: the error is that of the components left out, and latents deviate by about 1."""
    torch.manual_seed(0)
    image = (phantoms(192) + 1) / 2
    codec = AutoencoderTiny.from_config(CODEC)
    start_from_components(codec, image)
    space = LatentSpace(codec)
    squares = torch.nn.functional.pixel_unshuffle(image, PATCH).permute(1, 0, 2, 3).flatten(1)
    left_out = torch.linalg.eigvalsh(torch.cov(squares))[:-COMPONENTS].clamp_min(0).sum() / len(squares)
    with torch.inference_mode():
        state = space.encode(image * 2 - 1)
        made = codec.decoder.layers(state)  # its layers alone: before them it bends what is beyond 3
        error = (torch.nn.functional.pixel_shuffle(made, PATCH) - image).square().mean()
    assert error == pytest.approx(left_out.item(), rel=0.01)
    assert torch.allclose(state.std((0, 2, 3)), torch.ones(COMPONENTS), atol=0.02)


# -- an autoencoder of the user's own ----------------------------------------------------------------


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A folder as Stable Diffusion's ``vae`` is one, with small random weights."""
    torch.manual_seed(0)
    AutoencoderKL.from_config(OFFICIAL).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_a_tiny_autoencoders_folder_is_read_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}
    AutoencoderTiny.from_config(widths).save_pretrained(tmp_path)
    space = LatentSpace(codec_from(tmp_path))
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        state = space.encode(image)
        assert tuple(state.shape) == space.shape(1, 64) == (1, 4, 8, 8)
        assert space.decode(state).shape == image.shape


def test_an_official_folder_is_read_and_its_scaling_heeded(official: Path) -> None:
    codec = codec_from(official)
    space = LatentSpace(codec)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        state = space.encode(image)
        raw = codec.encode(image).latent_dist.mode()
        assert tuple(state.shape) == space.shape(1, 64) == (1, 4, 8, 8)
        assert torch.allclose(state, raw * 0.18215, atol=1e-6)
        assert torch.allclose(space.decode(state), codec.decode(raw).sample, atol=1e-5)


def test_a_shift_is_heeded_too(official: Path) -> None:
    codec = codec_from(official)
    codec.register_to_config(shift_factor=0.5)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        raw = codec.encode(image).latent_dist.mode()
        assert torch.allclose(LatentSpace(codec).encode(image), (raw - 0.5) * 0.18215, atol=1e-6)


def test_a_folder_without_a_config_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=f"holds no config.json .* give a folder .* {WEIGHTS}"):
        codec_from(tmp_path)


def test_a_folder_without_weights_or_with_a_pickle_is_refused(official: Path) -> None:
    (official / WEIGHTS).rename(official / "diffusion_pytorch_model.bin")
    with pytest.raises(ArtefactError, match="no autoencoder that can be loaded"):
        codec_from(official)


def test_foreign_weights_are_refused_and_every_tensor_named(official: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(official / WEIGHTS)
    tensors["stranger"] = tensors.pop("quant_conv.bias")
    save_file(tensors, official / WEIGHTS)
    with pytest.raises(ArtefactError) as refusal:
        codec_from(official)
    assert "missing tensor quant_conv.bias" in str(refusal.value.faults)
    assert "unknown tensor stranger" in str(refusal.value.faults)


def test_a_codec_of_other_channels_is_refused(official: Path) -> None:
    AutoencoderKL.from_config({**OFFICIAL, "in_channels": 1, "out_channels": 1}).save_pretrained(official)
    assert json.loads((official / "config.json").read_text())["in_channels"] == 1
    with pytest.raises(ArtefactError, match="RGB"):
        codec_from(official)
