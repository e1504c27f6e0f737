"""What every student promises: the base class that each kind's test class inherits."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from client.losses import segmentation_loss
from client.students import STUDENTS, Student, build_student, load_student, save_student
from common.canonical import sha256_of_file
from common.recipe import ClassConfig, DataConfig

CLASSES = [ClassConfig("cell", 255, "blob"), ClassConfig("vessel", 100, "vessel")]
DATA = DataConfig(image_size=64, classes=CLASSES)
SIZES = [(64, 64), (96, 96), (160, 160), (64, 96), (160, 32)]


class StudentContract:
    """``kind`` is a name of the registry; ``params`` the band of its parameters, as the documents say."""

    kind: ClassVar[str]
    params: ClassVar[tuple[int, int]]

    def make(self, seed: int = 3) -> Student:
        return build_student(self.kind, DATA, False, seed)

    def test_it_is_as_large_as_it_says(self) -> None:
        low, high = self.params
        assert low <= sum(one.numel() for one in self.make().parameters()) <= high

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_any_image_of_whole_tiles_is_segmented(self, size: tuple[int, int]) -> None:
        """And the features lie on the grids that are documented."""
        student, image = self.make().eval(), torch.rand(2, 3, *size)
        with torch.no_grad():
            output = student.outputs(image)
            assert torch.equal(student(image), output.logits)
            assert torch.equal(student.encode(image), output.deep)
        assert output.logits.shape == (2, 2, *size)
        deep = [side // student.deep_stride for side in size]
        assert output.deep.shape == (2, student.deep_channels, *deep)
        assert output.late.shape == (2, student.late_channels, size[0] // 2, size[1] // 2)

    def test_images_of_a_batch_do_not_see_each_other(self) -> None:
        student, images = self.make().train(), torch.rand(3, 3, 64, 64)
        with torch.no_grad():
            together = student(images)
            alone = torch.cat([student(image[None]) for image in images])
        assert torch.allclose(together, alone, atol=1e-4)

    def test_the_place_of_an_object_is_told(self) -> None:
        """A change in one corner moves the logits there most: nothing was transposed or blurred away."""
        student = self.make().eval()
        image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        changed = image.clone()
        changed[..., 48:64, :16] = 1 - changed[..., 48:64, :16]
        with torch.no_grad():
            moved = (student(changed) - student(image)).abs().mean(1)[0]
        assert moved[48:64, :16].mean() > 2 * moved[:16, 80:].mean()

    def test_an_all_background_image_can_be_represented(self) -> None:
        """One empty and one full image: a head whose output is normalised an image cannot tell them apart."""
        student = self.make(0)  # two classes, both empty or both full
        rng = torch.Generator().manual_seed(0)
        noise = 0.05 * torch.rand(2, 3, 32, 32, generator=rng)
        images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]) + noise
        images[1, :, ::2] -= 0.5  # another texture: instance norm removes mere brightness
        masks = torch.stack([torch.zeros(2, 32, 32), torch.ones(2, 32, 32)])
        optimiser = torch.optim.Adam(student.parameters(), 5e-3)
        for _ in range(40):
            optimiser.zero_grad()
            segmentation_loss(student(images), masks, False).backward()
            optimiser.step()
        share = (student(images) > 0).float().mean((1, 2, 3))
        assert share[0] < 0.02
        assert share[1] > 0.98

    def test_nothing_is_carried_from_one_image_to_the_next(self) -> None:
        student, image = self.make().train(), torch.rand(1, 3, 64, 64)
        assert list(student.buffers()) == []
        with torch.no_grad():
            first = student(image)
            student(torch.rand(4, 3, 64, 64))
            assert torch.equal(student(image), first)

    def test_a_seed_makes_a_student_and_another_another(self) -> None:
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        first, again, other = (flat(self.make(seed)) for seed in (3, 3, 4))
        assert torch.equal(torch.rand(3), expected), "the global generator was used"
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("size", [(64, 64), (96, 96)], ids=str)
    def test_every_parameter_learns(self, size: tuple[int, int]) -> None:
        student = self.make()
        student(torch.rand(2, 3, *size)).square().mean().backward()
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    def test_the_head_is_a_convolution_with_a_bias(self) -> None:
        head = self.make().head
        assert (head.kernel_size, head.out_channels) == ((1, 1), 2)
        assert head.bias is not None

    def test_a_saved_student_is_the_same(self, tmp_path: Path) -> None:
        student, path = self.make().eval(), tmp_path / "student.safetensors"
        card = save_student(student, path, self.kind, DATA, {"run_id": "r", "model": "student"})
        assert card.sha256 == sha256_of_file(path)
        loaded = load_student(path)
        assert loaded.card == card
        assert type(loaded.module) is STUDENTS[self.kind]
        image = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(loaded.module(image), student(image))
        again = tmp_path / "again.safetensors"
        about = {"run_id": "r", "model": "student"}
        assert save_student(loaded.module, again, self.kind, DATA, about).sha256 == card.sha256


class ShippedContract(StudentContract):
    """A kind with weights to start from."""

    def test_the_shipped_weights_know_their_heads(self) -> None:
        """One head a class, that of the structure it is like, whatever their order."""
        both = build_student(self.kind, DATA, True, 0).eval()
        swapped = build_student(self.kind, DataConfig(image_size=64, classes=CLASSES[::-1]), True, 9).eval()
        image = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.allclose(both(image), swapped(image).flip(1), atol=1e-5)
        assert not torch.equal(flat(both), flat(self.make(0)))


def flat(student: Student) -> Tensor:
    return torch.cat([one.detach().flatten() for one in student.parameters()])
