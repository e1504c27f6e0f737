"""The space that a generator denoises in: Haar coefficients, or the latent space of a small autoencoder.

A space turns images into *states* and back. Haar's is exact and twice as coarse as the image; a latent space
loses a little and is four or eight times as coarse, which is what makes large images affordable (after
Rombach et al. 2022, Latent Diffusion). Everything else of a generator is the same in both.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import ArtefactError

WEIGHTS = "diffusion_pytorch_model.safetensors"  # in a folder that diffusers saved
BANDS = 12  # Haar coefficients of three channels


def haar(image: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 12, S/2, S/2): means, then three details (scaled x 3 to a similar range)."""
    a, b = image[..., ::2, ::2], image[..., ::2, 1::2]
    c, d = image[..., 1::2, ::2], image[..., 1::2, 1::2]
    detail = [a - b + c - d, a + b - c - d, a - b - c + d]
    return torch.cat([(a + b + c + d) / 4, *(3 * part / 4 for part in detail)], 1)


def inverse_haar(bands: Tensor) -> Tensor:
    """The inverse of `haar`."""
    mean, x, y, z = bands.chunk(4, 1)
    x, y, z = x / 3, y / 3, z / 3
    a, b, c, d = mean + x + y + z, mean - x + y - z, mean + x - y - z, mean - x - y + z
    image = mean.new_empty(*mean.shape[:2], 2 * mean.shape[2], 2 * mean.shape[3])
    image[..., ::2, ::2], image[..., ::2, 1::2] = a, b
    image[..., 1::2, ::2], image[..., 1::2, 1::2] = c, d
    return image


class ImageSpace(nn.Module, ABC):
    """Images (B, 3, S, S) in [-1, 1] as states (B, ``channels``, S / ``stride``, S / ``stride``).

    Attributes:
        hints: the first so many channels of a painted palette's state are shown to the denoiser.
    """

    channels: int
    stride: int
    hints: int

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """The state of ``image``; each one's depends on that image alone."""

    @abstractmethod
    def decode(self, state: Tensor) -> Tensor:
        """The image of ``state``; may leave [-1, 1] a little."""

    def shape(self, count: int, side: int) -> tuple[int, int, int, int]:
        """Of the states of ``count`` images of ``side`` pixels."""
        return count, self.channels, side // self.stride, side // self.stride


class HaarSpace(ImageSpace):
    """Exact, at half resolution: ``decode(encode(image)) == image`` but for rounding."""

    channels, stride, hints = BANDS, 2, 3

    def encode(self, image: Tensor) -> Tensor:
        return haar(image)

    def decode(self, state: Tensor) -> Tensor:
        return inverse_haar(state)


Codec: TypeAlias = "AutoencoderKL | AutoencoderTiny"
KINDS: dict[str, type[AutoencoderKL] | type[AutoencoderTiny]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
}


class LatentSpace(ImageSpace):
    """The latent space of an autoencoder of diffusers, brought to about mean 0 and deviation 1.

    A codec of three channels sees the image; one of 3 p^2 sees it cut into squares of p pixels a side, and
    so never works at full resolution. No randomness: of a posterior the mean is the state.
    """

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec.requires_grad_(False).eval()
        config = codec.config
        levels = config.get("block_out_channels") or config["encoder_block_out_channels"]
        self._patch = round((config["in_channels"] / 3) ** 0.5)
        self.channels = self.hints = int(config["latent_channels"])
        self.stride = 2 ** (len(levels) - 1) * self._patch

    def encode(self, image: Tensor) -> Tensor:
        given = F.pixel_unshuffle(image, self._patch)
        with torch.autocast(given.device.type, enabled=False):  # half precision is for the denoiser alone
            found = self.codec.encode(given)
        latent = found.latent_dist.mode() if isinstance(self.codec, AutoencoderKL) else found.latents
        centre, spread = self._scale(latent)
        state: Tensor = (latent - centre) / spread
        return state

    def decode(self, state: Tensor) -> Tensor:
        centre, spread = self._scale(state)
        with torch.autocast(state.device.type, enabled=False):
            made: Tensor = self.codec.decode(state * spread + centre).sample
        return F.pixel_shuffle(made, self._patch)

    def described(self) -> dict[str, Any]:
        """What `space_of` makes this space of again, weights apart: plain values for a card."""
        taken = signature(type(self.codec).__init__).parameters  # diffusers notes more than it takes back
        config = {key: value for key, value in self.codec.config.items() if key in taken}
        return {"class": type(self.codec).__name__, **config}

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the codec's own latents, (1, channels or 1, 1, 1) each.

        diffusers has ``latents_mean`` and ``latents_std`` a channel, or ``shift_factor``, and divides by
        ``scaling_factor`` in any case.
        """
        config = self.codec.config
        centre = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
        spread = torch.tensor(config.get("latents_std") or [1.0]) / config["scaling_factor"]
        return torch.tensor(centre).view(1, -1, 1, 1).to(like), spread.view(1, -1, 1, 1).to(like)


def space_of(about: dict[str, Any] | None) -> ImageSpace:
    """The space that a generator's card names under ``codec``, its weights still to be loaded; None: Haar."""
    if about is None:
        return HaarSpace()
    config = {key: value for key, value in about.items() if key != "class"}
    return LatentSpace(KINDS[about["class"]].from_config(config))


def codec_from(folder: Path) -> Codec:
    """An autoencoder from a folder as diffusers saves one; its files alone are read, and no code in them.

    Raises:
        ArtefactError: no folder, neither of `KINDS`, foreign weights, or images that are not RGB.
    """
    wanted = f"give a folder with the config.json and {WEIGHTS} of an {' or '.join(KINDS)}"
    try:
        kind = KINDS[json.loads((folder / "config.json").read_text())["_class_name"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder} holds no config.json of an autoencoder: {wanted}") from error
    try:
        codec, found = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ArtefactError(f"{folder} is no autoencoder that can be loaded: {wanted}") from error
    faults = [f"missing tensor {name}" for name in sorted(found["missing_keys"])]
    faults += [f"unknown tensor {name}" for name in sorted(found["unexpected_keys"])]
    if codec.config["in_channels"] != 3 or codec.config["out_channels"] != 3:
        faults.append(f"it takes {codec.config['in_channels']} channels and not three")
    if faults:
        raise ArtefactError(f"{folder} is no autoencoder of RGB images: {wanted}", faults)
    loaded: Codec = codec
    return loaded
