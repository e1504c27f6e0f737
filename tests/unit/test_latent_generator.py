"""The generator for larger images: sizes, calls, what steers it, what a site trains of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import client.generation as generation
from client.curation.memorising import Conditions
from client.deadline import Deadline
from client.generation import fine_tune, synthesise
from client.painters import SyntheticSet
from client.patients import Patient
from common import checkpoints
from common.config import load_recipe
from common.errors import ConfigError
from common.generator import ResidentGenerator, initial_adapter, resident_generator, shipped_generator
from common.plan import RunPlan
from common.recipe import GeneratorConfig
from common.style import STYLE_FIELDS, StyleGroup, StyleSummary

LATENT = "ward-diffusion-latent"
RED, BLUE = (0.8, 0.3, 0.25), (0.15, 0.25, 0.6)


def look(foreground: tuple[float, ...], background: tuple[float, ...]) -> StyleSummary:
    """One look: these colours, a little grain, objects of middling size."""
    mean = [*foreground, *[0.04] * 3, *background, *[0.04] * 3, -1.6, 1.3]
    return StyleSummary([StyleGroup(1.0, mean, [0.0] * len(STYLE_FIELDS))])


@pytest.fixture
def generator() -> ResidentGenerator:
    return resident_generator(LATENT, 8)


def planned(plan: RunPlan, side: int, **settings: object) -> RunPlan:
    asked = {"name": LATENT, "images": 2, "sampler_steps": 15, **settings}
    return replace(
        plan,
        data=replace(plan.data, image_size=side),
        generator=replace(plan.generator, **asked),
    )


def painted(plan: RunPlan, style: StyleSummary, seed: int = 4) -> SyntheticSet:
    own = resident_generator(LATENT, 8)
    return synthesise(own, initial_adapter(plan.generator, 0), [style], plan, seed)


@pytest.mark.parametrize("side", [192, 256])
def test_images_have_the_asked_size_and_range_within_twenty_calls_each(
    smoke_plan: RunPlan, side: int
) -> None:
    plan, before = planned(smoke_plan, side), generation.denoiser_calls
    made = painted(plan, look(RED, BLUE))
    assert made.images.shape == (2, 3, side, side)
    assert made.images.min() >= 0
    assert made.images.max() <= 1
    assert made.masks.shape == (2, 1, side, side)
    assert (generation.denoiser_calls - before) / 2 == 15 <= 20


def test_the_same_seed_paints_the_same_and_another_does_not(smoke_plan: RunPlan) -> None:
    plan = planned(smoke_plan, 128, sampler_steps=4)
    first, again, other = (painted(plan, look(RED, BLUE), seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def means(made: SyntheticSet) -> tuple[Tensor, Tensor]:
    """Mean colour of foreground and background, well inside both."""
    mask = made.masks.amax(1, keepdim=True)
    inside = -torch.nn.functional.max_pool2d(-mask, 3, 1, 1)
    outside = 1 - torch.nn.functional.max_pool2d(mask, 7, 1, 3)
    found = [(made.images * part).sum((0, 2, 3)) / part.sum() for part in (inside, outside)]
    return found[0], found[1]


@pytest.mark.parametrize("colours", [(RED, BLUE), (BLUE, RED)], ids=["red on blue", "blue on red"])
def test_the_mask_says_where_and_the_style_says_which_colour(
    smoke_plan: RunPlan, colours: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    """Nobody is asked but the pixels: each region has its own colour, and the regions swap with the style."""
    found = means(painted(planned(smoke_plan, 192), look(*colours)))
    for region, wanted in zip(found, colours, strict=True):
        assert (region - torch.tensor(wanted)).abs().max() < 0.12


def test_grey_stays_grey(smoke_plan: RunPlan) -> None:
    made = painted(planned(smoke_plan, 128, sampler_steps=4), look((0.7,) * 3, (0.2,) * 3)).images
    assert torch.equal(made, made[:, :1].expand_as(made))


def test_palette_and_image_pass_the_codec_once_however_many_calls_there_are(
    smoke_plan: RunPlan, generator: ResidentGenerator
) -> None:
    codec = generator.network.space.codec
    assert isinstance(codec, torch.nn.Module)
    passed: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: passed.append(name))
        for name, part in (("encoder", codec.encoder), ("decoder", codec.decoder))
    ]
    try:
        painted(planned(smoke_plan, 128, sampler_steps=6), look(RED, BLUE))
    finally:
        for handle in handles:
            handle.remove()
    assert passed == ["encoder", "decoder"]


def test_a_site_trains_factors_at_the_denoiser_and_none_at_the_codec(
    smoke_plan: RunPlan, patients: list[Patient], generator: ResidentGenerator
) -> None:
    plan = planned(smoke_plan, 64)
    begin = initial_adapter(plan.generator, 0)
    assert begin.tensors
    assert all(name.startswith("unet.") for name in begin.tensors)
    codec = {name: value.clone() for name, value in generator.network.space.state_dict().items()}
    first, again = (
        fine_tune(generator, begin, patients, plan, (0, 3), Deadline(1e9)).adapter for _ in range(2)
    )
    assert first.digest == again.digest != begin.digest
    after = generator.network.space.state_dict()
    assert codec.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in codec.items())


def test_the_attack_on_a_generator_reaches_this_one_too(patients: list[Patient]) -> None:
    seen = Conditions.of(patients[:2], patients[2:4], 64)
    network = shipped_generator(LATENT).eval()
    first = seen.log_losses(network, 3)
    assert torch.equal(first, seen.log_losses(network, 3))
    assert first.isfinite().all()
    assert len(first) == 4


@pytest.mark.parametrize("side", [64, 96, 544])
def test_a_size_that_it_does_not_paint_is_refused_with_those_that_it_does(side: int) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_recipe("smoke", [f"generator.name={LATENT}", f"data.image_size={side}"])
    said = str(refusal.value)
    assert f"generator.name: {LATENT} paints images of 128 to 512 pixels and not of {side}; take" in said
    assert "or a data.image_size that is a multiple of 32 from 128 to 512" in said


@pytest.mark.parametrize("side", [128, 192, 256, 512])
def test_the_sizes_that_it_paints_are_taken(side: int) -> None:
    assert (
        load_recipe("smoke", [f"generator.name={LATENT}", f"data.image_size={side}"]).data.image_size == side
    )


def test_a_scope_without_the_network_asks_nothing_of_the_size() -> None:
    load_recipe("smoke", [f"generator.name={LATENT}", "generator.scope=paint"])


# -- a generator in the latent space of a user's own autoencoder -------------------------------------


def test_a_generator_of_a_brought_autoencoder_is_made_named_and_paints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smoke_plan: RunPlan
) -> None:
    from diffusers import AutoencoderKL

    from simulations import latent_pretraining, pretrain
    from tests.unit.test_image_space import OFFICIAL

    monkeypatch.setattr(latent_pretraining, "SCENES", 6)
    monkeypatch.setattr(latent_pretraining, "HELD_OUT", 2)
    monkeypatch.setattr(latent_pretraining, "SIZE", 64)
    torch.manual_seed(0)
    codec = AutoencoderKL.from_config(OFFICIAL)
    codec.save_pretrained(tmp_path / "vae")
    monkeypatch.setenv(checkpoints.VARIABLE, str(tmp_path / "models"))
    checkpoints.card.cache_clear()
    pretrain.main(["latent-generator", "--codec", str(tmp_path / "vae"), "--name", "of-mine", "--steps", "2"])
    recipe = load_recipe("smoke", ["generator.name=of-mine", "data.image_size=96"])
    assert recipe.generator.name == "of-mine"
    own = ResidentGenerator("of-mine", 4)
    kept, brought = own.network.space.state_dict(), codec.state_dict()
    for name, value in brought.items():
        assert torch.allclose(kept[f"codec.{name}"], value, atol=1e-3), name
    plan = planned(smoke_plan, 96, name="of-mine", rank=4, sampler_steps=2)
    adapter = own.slots.initial(0)
    made = synthesise(own, adapter, [look(RED, BLUE)], plan, 1)
    assert made.images.shape == (2, 3, 96, 96)
    card = checkpoints.card("of-mine")
    assert "the autoencoder: its own" in card["licence"]
    assert len(card["codec_sha256"]) == 64
    checkpoints.card.cache_clear()


def test_a_generator_of_ones_own_may_not_take_a_shipped_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from simulations import pretrain

    with pytest.raises(SystemExit) as end:
        pretrain.main(["latent-generator", "--codec", str(tmp_path), "--name", LATENT])
    assert end.value.code == 12
    assert "cannot name a generator of yours" in capsys.readouterr().err


def test_the_default_is_still_haars_generator() -> None:
    assert GeneratorConfig().name == "ward-diffusion-tiny"
    assert np.isclose(shipped_generator("ward-diffusion-tiny").space.stride, 2)
