"""What every encoder offers the teacher: one deep map, taps on the way, and a place to stop and go on.

The networks themselves are transformers' own, so that official checkpoints load as they are. A backbone
only says how to walk through one: `embed`, its blocks one by one (`run`), `finish`. Walking by blocks is
what lets a site compute the blocks below its adapters once and keep the result (`client.prefix_cache`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import ConfigError

TAPS = 3  # encoder depths that the decoder reads beside the last


@dataclass(frozen=True)
class Features:
    """``tokens`` (B, channels, h, w), the encoder's output; ``taps`` (B, C_i, h_i, w_i), shallow to deep."""

    tokens: Tensor
    taps: tuple[Tensor, ...]


@dataclass(frozen=True)
class Progress:
    """An image part of the way through an encoder: all that the remaining blocks need.

    Attributes:
        hidden: what the next block takes, as the network holds it.
        taps: maps read so far, (B, C_i, h_i, w_i).
        shared: what every block takes besides (rotary tables); the same for all images of one size.
    """

    hidden: Tensor
    taps: tuple[Tensor, ...] = ()
    shared: tuple[Tensor, ...] = ()


class Backbone(nn.Module, ABC):
    """An image encoder, walked block by block.

    Attributes:
        stride: pixels a position of ``tokens``; images are resized to a multiple of `unit`.
        unit: sides of an input image are multiples of it.
        channels: of ``tokens``.
        tap_blocks: the blocks after which a tap is read, 0-based, ascending.
        tap_channels: channels of each tap.
        LAYERS: role of a linear layer in a block -> how its module's name ends. ``qkv`` is one fused layer,
            where a network has one; `split_qkv` replaces it by ``q``, ``k`` and ``v``.
    """

    LAYERS: Mapping[str, tuple[str, ...]]

    stride: int
    unit: int
    channels: int
    tap_blocks: tuple[int, ...]
    tap_channels: tuple[int, ...]
    blocks_run = 0  # of this process, over all images: tests assert that a cached prefix adds none

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks in their order."""

    @property
    @abstractmethod
    def blocks_name(self) -> str:
        """Name of the blocks' list below this module: block 3 is ``{blocks_name}.3``."""

    @abstractmethod
    def embed(self, image: Tensor) -> Progress:
        """Image (B, 3, S, S), normalised, to what the first block takes."""

    @abstractmethod
    def block(self, index: int, progress: Progress) -> Tensor:
        """The hidden state after block ``index``."""

    @abstractmethod
    def as_map(self, hidden: Tensor) -> Tensor:
        """A hidden state as (B, C, h, w)."""

    @abstractmethod
    def finish(self, progress: Progress) -> Features:
        """Neck or final norm, after the last block."""

    @abstractmethod
    def resize_positions(self, image_size: int) -> None:
        """Interpolate every position table for images of ``image_size`` pixels a side; never a fresh one.

        A size that is no multiple of `unit` stands for the next one, as `fit_to_unit` makes of the images.
        """

    def split_qkv(self) -> None:
        """Replace fused query-key-value layers by three; nothing to do where they are apart already."""

    def run(self, progress: Progress, first: int, last: int) -> Progress:
        """Blocks ``first`` up to, not including, ``last``; taps are read on the way."""
        for index in range(first, last):
            Backbone.blocks_run += 1
            progress = replace(progress, hidden=self.block(index, progress))
            if index in self.tap_blocks:
                progress = replace(progress, taps=(*progress.taps, self.as_map(progress.hidden)))
        return progress

    def forward(self, image: Tensor) -> Features:
        return self.finish(self.run(self.embed(image), 0, len(self.blocks)))

    def layers(self, roles: Sequence[str], last_blocks: int | None = None) -> list[str]:
        """Names, below this module, of the layers with ``roles`` in the last ``last_blocks`` blocks (or all).

        Raises ``ConfigError`` for a role that this network does not have.
        """
        if strange := [role for role in roles if role not in self.LAYERS]:
            raise ConfigError(f"this encoder has no layer {strange}; it has {', '.join(self.LAYERS)}")
        count = len(self.blocks)
        start = 0 if last_blocks is None else max(0, count - last_blocks)
        endings = [ending for role in roles for ending in self.LAYERS[role]]
        return [f"{self.blocks_name}.{index}.{ending}" for index in range(start, count) for ending in endings]


def spread(depth: int, count: int = TAPS) -> tuple[int, ...]:
    """``count`` block indices at even distances below the last block, ascending: 12 blocks -> 2, 5, 8."""
    return tuple(sorted({(depth * (index + 1)) // (count + 1) - 1 for index in range(count)} - {-1}))


def prepared_side(side: int, unit: int) -> int:
    """``side`` pixels, enlarged to the next multiple of ``unit``."""
    return -(-side // unit) * unit


def fit_to_unit(image: Tensor, unit: int) -> Tensor:
    """``image`` (B, C, H, W) with sides enlarged to the next multiple of ``unit``; unchanged if they are."""
    sides = [prepared_side(side, unit) for side in image.shape[-2:]]
    if sides == list(image.shape[-2:]):
        return image
    return F.interpolate(image, size=sides, mode="bilinear", align_corners=False, antialias=True)
