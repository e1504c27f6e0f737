"""Every student that a recipe may name keeps the students' contract."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from client.students import STUDENTS, ResidualUNet, ViTTiny
from client.students.vit import GRID, PATCH
from common.names import SHIPPED_STUDENTS
from tests.contract.student import ShippedContract, StudentContract


class TestUNetXS(ShippedContract):
    kind, params = "unet-xs", (150_000, 200_000)


class TestUNetS(ShippedContract):
    kind, params = "unet-s", (1_900_000, 2_200_000)


class TestMobile(ShippedContract):
    kind, params = "mobile", (500_000, 999_999)


class TestViTTiny(StudentContract):
    kind, params = "vit-tiny", (5_500_000, 6_200_000)

    def test_positions_are_those_learned_where_the_tile_is_that_size(self) -> None:
        """And between them elsewhere: the same places of the image, not a crop of the grid."""
        encoder = self.make().encoder  # type: ignore[attr-defined]
        side = GRID * PATCH
        blank = torch.full((1, 3, side, side), 0.45)
        assert torch.allclose(encoder.embed(blank), encoder.positions + encoder.project.bias[:, None, None])
        with torch.no_grad():
            ramp = torch.linspace(-1, 1, GRID).expand_as(encoder.positions)
            encoder.positions.copy_(ramp)
            wide = encoder.embed(torch.full((1, 3, side, 2 * side), 0.45))
        moved = (wide - encoder.project.bias[:, None, None])[0, 0, 0]
        wanted = F.interpolate(ramp[:, :1], size=(GRID, 2 * GRID), mode="bicubic")[0, 0, 0]
        assert torch.allclose(moved, wanted, atol=1e-4)
        assert (moved.diff() > 0).all()

    def test_tokens_are_told_apart_by_their_place_alone(self) -> None:
        """Without positions a permutation of tokens is a permutation of answers; the walk has none."""
        encoder = self.make().encoder.eval()  # type: ignore[attr-defined]
        tokens, order = torch.randn(1, 9, 192), torch.randperm(9)
        with torch.no_grad():
            straight, mixed = encoder.walk(tokens)[-1], encoder.walk(tokens[:, order])[-1]
        assert torch.allclose(straight[:, order], mixed, atol=1e-4)


def test_every_kind_is_held_to_the_contract() -> None:
    found = {one.kind: one for one in (TestUNetXS, TestUNetS, TestMobile, TestViTTiny)}
    assert set(found) == set(STUDENTS)
    assert {kind for kind, one in found.items() if issubclass(one, ShippedContract)} == set(SHIPPED_STUDENTS)


def test_the_unrolled_body_is_monais_own_forward() -> None:
    for kind in ("unet-xs", "unet-s"):
        student = STUDENTS[kind](3).eval()
        assert isinstance(student, ResidualUNet)
        image = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            expected = student.head(student.body((image - 0.45) / 0.25))
            assert torch.equal(student(image), expected)
            assert torch.equal(student.outputs(image).logits, expected)


def test_a_transformer_student_runs_on_fewer_tokens_than_the_image_has() -> None:
    student = ViTTiny(1).eval()
    with torch.no_grad():
        tokens = student.encoder.embed(torch.rand(1, 3, 96, 96)).flatten(2).transpose(1, 2)
        assert student.encoder.walk(tokens[:, :9])[-1].shape == (1, 9, 192)
