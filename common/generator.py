"""The generator: a small diffusion network that paints an image in a given style on a given mask.

It works in a coarser space than the image's (`common.image_space`: Haar coefficients, or latents for larger
images) and predicts the clean image there, as a correction to a *palette*: the mask painted with the style's
two mean colours. At few training steps this is far cleaner than predicting noise or velocity. Noise schedule:
cosine (Nichol and Dhariwal 2021); loss weight 1 + min(SNR, 5) / 2 (after Hang et al. 2023, Min-SNR).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from common import checkpoints
from common.adapter import Adapter
from common.image_space import HaarSpace, ImageSpace, space_of
from common.recipe import GeneratorConfig
from common.seeding import derive_seed
from common.style import STYLE_BOUNDS, STYLE_FIELDS
from common.tuning.halves import BOTH, Halves
from common.tuning.presets import GENERATOR
from common.tuning.slots import AdapterSlots, SlotPlan

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
TOKEN = "token"  # the layer that a site's code passes through, where there is one
CODE = 64  # numbers of a site's code: codes of so many are nearly at right angles

generators_built = 0  # how many networks this process has built: tests assert that it stays at one


def palette(mask: Tensor, style: Tensor) -> Tensor:
    """The mask (B, 1, S, S) painted with the style's (B, 14) mean colours: (B, 3, S, S) in [-1, 1]."""
    foreground, background = style[:, 0:3, None, None], style[:, 6:9, None, None]
    return (mask * foreground + (1 - mask) * background) * 2 - 1


@dataclass(frozen=True)
class Condition:
    """What an image is painted from, as the denoiser sees it.

    Attributes:
        base: (B, channels, s, s) the palette's state, which is corrected.
        planes: (B, more, s, s) what stands beside the noisy state: the mask, and hints of the palette.
        style: (B, 96), embedded.
    """

    base: Tensor
    planes: Tensor
    style: Tensor


class StyleDiffusion(nn.Module):
    """Denoiser: noisy state, time, mask and style -> clean state, of images in [-1, 1].

    Args:
        space: that it denoises in; None: Haar's.
    """

    def __init__(self, space: ImageSpace | None = None) -> None:
        super().__init__()
        own = space or HaarSpace()
        self.unet = UNet2DModel(
            sample_size=48, in_channels=own.channels + own.stride**2 + own.hints, out_channels=own.channels,
            block_out_channels=(24, 40, 56), layers_per_block=1, norm_num_groups=8,
            class_embed_type="identity", attention_head_dim=8,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        self.style = nn.Sequential(nn.Linear(len(STYLE_FIELDS), 96), nn.SiLU(), nn.Linear(96, 96))
        self.token: nn.Linear | None = None
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)
        self.space = own

    def tell_sites_apart(self) -> None:
        """Add the token layer; until it is trained it says nothing."""
        self.token = nn.Linear(CODE, 96, bias=False)
        nn.init.zeros_(self.token.weight)

    def layers(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        """Full names of the layers that end so; none of the space's, which every adapter has in common."""
        named = (name for name, _ in self.named_modules() if name.endswith(targets))
        return tuple(name for name in named if not name.startswith("space."))

    def condition(self, mask: Tensor, style: Tensor) -> Condition:
        """Of ``mask`` (B, 1, S, S) and ``style`` (B, 14); the same at every time, so made once an image.

        Behind a style's numbers its site's code may stand (`with_code`), for a network with a token layer.
        """
        painted = palette(mask, style)
        return self.conditioned(mask, style, self.space.encode(painted))

    def conditioned(self, mask: Tensor, style: Tensor, base: Tensor) -> Condition:
        """`condition` where the palette's state ``base`` is known."""
        style, code = style[:, : len(STYLE_FIELDS)], style[:, len(STYLE_FIELDS) :]
        planes = torch.cat([F.pixel_unshuffle(mask, self.space.stride), base[:, : self.space.hints]], 1)
        low, high = torch.tensor(STYLE_BOUNDS).T
        embedded = self.style((style - low) / (high - low) * 4 - 2)
        if self.token is not None and code.shape[1]:
            embedded = embedded + self.token(code)
        return Condition(base, planes, embedded)

    def denoise(self, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        """The clean state; ``noisy`` (B, channels, s, s), ``time`` (B,) steps."""
        shown = torch.cat([noisy, given.planes], 1)
        correction: Tensor = self.unet(shown, time, class_labels=given.style).sample
        return given.base + 0.5 * correction

    def forward(self, noisy: Tensor, time: Tensor, mask: Tensor, style: Tensor) -> Tensor:
        """`denoise` under `condition`."""
        return self.denoise(noisy, time, self.condition(mask, style))


@lru_cache(maxsize=256)
def site_code(site: str) -> Tensor:
    """(CODE,) of length 1: what a network with a token layer knows ``site`` by; the same everywhere."""
    generator = torch.Generator().manual_seed(derive_seed(0, "site code", site) % 2**63)
    code: Tensor = torch.randn(CODE, generator=generator)
    return F.normalize(code, dim=0)


def with_code(style: Tensor, sites: Sequence[str]) -> Tensor:
    """``style`` (B, 14) with the code of each one's site behind it: (B, 14 + CODE)."""
    return torch.cat([style, torch.stack([site_code(site) for site in sites])], 1)


@lru_cache(maxsize=1)
def signal_shares() -> Tensor:
    """The share of the clean image in the noisy one's variance at each step of the schedule, (1000,)."""
    shares: Tensor = DDPMScheduler(prediction_type="sample", **SCHEDULE).alphas_cumprod
    return shares


def draw_noise(space: ImageSpace, image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For images (B, 3, S, S) a random time (B,) and noise of the shape of their states."""
    time = torch.randint(0, len(signal_shares()), (len(image),), generator=generator)
    return time, torch.randn(space.shape(len(image), image.shape[-1]), generator=generator)


def denoising_errors(
    network: StyleDiffusion, image: Tensor, mask: Tensor, style: Tensor, time: Tensor, noise: Tensor
) -> Tensor:
    """Weighted squared error of each clean state, (B,); ``image`` (B, 3, S, S) in [0, 1], `draw_noise`."""
    clean = network.space.encode(image * 2 - 1)
    return state_errors(network, clean, network.condition(mask, style), time, noise)


def state_errors(
    network: StyleDiffusion, clean: Tensor, given: Condition, time: Tensor, noise: Tensor
) -> Tensor:
    """`denoising_errors` of images whose states ``clean`` are known."""
    share = signal_shares()[time].view(-1, 1, 1, 1)
    noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
    error = (network.denoise(noisy, time, given) - clean).square().mean((1, 2, 3))
    signal_to_noise = (share / (1 - share)).flatten()
    weighted: Tensor = error * (1 + 0.5 * signal_to_noise.clamp(max=5))
    return weighted


def diffusion_loss(
    network: StyleDiffusion, image: Tensor, mask: Tensor, style: Tensor, generator: torch.Generator
) -> Tensor:
    """The mean of `denoising_errors` at random times; ``image`` (B, 3, S, S) in [0, 1]."""
    return denoising_errors(network, image, mask, style, *draw_noise(network.space, image, generator)).mean()


def shipped_generator(name: str) -> StyleDiffusion:
    """The generator ``name``, in the latent space of the codec on its card; without one in Haar's."""
    network = StyleDiffusion(space_of(checkpoints.card(name).get("codec")))
    network.load_state_dict(checkpoints.load_tensors(name))
    return network


class ResidentGenerator:
    """The one generator of this process, with slots for a site's or the federation's adapter."""

    def __init__(self, name: str, rank: int, site_token: bool = False) -> None:
        global generators_built
        self.network = shipped_generator(name)
        if site_token:
            self.network.tell_sites_apart()
        targets = (*TARGETS, TOKEN) if site_token else TARGETS
        plan = SlotPlan(checkpoints.base_sha256(name), GENERATOR, rank, self.network.layers(targets))
        self.slots = AdapterSlots(self.network, plan)
        self.network.eval()
        generators_built += 1

    @contextmanager
    def visit(self, adapter: Adapter, train: bool = False, halves: Halves = BOTH) -> Iterator[StyleDiffusion]:
        """The generator with ``adapter`` written into it; nothing of another adapter is left."""
        with self.slots.visit(adapter, train, halves):
            yield self.network


@lru_cache(maxsize=2)
def resident_generator(name: str, rank: int, site_token: bool = False) -> ResidentGenerator:
    return ResidentGenerator(name, rank, site_token)


def generator_of(config: GeneratorConfig) -> ResidentGenerator:
    """The one generator of this process that ``config`` asks for."""
    return resident_generator(config.name, config.rank, config.site_token)


def initial_adapter(config: GeneratorConfig, seed: int) -> Adapter:
    """What the federated scope's first round starts from."""
    return generator_of(config).slots.initial(derive_seed(seed, "generator", "lora_A"))
