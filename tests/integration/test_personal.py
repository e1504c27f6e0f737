"""The personal adapter: it starts as the shared teacher, stays at the site, and labels its own images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import client.workshop
from client.deadline import Deadline
from client.patients import Patient
from client.personal import PERSONAL_FILE, folded_whole, train_personal
from client.site import Site
from client.style import summarise_style
from client.transfer.labelling import teacher_logits
from client.transfer.sets import TransferSet, join
from client.workshop import Workshop
from common.adapter import Adapter
from common.config import save_site
from common.errors import ArtefactError, DeadlinePassed
from common.plan import RunPlan
from common.recipe import AggregationConfig, Recipe, SiteFile
from common.teacher import ResidentTeacher, initial_adapter, resident_teacher
from server.planning import build_plan
from simulations.phantoms import write_site
from tests.contract.adapter import moved

FOREVER = Deadline(1e9)


@pytest.fixture
def plan(smoke_recipe: Recipe) -> RunPlan:
    recipe = replace(
        smoke_recipe,
        aggregation=AggregationConfig("dual", personal_steps=3),
        generator=replace(smoke_recipe.generator, keep_dice=0.0),
        baselines=["no_synthetic"],
    )
    return build_plan(recipe, "personal")


@pytest.fixture
def site(tmp_path: Path, smoke_recipe: Recipe) -> Site:
    phantom = smoke_recipe.sites[0].phantom
    assert phantom is not None
    write_site(phantom, tmp_path / "east" / "data", 0, "east")
    save_site(SiteFile("east", policy=smoke_recipe.policy), tmp_path / "east" / "site.yaml")
    return Site.open(tmp_path / "east")


@pytest.fixture
def teacher(plan: RunPlan) -> ResidentTeacher:
    return resident_teacher(plan.teacher, plan.data)


@pytest.fixture
def shared(plan: RunPlan) -> Adapter:
    """One that a federation left: trained factors, folded ones on two layers, another decoder."""
    start = moved(initial_adapter(plan.teacher, plan.data, 0), 1, scale=0.02)
    generator = torch.Generator().manual_seed(2)
    tensors = dict(start.tensors)
    for layer in start.layers()[:2]:
        a, b = tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"]
        tensors[f"{layer}.folded_A"] = 0.05 * torch.randn(3, a.shape[1], generator=generator)
        tensors[f"{layer}.folded_B"] = 0.05 * torch.randn(b.shape[0], 3, generator=generator)
    return replace(start, tensors=tensors)


def labelled(site: Site, plan: RunPlan) -> list[Patient]:
    return [patient for patient in site.patients(plan.data, plan.seed) if patient.labelled]


def test_it_starts_as_the_shared_teacher(plan: RunPlan, teacher: ResidentTeacher, shared: Adapter) -> None:
    """The same change of every layer, and the same logits up to rounding; A starts at the first rows."""
    fresh = initial_adapter(plan.teacher, plan.data, plan.seed)
    start = folded_whole(shared, fresh)
    for layer in shared.layers():
        torch.testing.assert_close(start.change(layer), shared.change(layer))
        assert torch.equal(start.tensors[f"{layer}.lora_A"], fresh.tensors[f"{layer}.lora_A"])
        assert not start.tensors[f"{layer}.lora_B"].any()
    image = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(3))
    seen = []
    for adapter in (shared, start, fresh):
        with teacher.visit(adapter) as network, torch.inference_mode():
            seen.append(network(image).logits)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    assert float((seen[2] - seen[0]).abs().max()) > 0.1, "the shared adapter is not nothing"


def test_a_layer_that_the_site_does_not_train_stays_folded(plan: RunPlan, shared: Adapter) -> None:
    """Of a site with another preset the shared change lies wholly in folded factors."""
    layer = shared.layers()[0]
    theirs = {n: t for n, t in shared.tensors.items() if not n.startswith(f"{layer}.lora_")}
    fresh = initial_adapter(plan.teacher, plan.data, plan.seed)
    fewer = {n: t for n, t in fresh.tensors.items() if not n.startswith(f"{layer}.lora_")}
    start = folded_whole(replace(shared, tensors=theirs), replace(fresh, tensors=fewer))
    assert f"{layer}.lora_A" not in start.tensors
    for half in "AB":
        name = f"{layer}.folded_{half}"
        assert torch.equal(start.tensors[name], shared.tensors[name])


def test_it_repeats_and_trains_factors_and_decoder_and_leaves_the_shared_part(
    site: Site, plan: RunPlan, shared: Adapter
) -> None:
    patients = labelled(site, plan)
    digest = shared.digest
    one, two = (train_personal(site, plan, shared, patients, FOREVER) for _ in range(2))
    assert one.digest == two.digest
    assert shared.digest == digest
    start = folded_whole(shared, initial_adapter(plan.teacher, plan.data, plan.seed))
    for name, tensor in start.tensors.items():
        assert torch.equal(one.tensors[name], tensor) == (".folded_" in name), name


def test_its_steps_are_the_recipes_or_those_of_all_rounds(
    site: Site, plan: RunPlan, shared: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def adapt(*arguments: object) -> object:
        own = arguments[3]
        assert isinstance(own, RunPlan)
        asked.append((own.teacher.steps, own.rounds))
        return real(*arguments)  # type: ignore[arg-type]

    real = client.personal.adapt
    monkeypatch.setattr(client.personal, "adapt", adapt)
    for steps in (3, None):
        chosen = replace(plan, aggregation=replace(plan.aggregation, personal_steps=steps))
        train_personal(site, chosen, shared, labelled(site, plan), FOREVER)
    assert asked == [(3, 1), (plan.rounds * plan.teacher.steps, 1)]


def test_an_adapter_of_another_preset_and_a_passed_deadline_are_refused(
    site: Site, plan: RunPlan, shared: Adapter
) -> None:
    with pytest.raises(ArtefactError, match="another one"):
        train_personal(site, plan, replace(shared, preset="lite"), labelled(site, plan), FOREVER)
    with pytest.raises(DeadlinePassed):
        train_personal(site, plan, shared, labelled(site, plan), Deadline(-1.0))


def test_it_labels_the_sites_own_images_and_the_shared_teacher_the_synthetic_ones(
    site: Site,
    plan: RunPlan,
    teacher: ResidentTeacher,
    shared: Adapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[TransferSet] = []
    monkeypatch.setattr(client.workshop, "distil", lambda *arguments: seen.append(arguments[2]))
    patients = site.patients(plan.data, plan.seed)
    style = summarise_style(labelled(site, plan), plan.data.image_size, 2, 1, 0)
    Workshop(site, plan, shared, {"east": style}, None, patients, FOREVER).run()
    student, no_synthetic = seen
    personal = Adapter.load(site.folder / PERSONAL_FILE)
    for transfer, kinds in ((student, {False, True}), (no_synthetic, {False})):
        assert transfer.logits is not None
        assert set(transfer.synthetic.tolist()) == kinds
        for synthetic in kinds:
            rows = transfer.synthetic == synthetic
            adapter, other = (shared, personal) if synthetic else (personal, shared)
            for given, alike in ((adapter, True), (other, False)):
                with teacher.visit(given) as network:
                    logits = teacher_logits(network, transfer.images[rows], plan.data.exclusive).half()
                assert torch.allclose(logits, transfer.logits[rows], atol=1e-2) == alike


def test_parts_of_a_transfer_set_are_joined_in_their_order() -> None:
    def part(value: float, count: int) -> TransferSet:
        image = torch.full((count, 3, 4, 4), value)
        return TransferSet(image, image[:, :1], torch.ones(count) > 2, image[:, :1], image, image)

    whole = join([part(1.0, 2), None, part(2.0, 1)])
    assert whole is not None
    assert whole.images[:, 0, 0, 0].tolist() == [1.0, 1.0, 2.0]
    assert [len(value) for value in vars(whole).values() if value is not None] == [3] * 6
    assert join([None]) is None
