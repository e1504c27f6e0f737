"""Pre-training in miniature: it repeats, it ships a card, and it names how to make the weights again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common import checkpoints, names
from simulations import latent_pretraining, pretrain
from simulations.pretrain import (
    DEFAULT_STEPS,
    HEAD_WEIGHT,
    MAKERS,
    SHIPPED,
    USUAL,
    curriculum,
    segmentation_loss,
)
from simulations.scene_training import Bank, dim, fit


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(pretrain, "SCENES", 12)
    monkeypatch.setattr(pretrain, "TISSUES", 9)
    monkeypatch.setattr(pretrain, "VALIDATION", 6)
    monkeypatch.setattr(latent_pretraining, "CODEC_SCENES", 12)
    monkeypatch.setattr(latent_pretraining, "SCENES", 6)
    monkeypatch.setattr(latent_pretraining, "HELD_OUT", 2)
    monkeypatch.setattr(latent_pretraining, "CODEC_STEPS", 2)
    monkeypatch.setattr(latent_pretraining, "SIZE", 64)
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    checkpoints.card.cache_clear()
    return tmp_path


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_seed_makes_the_same_weights(kind: str, small: Path) -> None:
    digests, name = [], SHIPPED.get(kind, kind)
    for _ in range(2):
        torch.manual_seed(np.random.default_rng().integers(1 << 30))  # whatever ran before
        MAKERS[kind](3, 2)
        checkpoints.card.cache_clear()
        digests.append(checkpoints.base_sha256(name))
    assert digests[0] == digests[1]
    card = checkpoints.card(name)
    assert card["kind"] == {"teacher": "teacher"}.get(kind, "generator" if "generator" in kind else "student")
    assert card["reproduce"] == f"python -m simulations.pretrain {kind} --seed 3 --steps 2"
    assert "no real image" in card["trained_on"]


def test_there_is_a_maker_for_every_model_that_a_recipe_may_name() -> None:
    made = {SHIPPED.get(name, name) for name in MAKERS}
    warmed = {"ward-sam-tiny-lesions"}  # by `simulations.warm_start`
    assert made | warmed == {*names.TEACHERS, *names.GENERATORS, *names.STUDENTS}
    assert MAKERS.keys() == DEFAULT_STEPS.keys()
    assert warmed | {SHIPPED.get(name, name) for name in USUAL} == {
        *names.TEACHERS,
        *names.GENERATORS,
        *names.SHIPPED_STUDENTS,
    }


@pytest.mark.parametrize("kind", names.SHIPPED_STUDENTS)
def test_a_shipped_student_says_how_it_is_made_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    checkpoints.card.cache_clear()
    card = checkpoints.card(kind)
    assert (
        card["reproduce"] == f"python -m simulations.pretrain {kind} --seed 0 --steps {DEFAULT_STEPS[kind]}"
    )
    assert card["steps"] == DEFAULT_STEPS[kind]
    assert set(card["heads"]) == set(names.PRETRAINED_HEADS)


def test_a_batch_has_the_kinds_that_were_asked_for() -> None:
    bank = Bank.make(0, 9)
    image, target, kinds = bank.draw(np.random.default_rng(0), 5, (0, 1, 0))
    assert kinds.tolist() == [1] * 5
    assert image.shape == (5, 3, 96, 96)
    assert target[:, 1].flatten(1).any(1).all()


def test_vessels_come_first_and_never_alone_later() -> None:
    assert curriculum(0, 100)[0] == 0.9
    assert curriculum(50, 100)[0] < 0.5


def test_the_loss_is_zero_for_the_truth_and_counts_thin_structures_most() -> None:
    target = torch.zeros(2, 5, 8, 8)
    target[:, :, :4] = 1
    assert segmentation_loss((target * 2 - 1) * 40, target) < 1e-4
    wrong = [(target * 2 - 1) * 40 for _ in range(2)]
    wrong[0][:, 0] *= -1  # the vessel head
    wrong[1][:, 4] *= -1
    assert segmentation_loss(wrong[0], target) > segmentation_loss(wrong[1], target)
    assert HEAD_WEIGHT.argmax() == 0


def test_the_loss_follows_the_device_of_its_logits() -> None:
    """The meta device stands for a GPU: a tensor left on the processor would be refused."""
    target = torch.zeros(2, 5, 8, 8, device="meta")
    assert segmentation_loss(torch.zeros_like(target), target).device.type == "meta"


def test_a_dimmed_batch_keeps_its_order_and_leaves_the_full_range() -> None:
    image = torch.rand(4, 3, 16, 16)
    seen = [dim(image, np.random.default_rng(seed)) for seed in range(12)]
    changed = [one for one in seen if not torch.equal(one, image)]
    assert 0 < len(changed) < len(seen)
    for one in changed:
        assert one.min() >= 0
        assert one.max() <= 1
        assert torch.equal(one.flatten(2).argmax(2), image.flatten(2).argmax(2))


def test_a_training_that_was_broken_off_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def trained(kept: Path | None, stop: int | None = None) -> tuple[torch.Tensor, list[float]]:
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 1)

        def loss_at(step: int) -> torch.Tensor:
            if step == stop:
                raise InterruptedError
            draw = torch.Generator().manual_seed(step)
            return (network(torch.randn(8, 4, generator=draw)) - 1).square().mean()

        losses = fit(network, 9, {"": 1e-2}, loss_at, every=2, kept=kept)
        return network.weight.detach().clone(), losses

    whole, losses = trained(None)
    with pytest.raises(InterruptedError):
        trained(tmp_path / "kept" / "linear.pt", stop=5)
    again, taken_up = trained(tmp_path / "kept" / "linear.pt")
    assert torch.equal(whole, again)
    assert losses == taken_up
    assert len(losses) == 4


def test_the_latent_generator_is_taken_up_to_the_same_weights(small: Path) -> None:
    digests = []
    for keep in (None, small / "kept", small / "kept"):  # the third finds scenes encoded
        MAKERS["latent-generator"](3, 2, keep=keep)
        checkpoints.card.cache_clear()
        digests.append(checkpoints.base_sha256("ward-diffusion-latent"))
    assert len(set(digests)) == 1
    assert (small / "kept" / "latent-generator-latents-3-6.pt").exists()


@pytest.mark.parametrize(
    "given", [["latent-generator", "--codec", "vae"], ["generator", "--codec", "vae", "--name", "mine"]]
)
def test_an_autoencoder_of_ones_own_wants_a_name_and_the_latent_generator_alone(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        pretrain.main(given)
    assert "--codec and --name go together" in capsys.readouterr().err
