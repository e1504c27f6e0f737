"""The painters: what each does to an image, what it must not look at, and that all are called alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from client.painters import PAINTERS, Material, painter_of
from client.painters.amplitude import with_amplitudes
from client.painters.augment import deformed, disturbed
from client.painters.base import Crop
from client.painters.histogram import colour_map, mapped
from client.painters.procedural import painted
from client.painters.random_colour import two_coloured
from client.painters.recolour import recoloured
from client.patients import Patient
from client.style import low_amplitudes, style_vector, summarise_style
from client.texture import bands, grain, impose_texture, texture_numbers
from client.variants import VARIANTS
from common import names
from common.painter_rules import NETWORK_SCOPES, SPECTRAL_BASELINES, STYLED_BASELINES
from common.plan import RunPlan
from common.recipe import GeneratorScope, StyleDetail
from common.style import SPECTRUM, STYLE_FIELDS, TEXTURE, StyleGroup, StyleSummary, style_bounds, style_fields

NAMES = sorted(PAINTERS)
FG, BG = [0.25, 0.2, 0.5], [0.9, 0.75, 0.85]  # dark on bright: the polarity that the test's patients lack


def style_of(detail: StyleDetail = StyleDetail.colour) -> StyleSummary:
    """One stained look: violet bodies on pink."""
    mean = [*FG, 0.05, 0.04, 0.05, *BG, 0.03, 0.02, 0.03, -2.0, 1.2]
    if detail is not StyleDetail.colour:
        mean += [0.04, 0.03, 0.02, 0.01, 0.02, 0.5, 0.02, 0.02, 0.02, 0.02, 0.03, 0.0]
    if detail is StyleDetail.spectrum:
        mean += [0.01] * len(style_fields(detail)[SPECTRUM])
    return StyleSummary([StyleGroup(1.0, mean, [0.01] * len(mean))])


@pytest.fixture
def material(smoke_plan: RunPlan, patients: list[Patient]) -> Material:
    settings = replace(smoke_plan.generator, images=9, style_detail=StyleDetail.spectrum)
    plan = replace(smoke_plan, generator=settings)
    return Material(plan, [style_of(StyleDetail.spectrum)], patients, 5)


def whole(image: np.ndarray, mask: np.ndarray | None = None) -> Crop:
    return Crop(image, np.zeros_like(image[:1]) if mask is None else mask, np.ones(image.shape[1:], bool))


def measured(image: torch.Tensor, mask: torch.Tensor, detail: StyleDetail = StyleDetail.colour) -> np.ndarray:
    found = style_vector(image, mask.amax(0), torch.ones(image.shape[1:], dtype=torch.bool), detail)
    assert found is not None
    return found


# -- all of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_painter_makes_as_many_images_as_the_plan_says_and_the_same_again(
    name: str, material: Material
) -> None:
    first, again = (PAINTERS[name].paint(replace(material)) for _ in range(2))
    other = PAINTERS[name].paint(replace(material, seed=6))
    assert first.images.shape == (9, 3, 64, 64)
    assert first.masks.shape == (9, 1, 64, 64)
    assert first.images.dtype == first.masks.dtype == torch.float32
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert 0 <= first.images.min() < first.images.max() <= 1
    assert set(first.masks.unique().tolist()) == {0.0, 1.0}
    assert first.own_pixels == PAINTERS[name].own_pixels


@pytest.mark.parametrize("name", [name for name in NAMES if not PAINTERS[name].shares])
def test_what_shares_nothing_needs_no_style(name: str, material: Material) -> None:
    alone = PAINTERS[name].paint(replace(material, summaries=[]))
    assert torch.equal(alone.images, PAINTERS[name].paint(replace(material)).images)


def test_what_is_made_of_no_patient_looks_at_none(material: Material) -> None:
    without = [name for name in NAMES if not PAINTERS[name].own_pixels]
    assert without == ["paint"]
    nobody = PAINTERS["paint"].paint(replace(material, labelled=[]))
    assert torch.equal(nobody.images, PAINTERS["paint"].paint(replace(material)).images)


@pytest.mark.parametrize("name", ["recolour", "histogram", "amplitude", "random_colour"])
def test_the_masks_of_own_crops_are_the_patients(name: str, material: Material) -> None:
    made = PAINTERS[name].paint(replace(material))
    drawn = torch.stack(
        [sample.mask for p in material.labelled for sample in p.samples if sample.mask is not None]
    )
    for mask in made.masks:
        assert (drawn.float() == mask).flatten(1).all(1).any()
    # Six patients in nine images: each comes once before any comes again.
    assert len({mask.numpy().tobytes() for mask in made.masks}) == 9


def test_registry_recipe_and_variants_name_the_same_painters() -> None:
    assert set(PAINTERS) == set(names.BASELINES) & {*STYLED_BASELINES, "augment", "random_colour"}
    assert {name for name in PAINTERS if PAINTERS[name].shares} == set(STYLED_BASELINES)
    assert {name for name in PAINTERS if PAINTERS[name].shares == "spectrum"} == set(SPECTRAL_BASELINES)
    for name in PAINTERS:
        assert VARIANTS[name] == replace(VARIANTS["student"], painter=name)
    for scope in GeneratorScope:
        plain = painter_of(scope)
        assert (plain is None) == (scope in (*NETWORK_SCOPES, GeneratorScope.none))
    assert painter_of(GeneratorScope.style, "paint") == "paint"


@pytest.mark.parametrize("name", [name for name in NAMES if PAINTERS[name].own_pixels])
def test_outside_the_field_of_view_stays_black_and_counts_for_nothing(name: str, material: Material) -> None:
    def seen(surround: float) -> torch.Tensor:
        cut = []
        for patient in material.labelled:
            valid = torch.ones(64, 64, dtype=torch.bool)
            valid[:, :20] = False
            samples = tuple(
                replace(one, image=torch.where(valid, one.image, surround), valid=valid)
                for one in patient.samples
            )
            cut.append(replace(patient, samples=samples))
        return PAINTERS[name].paint(replace(material, labelled=cut)).images

    black = seen(0.0)
    assert black[..., :19].max() == 0
    if name in ("recolour", "histogram", "random_colour"):  # the others look at the whole crop
        inside = np.s_[..., 40:]  # but for the blur at the border
        assert torch.allclose(black[inside], seen(1.0)[inside], atol=0.02)


# -- colours -----------------------------------------------------------------------------------------


def test_recolouring_moves_each_region_to_the_style(material: Material) -> None:
    wanted = np.array(style_of().groups[0].mean)
    plain = replace(material, summaries=[style_of()])
    made = PAINTERS["recolour"].paint(plain)
    for image, mask in zip(made.images, made.masks, strict=True):
        found = measured(image, mask)
        assert found[0:3] == pytest.approx(wanted[0:3], abs=0.06)
        assert found[6:9] == pytest.approx(wanted[6:9], abs=0.06)
    grain_of_background = np.mean(
        [measured(i, m)[9:12] for i, m in zip(made.images, made.masks, strict=True)]
    )
    assert grain_of_background == pytest.approx(wanted[9:12].mean(), rel=0.5)


def test_a_dim_body_stays_nearer_to_the_background_when_the_polarity_turns() -> None:
    image, mask = np.full((3, 64, 64), 0.1, np.float32), np.zeros((1, 64, 64), np.float32)
    image[:, 8:28, 8:28], image[:, 36:56, 36:56] = 0.9, 0.4
    mask[:, 8:28, 8:28] = mask[:, 36:56, 36:56] = 1
    turned = recoloured(whole(image, mask), np.array(style_of().groups[0].mean), np.random.default_rng(0))
    bright, dim, ground = (turned[:, row, row].mean() for row in (18, 46, 2))
    assert bright < dim < ground


def test_grey_styles_make_grey_images_and_colours_coloured_ones(material: Material) -> None:
    grey = StyleSummary(
        [StyleGroup(1.0, [0.7] * 3 + [0.05] * 3 + [0.2] * 3 + [0.02] * 3 + [-2.0, 1.2], [0.01] * 14)]
    )
    for name in ("recolour", "paint", "histogram"):
        dull = PAINTERS[name].paint(replace(material, summaries=[grey])).images
        assert torch.allclose(dull[:, 0], dull[:, 2])
        vivid = PAINTERS[name].paint(replace(material, summaries=[style_of()])).images
        assert (vivid[:, 2] - vivid[:, 1]).mean() > 0.05


def test_paint_has_the_colours_on_its_masks() -> None:
    mask = np.zeros((1, 64, 64), np.float32)
    mask[:, 16:48, 16:48] = 1
    style = np.array(style_of().groups[0].mean)
    found = measured(torch.from_numpy(painted(mask, style, np.random.default_rng(1))), torch.from_numpy(mask))
    assert found[0:3] == pytest.approx(style[0:3], abs=0.06)
    assert found[6:9] == pytest.approx(style[6:9], abs=0.06)
    assert found[3:6].mean() > found[9:12].mean() > 0.01


def test_a_histogram_is_the_styles_mixture_in_either_polarity() -> None:
    style = np.array(style_of().groups[0].mean)
    image = np.random.default_rng(0).random((3, 64, 64)).astype(np.float32)
    colours = colour_map(style, np.random.default_rng(0))
    made = [mapped(whole(image), colours, np.random.default_rng(seed)) for seed in range(12)]
    corr = [np.corrcoef(one.mean(0).ravel(), image.mean(0).ravel())[0, 1] for one in made]
    assert min(corr) < -0.5 < 0.5 < max(corr)
    for one in made:
        dark = (one.mean(0) < 0.6).mean()  # the share of the bodies' colour
        assert dark == pytest.approx(np.exp(-2.0), abs=0.05)


def test_random_colours_differ_in_both_polarities_and_keep_the_edges() -> None:
    image = np.zeros((3, 32, 32), np.float32)
    image[:, 8:24, 8:24] = 0.3  # dull, and stretched
    inside = []
    for seed in range(40):
        made = two_coloured(whole(image), np.random.default_rng(seed))
        inside.append(float((made[:, 16, 16] - made[:, 0, 0]).mean()))
        assert abs(inside[-1]) >= 0.25
    assert 8 <= sum(value > 0 for value in inside) <= 32


def test_augmentation_bends_image_and_mask_alike_and_changes_the_light() -> None:
    image, mask = np.full((3, 64, 64), 0.2, np.float32), np.zeros((1, 64, 64), np.float32)
    image[:, 20:44, 20:44], mask[:, 20:44, 20:44] = 0.8, 1
    moved = 0
    for seed in range(10):
        bent, planes = deformed(image, mask, np.random.default_rng(seed))
        assert set(np.unique(planes)) == {0.0, 1.0}
        assert ((bent[0] > 0.5) == (planes[0] > 0)).mean() > 0.97
        moved += int((planes != mask).sum() > 20)
    assert moved >= 6
    lights = [disturbed(image, np.random.default_rng(seed)).mean() for seed in range(10)]
    assert np.std(lights) > 0.05
    assert np.ptp(disturbed(image, np.random.default_rng(3)), axis=0).max() < 1e-5  # grey stays grey


# -- frequencies -------------------------------------------------------------------------------------


def test_amplitudes_move_to_the_style_and_phases_stay() -> None:
    rng = np.random.default_rng(0)
    image = np.clip(0.5 + 0.05 * rng.standard_normal((3, 64, 64)), 0, 1).astype(np.float32)
    other = np.clip(0.5 + 0.1 * np.sin(np.arange(64) / 5)[None, :, None] * np.ones((3, 64, 64)), 0, 1)
    style = np.concatenate([np.zeros(SPECTRUM.start), low_amplitudes(other.astype(np.float32)).ravel()])
    none, whole = (with_amplitudes(image, style, share) for share in (0.0, 1.0))
    assert none == pytest.approx(image, abs=1e-5)
    assert low_amplitudes(whole) == pytest.approx(low_amplitudes(other), abs=2e-3)
    high = np.s_[:, 10:20, 10:20]  # left alone
    assert np.fft.rfft2(whole)[high] == pytest.approx(np.fft.rfft2(image)[high], abs=1e-2)


def test_bands_add_up_inside_a_region_and_see_no_border() -> None:
    rng = np.random.default_rng(2)
    region = np.zeros((64, 64), bool)
    region[10:50, 12:40] = True
    channel = np.where(region, 0.8, 0.1).astype(np.float32)
    assert np.abs(bands(channel, region)[:, region]).max() < 1e-4
    channel += 0.05 * rng.standard_normal((64, 64)).astype(np.float32)
    parts = bands(channel, region)
    assert parts.sum(0)[region] == pytest.approx(channel[region] - channel[region].mean(), abs=1e-5)


def test_grain_has_the_deviations_and_the_skewness_that_are_asked_for() -> None:
    wanted = np.array([0.05, 0.02, 0.04, 0.01, 0.03])
    field = np.mean([_measured_grain(seed, wanted, 1.0) for seed in range(4)], axis=0)
    assert field[[0, 2, 4]] == pytest.approx(
        wanted[[0, 2, 4]], rel=0.2
    )  # the others have more: bands overlap
    assert field[-1] > 0.3
    assert _measured_grain(0, wanted, -1.0)[-1] < -0.3


def _measured_grain(seed: int, wanted: np.ndarray, skewness: float) -> np.ndarray:
    field = grain(np.random.default_rng(seed), 96, wanted, skewness)
    return texture_numbers(0.5 + np.stack([field] * 3), np.ones((96, 96), bool))


def test_imposed_texture_is_nearer_to_what_is_wanted_and_leaves_the_rest_alone() -> None:
    rng = np.random.default_rng(4)
    image = np.clip(0.5 + 0.08 * rng.standard_normal((1, 96, 96)).repeat(3, 0), 0, 1).astype(np.float32)
    region = np.zeros((96, 96), bool)
    region[:, :48] = True
    wanted = np.array([0.01, 0.01, 0.03, 0.03, 0.02, 0.0])
    made = impose_texture(image, region, wanted, rng)
    before, after = (np.abs(texture_numbers(one, region)[:-1] - wanted[:-1]).sum() for one in (image, made))
    assert after < 0.45 * before
    assert np.array_equal(made[:, ~region], image[:, ~region])
    assert made[:, region].mean() == pytest.approx(image[:, region].mean(), abs=0.01)


@pytest.mark.parametrize("name", ["recolour", "paint"])
def test_painters_use_the_bands_where_a_style_has_them(name: str, material: Material) -> None:
    """Coarse background texture in the summary, which colours and one deviation cannot say."""
    smooth, rough = style_of(StyleDetail.texture), style_of(StyleDetail.texture)
    rough.groups[0].mean[TEXTURE.start + 6 : TEXTURE.start + 10] = [0.0, 0.0, 0.02, 0.09]
    smooth.groups[0].mean[TEXTURE.start + 6 : TEXTURE.start + 10] = [0.05, 0.0, 0.0, 0.0]
    found = []
    for summary in (smooth, rough):
        made = PAINTERS[name].paint(replace(material, summaries=[summary]))
        pairs = zip(made.images, made.masks, strict=True)
        found.append(np.mean([measured(i, m, StyleDetail.texture)[TEXTURE] for i, m in pairs], axis=0))
    fine, coarse = found[0][6:10], found[1][6:10]
    assert fine[0] > 2 * coarse[0]
    assert coarse[3] > 2 * fine[3]


# -- summaries ---------------------------------------------------------------------------------------


def test_a_finer_summary_adds_to_a_coarser_one(patients: list[Patient]) -> None:
    made = {detail: summarise_style(patients, 64, 3, 3, 0, detail) for detail in StyleDetail}
    sizes = [len(made[detail].groups[0].mean) for detail in StyleDetail]
    assert sizes == [14, 26, 161] == [len(style_bounds(detail)) for detail in StyleDetail]
    for detail in StyleDetail:
        for coarse, fine in zip(made[StyleDetail.colour].groups, made[detail].groups, strict=True):
            assert fine.mean[: len(STYLE_FIELDS)] == pytest.approx(coarse.mean, abs=1e-3)
            low, high = np.array(style_bounds(detail)).T
            assert ((np.array(fine.mean) >= low) & (np.array(fine.mean) <= high)).all()
