"""What every encoder family promises: the base classes that each family's test class inherits.

The oracle is transformers' own model with eager attention, given the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor, nn

from common.backbones import FAMILIES, build_backbone
from common.backbones.base import Backbone
from common.errors import ConfigError
from common.teacher import Teacher


class BackboneContract:
    """``config`` is a small network of ``family``; ``side`` is a multiple of its unit."""

    family: ClassVar[str]
    config: ClassVar[dict[str, Any]]
    side: ClassVar[int]
    ratios: ClassVar[tuple[int, ...]]  # pixels of a tap's position, a tap
    fused: ClassVar[bool]  # query, key and value are one layer

    def reference(self, backbone: Backbone, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens (B, C, h, w) of transformers' own model, and its hidden states after each block, as maps."""
        raise NotImplementedError

    def embedding(self, backbone: Backbone) -> nn.Parameter:
        """The weight of the patch embedding."""
        raise NotImplementedError

    def built(self) -> Backbone:
        """With every table and bias away from its first value of zero, which would hide a fault."""
        torch.manual_seed(0)
        backbone = build_backbone(self.family, self.config).eval()
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return backbone

    def image(self, side: int = 0) -> Tensor:
        side = side or self.side
        return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))

    def roles(self) -> set[str]:
        return {"q", "k", "v", "out", "mlp"} | ({"qkv"} if self.fused else set())

    @torch.no_grad()
    def test_equals_transformers_own_model(self) -> None:
        backbone, image = self.built(), self.image()
        tokens, hidden = self.reference(backbone, image)
        ours = backbone(image)
        assert tokens.std() > 0.05
        assert torch.allclose(ours.tokens, tokens, atol=1e-5, rtol=1e-5)
        for tap, block in zip(ours.taps, backbone.tap_blocks, strict=True):
            assert torch.allclose(tap, hidden[block], atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_two_halves_are_the_whole(self) -> None:
        """To the bit, for every cut: a cached prefix must not change what is trained on it."""
        backbone, image = self.built(), self.image()
        whole = backbone(image)
        depth = len(backbone.blocks)
        for cut in range(depth + 1):
            lower = backbone.run(backbone.embed(image), 0, cut)
            features = backbone.finish(backbone.run(lower, cut, depth))
            assert torch.equal(features.tokens, whole.tokens)
            assert len(features.taps) == len(whole.taps)
            assert all(torch.equal(*pair) for pair in zip(features.taps, whole.taps, strict=True))

    @torch.no_grad()
    def test_blocks_run_are_counted(self) -> None:
        backbone, image = self.built(), self.image()
        depth, before = len(backbone.blocks), Backbone.blocks_run
        lower = backbone.run(backbone.embed(image), 0, depth - 1)
        assert Backbone.blocks_run == before + depth - 1
        backbone.finish(backbone.run(lower, depth - 1, depth))
        assert Backbone.blocks_run == before + depth

    @torch.no_grad()
    def test_shapes_are_as_announced(self) -> None:
        backbone = self.built()
        assert self.side % backbone.unit == 0
        features = backbone(self.image())
        grid = self.side // backbone.stride
        assert features.tokens.shape == (2, backbone.channels, grid, grid)
        shapes = [
            (2, channels, self.side // ratio, self.side // ratio)
            for channels, ratio in zip(backbone.tap_channels, self.ratios, strict=True)
        ]
        assert [tuple(tap.shape) for tap in features.taps] == shapes
        assert list(backbone.tap_blocks) == sorted(set(backbone.tap_blocks))
        assert backbone.tap_blocks[-1] < len(backbone.blocks) - 1

    def test_layer_names_are_those_of_linear_layers(self) -> None:
        backbone = self.built()
        assert set(backbone.LAYERS) == self.roles()
        names = backbone.layers(["qkv", "out", "mlp"] if self.fused else ["q", "out", "mlp"])
        assert all(type(backbone.get_submodule(name)) is nn.Linear for name in names)
        backbone.split_qkv()
        for role in self.roles() - {"qkv"}:
            names = backbone.layers([role])
            assert len(names) == len(backbone.blocks) * len(backbone.LAYERS[role])
            assert all(type(backbone.get_submodule(name)) is nn.Linear for name in names)

    def test_every_linear_layer_of_a_block_has_a_role(self) -> None:
        backbone = self.built()
        backbone.split_qkv()
        named = set(backbone.layers(sorted(self.roles() - {"qkv"})))
        inside = {
            f"{backbone.blocks_name}.{index}.{name}"
            for index, block in enumerate(backbone.blocks)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
        # Hiera's own projection of the residual at a stage end is no layer for an adapter.
        residual = {f"{backbone.blocks_name}.{index}.proj" for index in range(len(backbone.blocks))}
        assert named <= inside
        assert inside - named <= residual

    def test_layers_of_the_last_blocks_only(self) -> None:
        backbone = self.built()
        depth = len(backbone.blocks)
        few = backbone.layers(["out"], last_blocks=2)
        assert [name.removeprefix(f"{backbone.blocks_name}.").split(".")[0] for name in few] == [
            str(depth - 2),
            str(depth - 1),
        ]
        assert backbone.layers(["out"], last_blocks=depth + 5) == backbone.layers(["out"])
        with pytest.raises(ConfigError, match="gate"):
            backbone.layers(["gate"])

    @torch.no_grad()
    def test_split_qkv_keeps_the_outputs(self) -> None:
        backbone, image = self.built(), self.image()
        before, count = backbone(image), sum(p.numel() for p in backbone.parameters())
        backbone.split_qkv()
        split = dict(backbone.named_parameters())
        after = backbone(image)
        assert torch.allclose(after.tokens, before.tokens, atol=1e-5, rtol=1e-5)
        assert sum(parameter.numel() for parameter in split.values()) == count
        backbone.split_qkv()
        assert all(parameter is split[name] for name, parameter in backbone.named_parameters())

    @torch.no_grad()
    def test_each_of_q_k_and_v_is_its_own(self) -> None:
        """A change at each of the three changes the output; three aliases of one layer would not."""
        backbone, image = self.built(), self.image()
        backbone.split_qkv()
        outputs = [backbone(image).tokens]
        for role in ("q", "k", "v"):
            changed = copy.deepcopy(backbone)
            weight = changed.get_submodule(changed.layers([role])[-1]).weight
            assert isinstance(weight, Tensor)
            weight.add_(torch.randn(weight.shape), alpha=0.5)
            outputs.append(changed(image).tokens)
        for index, first in enumerate(outputs):
            assert all((first - second).abs().max() > 1e-4 for second in outputs[:index])

    @torch.no_grad()
    def test_a_resize_to_the_same_size_changes_nothing(self) -> None:
        backbone, image = self.built(), self.image()
        state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        before = backbone(image).tokens
        backbone.resize_positions(self.side)
        assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())
        assert torch.equal(backbone(image).tokens, before)

    @torch.no_grad()
    def test_an_image_of_any_side_goes_through_a_teacher(self) -> None:
        backbone = self.built()
        side = self.side + 3
        assert side % backbone.unit
        backbone.resize_positions(side)
        teacher = Teacher(backbone, classes=2).eval()
        output = teacher(torch.rand(1, 3, side, side))
        assert output.logits.shape == (1, 2, side, side)
        assert bool(output.logits.isfinite().all())

    def test_gradients_reach_the_embedding_and_every_block(self) -> None:
        backbone = self.built()
        features = backbone(self.image())
        (features.tokens.square().mean() + sum(tap.square().mean() for tap in features.taps)).backward()
        grad = self.embedding(backbone).grad
        assert grad is not None
        assert grad.abs().max() > 0
        for name in backbone.layers(["out", "mlp"]):
            weight = backbone.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            assert weight.grad is not None
            assert weight.grad.abs().max() > 0

    def test_builds_without_memory_on_the_meta_device(self) -> None:
        real = self.built().state_dict()
        with torch.device("meta"):
            empty = build_backbone(self.family, self.config).state_dict()
        assert {name: t.shape for name, t in empty.items()} == {name: t.shape for name, t in real.items()}
        assert all(tensor.is_meta for tensor in empty.values())

    @torch.no_grad()
    def test_half_precision_is_close(self) -> None:
        backbone, image = self.built(), self.image()
        whole = backbone(image).tokens
        with torch.autocast("cpu", torch.bfloat16):
            half = backbone(image).tokens.float()
        assert (half - whole).pow(2).mean().sqrt() < 0.05 * whole.std()


class StoredPositionsContract(BackboneContract):
    """Families with an absolute table that is interpolated to the image."""

    def write_positions(self, backbone: Backbone, draw: Callable[[int], Tensor]) -> Tensor:
        """Fill the table, whatever its size g, with ``draw(g)`` (C, g, g), and return that."""
        raise NotImplementedError

    def bias(self, backbone: Backbone) -> Tensor:
        """Of the patch embedding (C,): what is embedded of a black image beside its positions."""
        raise NotImplementedError

    @torch.no_grad()
    @pytest.mark.parametrize("factor", [1, 2])
    def test_resized_positions_are_the_same_function(self, factor: int) -> None:
        """Against scipy's cubic splines at the positions' centres, away from the edge, whose rule differs."""
        backbone = self.built()
        width = len(self.bias(backbone))

        def smooth(size: int) -> Tensor:
            at = (torch.arange(size) + 0.5) / size
            rows, columns = torch.meshgrid(at, at, indexing="ij")
            phase = torch.arange(width)[:, None, None] * 0.3
            return torch.sin(2.5 * rows + phase) + torch.cos(1.5 * columns * rows - phase)

        table = self.write_positions(backbone, smooth)
        side = factor * self.side
        backbone.resize_positions(side)
        black = backbone.embed(torch.zeros(1, 3, side, side)).hidden
        found = backbone.as_map(black)[0] - self.bias(backbone)[:, None, None]
        new, old = found.shape[-1], table.shape[-1]
        centres = (np.arange(new) + 0.5) * old / new - 0.5
        grid = np.stack(np.meshgrid(centres, centres, indexing="ij"))
        expected = np.stack([map_coordinates(c, grid, order=3, mode="nearest") for c in table.numpy()])
        inner = (centres >= 1) & (centres <= old - 2)
        error = np.abs(found.numpy() - expected)[:, inner][:, :, inner]
        assert error.size > width
        assert error.max() < 0.04
        if new == old:
            assert torch.allclose(found, table, atol=1e-5)


class FittingContract(BackboneContract):
    """Families whose transformers model takes any size by itself."""

    @torch.no_grad()
    @pytest.mark.parametrize("factor", [2, 3])
    def test_equals_transformers_own_model_at_another_size(self, factor: int) -> None:
        backbone = self.built()
        image = self.image(factor * self.side)
        tokens, _ = self.reference(backbone, image)
        backbone.resize_positions(factor * self.side)
        assert torch.allclose(backbone(image).tokens, tokens, atol=1e-5, rtol=1e-5)


def families_tested() -> set[str]:
    """Families of the contract's subclasses, however deep."""
    found, waiting = set(), [BackboneContract]
    while waiting:
        kind = waiting.pop()
        found |= {kind.__dict__["family"]} if "family" in kind.__dict__ else set()
        waiting += kind.__subclasses__()
    return found & set(FAMILIES)
