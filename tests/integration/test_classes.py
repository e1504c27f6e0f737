"""Several classes from one label map, end to end at a site: excluding each other, or one within another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import client.site as site_module
from client.data import load_patients
from client.evaluation import foreground
from client.guard import Guard
from client.prediction import predict_folder
from client.site import Site
from client.students import load_student
from client.transfer.labelling import teacher_logits
from common.config import save_site
from common.guard_api import SiteMetrics
from common.plan import Round, RunPlan, Stage
from common.probability import probabilities
from common.recipe import ClassConfig, DataConfig, PolicyConfig, Recipe, SiteFile
from common.teacher import initial_adapter, resident_teacher
from server.planning import build_plan
from tests.integration.consortium import next_adapter

CORTEX, MEDULLA = 100, 200
APART = DataConfig(
    image_size=64,
    classes=[ClassConfig("cortex", CORTEX, "region"), ClassConfig("medulla", MEDULLA, "bright")],
    exclusive=True,
)
NESTED = replace(
    APART,
    classes=[
        ClassConfig("kidney", CORTEX, "region", also=[MEDULLA]),
        ClassConfig("medulla", MEDULLA, "bright"),
    ],
    exclusive=False,
)


def write_kidneys(folder: Path) -> None:
    """Six patients of two images: a grey disc with a bright core, and a label map of shell and core."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["image,mask,patient,split"]
    rows, columns = np.mgrid[:64, :64]
    for number in range(12):
        row, column, radius = *rng.integers(22, 42, 2), rng.uniform(14, 19)
        distance = np.hypot(rows - row, columns - column)
        labels = np.where(distance < radius / 2, MEDULLA, np.where(distance < radius, CORTEX, 0))
        levels = {0: 0.15, CORTEX: 0.5, MEDULLA: 0.9}
        pixels = np.vectorize(levels.get)(labels) + rng.normal(0, 0.03, labels.shape)
        Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(labels.astype(np.uint8)).save(folder / f"{number}_mask.png")
        split = "train" if number < 8 else "test"
        lines.append(f"{number}.png,{number}_mask.png,p{number // 2},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


def planned(recipe: Recipe, data: DataConfig) -> RunPlan:
    return build_plan(
        replace(
            recipe,
            data=data,
            teacher=replace(recipe.teacher, steps=12, batch_size=4),
            student=replace(recipe.student, steps=40, batch_size=4),
            baselines=[],
        ),
        "classes",
    )


def walked(home: Path, plan: RunPlan) -> SiteMetrics:
    """Every stage of the site, with the real guard."""
    write_kidneys(home / "data")
    save_site(
        SiteFile("east", policy=PolicyConfig(min_group_patients=2, min_cell_patients=2)), home / "site.yaml"
    )
    site_module._patients.cache_clear()
    guard = Guard(Site.open(home))

    def order(stage: Stage) -> Round:
        return Round(plan.digest, stage, 0, 300.0, "nonce")

    assert guard.propose(plan, order(Stage.propose)).agrees
    first = initial_adapter(plan.teacher, plan.data, 0)
    adapter = next_adapter(first, guard.adapt(order(Stage.adapt), first))
    adapter.save(home / "adapter.safetensors")
    styles = {"east": guard.style(order(Stage.style))}
    guard.train_student(order(Stage.student), adapter, styles, None)
    return guard.evaluate(order(Stage.evaluate), adapter)


@pytest.mark.parametrize("data", [APART, NESTED], ids=["exclusive", "nested"])
def test_several_classes_are_learned_from_one_label_map(
    tmp_path: Path, smoke_recipe: Recipe, data: DataConfig
) -> None:
    plan = planned(smoke_recipe, data)
    metrics = walked(tmp_path, plan).metrics
    dice = {(cell.model, cell.class_name): cell.value for cell in metrics if cell.metric == "dice"}
    assert set(dice) == {(model, item.name) for model in ("teacher", "student") for item in data.classes}
    assert all(value is not None and value > 0.6 for value in dice.values()), dice

    weights = tmp_path / "student.safetensors"
    student = load_student(weights)
    assert student.card.data_config() == replace(data, min_patients=student.card.data_config().min_patients)
    patients = load_patients(tmp_path / "data" / "manifest.csv", data, 0)
    whole, core = zip(*(foreground(student.module, p.samples[0], data, 0.25) for p in patients), strict=True)
    overlap = sum(float((a & b).sum()) for a, b in zip(whole, core, strict=True))
    cores = sum(float(plane.sum()) for plane in core)
    assert overlap == 0 if data.exclusive else overlap > 0.8 * cores

    (tmp_path / "in").mkdir()
    (tmp_path / "data" / "11.png").rename(tmp_path / "in" / "11.png")
    (mask,) = predict_folder(weights, tmp_path / "in", tmp_path / "out").masks
    with Image.open(mask) as found, Image.open(tmp_path / "data" / "11_mask.png") as truth:
        labels, wanted = np.array(found), np.array(truth)
    assert set(np.unique(labels)) == {0, CORTEX, MEDULLA}  # a core is called a core, not the whole around it
    assert (labels == wanted).mean() > 0.85


def test_the_teachers_exclusive_labels_sum_to_one_with_the_background(smoke_recipe: Recipe) -> None:
    plan = planned(smoke_recipe, APART)
    teacher = resident_teacher(plan.teacher, plan.data)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with teacher.visit(initial_adapter(plan.teacher, plan.data, 0)) as network:
        found = probabilities(teacher_logits(network, images, exclusive=True), True)
        seen = [probabilities(network(images.flip(flip)).logits, True).flip(flip) for flip in ((), (3,))]
    assert torch.allclose(found, torch.stack(seen).mean(0), atol=2e-3)


def test_synthetic_masks_of_a_part_are_masks_of_the_whole(tmp_path: Path, smoke_recipe: Recipe) -> None:
    plan = planned(smoke_recipe, NESTED)
    quick = {"teacher": replace(plan.teacher, steps=1), "student": replace(plan.student, steps=1)}
    plan = replace(plan, generator=replace(plan.generator, images=6, keep_dice=0.0), **quick)
    walked(tmp_path, plan)
    values = [
        set(np.unique(np.array(Image.open(path)))) for path in sorted(tmp_path.glob("synthetic/*_mask.png"))
    ]
    assert len(values) == 6
    assert values == [{0, CORTEX}, {0, MEDULLA}] * 3
