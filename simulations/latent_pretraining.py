"""The generator for larger images: a small autoencoder first, then the denoiser in its latent space.

Both see procedural scenes alone (`simulations.scenes`, `simulations.tissues`). The autoencoder is diffusers'
AutoencoderTiny on squares of 4 x 4 pixels, so that its latents are four times as coarse as the image; the
denoiser sees each scene as the latents that the finished autoencoder makes of it, computed once. An official
autoencoder may stand in the place of ours (`codec_from`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import Tensor, nn
from torch.nn import functional as F

from common import checkpoints
from common.canonical import sha256_of_file
from common.errors import ArtefactError
from common.generator import StyleDiffusion, palette, signal_shares, state_errors
from common.image_space import WEIGHTS, Codec, LatentSpace, codec_from, haar
from common.seeding import derive_rng, derive_seed
from simulations.scene_training import LICENCE, REAL_LOOKING, Bank, Styled, dim, fit, ship, turned, write_down

NAME = "latent-generator"
SHIPS = "ward-diffusion-latent"
STEPS, CODEC_STEPS = 1200, 300  # of the denoiser, and of the autoencoder before it
SIZE = 128  # of the denoiser's scenes, pixels; the autoencoder sees crops of 96
CODEC_SCENES, SCENES, HELD_OUT, CHUNK = 900, 900, 24, 12
PATCH, COMPONENTS, WIDTH = 4, 12, 64
CODEC: dict[str, Any] = {
    "in_channels": 3 * PATCH**2, "out_channels": 3 * PATCH**2, "latent_channels": COMPONENTS,
    "encoder_block_out_channels": [WIDTH], "decoder_block_out_channels": [WIDTH],
    "num_encoder_blocks": [2], "num_decoder_blocks": [2],
}  # fmt: skip
BATCH = 8
PAINTED = 2  # of a batch of the autoencoder's: palettes, which every sampling starts from


@dataclass(frozen=True)
class Latents:
    """Scenes as the denoiser sees them: states of image and palette, masks, styles; N each."""

    clean: Tensor
    base: Tensor
    masks: Tensor
    styles: Tensor


class Averaged(nn.Module):
    """A network and the running mean of its weights, which is what ships."""

    def __init__(self, network: nn.Module, memory: float) -> None:
        super().__init__()
        self.network = network
        mean = torch.optim.swa_utils.get_ema_multi_avg_fn(memory)
        self.average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=mean)
        self.average.requires_grad_(False)


def pretrain_codec(seed: int, steps: int, kept: Path | None = None) -> tuple[LatentSpace, list[float]]:
    """An autoencoder that starts from principal components; and its smoothed losses.

    Loss: mean absolute error of the Haar coefficients, details threefold as `haar` has them.
    """
    torch.manual_seed(derive_seed(seed, NAME, "codec", "init"))
    scenes = Bank.make(derive_seed(seed, NAME, "codec scenes"), CODEC_SCENES, tissues=CODEC_SCENES)
    codec = AutoencoderTiny.from_config(CODEC)
    start_from_components(codec, torch.cat([_codec_batch(scenes, seed, -1 - part) for part in range(40)]))
    pair = Averaged(codec, 0.98)

    def loss_at(step: int) -> Tensor:
        if step:
            pair.average.update_parameters(pair.network)
        image = _codec_batch(scenes, seed, step) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents = pair.network.encode(F.pixel_unshuffle(image, PATCH)).latents
            made = pair.network.decode(latents).sample
        return (haar(F.pixel_shuffle(made.float(), PATCH)) - haar(image)).abs().mean()

    losses = fit(pair, steps, {"network": 1e-3}, loss_at, kept=kept)
    return LatentSpace(pair.average.module), losses


@torch.no_grad()
def start_from_components(codec: AutoencoderTiny, image: Tensor) -> None:
    """Write the principal components of the squares of ``image`` (N, 3, S, S) in [0, 1] into the weights.

    The rectifiers pass a component as two channels, itself and its negative, and blocks begin as identities;
    so the codec starts as the best linear one, its latents with mean 0 and deviation 1, and learns the rest.
    """
    # The encoder halves what is in [-1, 1] into [0, 1], and the decoder doubles it back.
    squares = F.pixel_unshuffle(image, PATCH).permute(1, 0, 2, 3).flatten(1)
    centre = squares.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.cov(squares))
    axes, spread = vectors[:, -COMPONENTS:], values[-COMPONENTS:].sqrt()
    into, back, same = (axes / spread).T, axes * spread, torch.eye(COMPONENTS)
    _pass(codec.encoder.layers[0], torch.cat([into, -into]), torch.cat([-into @ centre, into @ centre]))
    _pass(codec.encoder.layers[-1], torch.cat([same, -same], 1))
    _pass(codec.decoder.layers[0], torch.cat([same, -same]))
    _pass(codec.decoder.layers[-1], torch.cat([back, -back], 1), centre)
    for block in codec.modules():
        if isinstance(block, AutoencoderTinyBlock):
            nn.init.zeros_(block.conv[-1].weight)
            nn.init.zeros_(block.conv[-1].bias)


def _pass(layer: nn.Conv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    """Let ``layer`` make its first channels of its first ones by ``weight``, each place by itself.

    Channels beyond those are not listened to; what comes out of them stays random.
    """
    out, inside = weight.shape
    layer.weight[:out] = 0
    layer.weight[:out, :inside, 1, 1] = weight
    layer.get_parameter("bias")[:out] = 0 if bias is None else bias.flatten()


def _codec_batch(scenes: Bank, seed: int, step: int) -> Tensor:
    """(BATCH, 3, S, S) in [0, 1]: scenes, and some masks of them painted in two colours."""
    rng = derive_rng(seed, NAME, "codec batch", step)
    image, target, kinds = scenes.draw(rng, BATCH, (1, 1, 1))
    image = dim(image, rng)
    mask = target[torch.arange(PAINTED), kinds[:PAINTED]][:, None]
    colours = torch.from_numpy(rng.uniform(0, 1, (PAINTED, 14))).float()
    return torch.cat([(palette(mask, colours) + 1) / 2, image[PAINTED:]])


@torch.no_grad()
def latents_of(space: LatentSpace, seed: int, count: int, kept: Path | None = None) -> Latents:
    """``count`` or a few more scenes of `SIZE` pixels without distractors, encoded once."""
    if kept is not None and kept.exists():
        return Latents(**torch.load(kept, weights_only=True))
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for chunk in itertools.count():
        if sum(len(part[0]) for part in parts) >= count:
            break
        scenes = Bank.make(derive_seed(seed, NAME, "scenes", chunk), CHUNK, distractors=0.0, size=SIZE)
        rng = derive_rng(seed, NAME, "chunk", chunk)
        image, target = turned(scenes.images.float() / 255, scenes.targets.float(), rng)
        found = Styled.of(dim(image, rng), target, torch.from_numpy(scenes.kinds))
        if found is not None:
            base = space.encode(palette(found.masks, found.styles))
            parts.append((space.encode(found.images * 2 - 1), base, found.masks > 0, found.styles))
    made = Latents(*(torch.cat(part) for part in zip(*parts, strict=True)))
    if kept is not None:
        write_down(vars(made), kept)
    return made


def pretrain_denoiser(
    space: LatentSpace, latents: Latents, seed: int, steps: int, kept: Path | None = None
) -> tuple[StyleDiffusion, list[float]]:
    """The denoiser of ``space``, and its smoothed losses."""
    torch.manual_seed(derive_seed(seed, NAME, "init"))
    pair = Averaged(StyleDiffusion(space), 0.995)

    def loss_at(step: int) -> Tensor:
        if step:
            pair.average.update_parameters(pair.network)
        draw = torch.Generator().manual_seed(derive_seed(seed, NAME, "batch", step) % 2**63)
        rows = torch.randint(0, len(latents.clean), (BATCH,), generator=draw)
        time = torch.randint(0, len(signal_shares()), (BATCH,), generator=draw)
        noise = torch.randn(latents.clean[rows].shape, generator=draw)
        mask, base = latents.masks[rows].float(), latents.base[rows]
        with torch.autocast("cpu", torch.bfloat16):  # 0.8 of the time; states and weights stay float32
            given = pair.network.conditioned(mask, latents.styles[rows], base)
            return state_errors(pair.network, latents.clean[rows], given, time, noise).mean()

    losses = fit(pair, steps, {"network.unet": 1.5e-3, "network.style": 1.5e-3}, loss_at, kept=kept)
    return pair.average.module, losses


@torch.no_grad()
def fidelity(space: LatentSpace, seed: int) -> float:
    """Peak signal-to-noise ratio of scenes never trained on, encoded and decoded; dB, mean over scenes."""
    scenes = Bank.make(derive_seed(seed, NAME, "held out"), HELD_OUT, tissues=HELD_OUT)
    image = scenes.images.float() / 255
    made = ((space.decode(space.encode(image * 2 - 1)) + 1) / 2).clamp(0, 1)
    error = F.mse_loss(made, image, reduction="none").mean((1, 2, 3)).clamp_min(1e-10)
    return float((-10 * error.log10()).mean())


@dataclass(frozen=True)
class Brought:
    """An autoencoder of the user's own, and where the generator in its latent space goes.

    Attributes:
        source: SHA-256 of the autoencoder's weights.
    """

    codec: Codec
    name: str
    folder: Path
    source: str

    @classmethod
    def read(cls, codec: Path, name: str, folder: Path | None = None) -> Brought:
        """From a folder as diffusers saves an autoencoder; ``folder`` None: the first of imported models.

        Raises:
            ArtefactError: see `codec_from`; or a name that a shipped model has, or that is no file's name.
        """
        if name in checkpoints.names() or not checkpoints.NAME.fullmatch(name):
            raise ArtefactError(
                f"{name!r} cannot name a generator of yours: take letters, digits, '-', '_' and '.', and no "
                "name of a shipped model"
            )
        digest = sha256_of_file(codec / WEIGHTS) if (codec / WEIGHTS).is_file() else ""
        home = folder or checkpoints.teacher_folders()[0]
        return cls(codec_from(codec), name, home.resolve(), digest)


def pretrain_latent_generator(
    seed: int, steps: int, keep: Path | None = None, brought: Brought | None = None
) -> None:
    """Train and save. ``keep``: a folder from which a training that was broken off is taken up again."""

    def file(part: str, length: int) -> Path | None:
        of = brought.name if brought else NAME
        return None if keep is None else keep / f"{of}-{part}-{seed}-{length}.pt"

    codec_steps, codec_losses = 0, list[float]()
    if brought:
        space = LatentSpace(brought.codec)
    else:
        codec_steps = CODEC_STEPS
        space, codec_losses = pretrain_codec(seed, codec_steps, file("codec", codec_steps))
    latents = latents_of(space, seed, SCENES, file("latents", SCENES))
    network, losses = pretrain_denoiser(space, latents, seed, steps, file("denoiser", steps))
    ready = network.half().float()  # as it ships
    own = ready.space
    assert isinstance(own, LatentSpace)
    about: dict[str, object] = {
        "kind": "generator",
        "image_size": SIZE,
        "codec": own.described(),
        "codec_steps": codec_steps,
        "trained_on": REAL_LOOKING,
        "fidelity_db": round(fidelity(own, seed), 2),
        "losses": losses,
        "codec_losses": codec_losses,
    }
    if brought is None:
        ship(SHIPS, ready.half(), (NAME, seed, steps), about)
        return
    about["trained_on"] = f"the denoiser: {REAL_LOOKING}; the autoencoder was brought"
    about["licence"] = f"the denoiser: {LICENCE}; the autoencoder: its own"
    about["codec_sha256"] = brought.source
    maker = f"{NAME} --codec FOLDER --name {brought.name}"
    ship(brought.name, ready.half(), (maker, seed, steps), about, brought.folder)
