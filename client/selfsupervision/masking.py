"""Learning from images by telling what was hidden of them.

A transformer learns as in MAE (He et al. 2022): its encoder sees the patches that are left, a light decoder
tells the others, and the decoder is thrown away. A convolution cannot leave patches out, so a convolutional
student learns as in SimMIM (Xie et al. 2022): hidden patches are greyed, the whole network runs, and one
1 x 1 convolution in the place of its head tells the pixels. (ConvNeXt V2, Woo et al. 2023, skips the hidden
pixels by sparse convolutions; these networks are too small for that to pay.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.students import Student, ViTTiny
from client.students.base import MEAN
from client.students.vit import GRID, HEADS, PATCH, WIDTH, Block

VIT_SHARE = 0.75  # of the patches that are hidden from a transformer (MAE's)
SHARE = 0.6  # of those hidden from a convolutional network (SimMIM's)
SIDE = 16  # pixels of a hidden patch: a sixth of the usual tile's side, as in both papers
DECODER_WIDTH, DECODER_DEPTH = 96, 2
FLAT = 1e-3  # added to a variance of pixels, which is 0 where a patch is black


def hidden_order(images: int, patches: int, generator: torch.Generator) -> Tensor:
    """(B, N): the patches of each image in a random order; the first ones are hidden."""
    return torch.rand(images, patches, generator=generator).argsort(1)


class MaskedImage(nn.Module):
    """SimMIM on a whole convolutional student; its ``head`` is lent out for the time.

    The target is the image with mean 0 and deviation 1 a channel: behind an instance norm nothing knows an
    image's own brightness.
    """

    def __init__(self, student: Student, seed: int) -> None:
        super().__init__()
        self.student = student
        self.own_head = student.head
        student.head = nn.Conv2d(self.own_head.in_channels, 3, 1)
        self.generator = torch.Generator().manual_seed(seed % 2**63)

    def trained(self) -> list[nn.Parameter]:
        return list(self.student.parameters())

    def finish(self) -> None:
        """Give the student its own head back, which was not trained."""
        self.student.head = self.own_head

    def loss(self, images: Tensor) -> Tensor:
        """Mean absolute error over the hidden pixels of ``images`` (B, 3, H, W) in [0, 1]."""
        covered = self._cover(images)
        told = self.student(images * (1 - covered) + MEAN * covered)
        spread = images.var((2, 3), keepdim=True, unbiased=False).add(FLAT).sqrt()
        wanted = (images - images.mean((2, 3), keepdim=True)) / spread
        return ((told - wanted).abs() * covered).sum() / (3 * covered.sum())

    def _cover(self, images: Tensor) -> Tensor:
        """(B, 1, H, W): 1 on the hidden patches, as many in each image."""
        rows, columns = images.shape[2] // SIDE, images.shape[3] // SIDE
        hidden = torch.zeros(len(images), rows * columns)
        order = hidden_order(len(images), rows * columns, self.generator)
        hidden.scatter_(1, order[:, : round(SHARE * rows * columns)], 1.0)
        return F.interpolate(hidden.view(-1, 1, rows, columns), scale_factor=float(SIDE))


class MaskedAutoencoder(nn.Module):
    """MAE on the encoder of a ViT student; the mask decoder is not trained and keeps its random weights."""

    def __init__(self, student: ViTTiny, seed: int) -> None:
        super().__init__()
        self.encoder = student.encoder
        self.narrow = nn.Linear(WIDTH, DECODER_WIDTH)
        self.blank = nn.Parameter(0.02 * torch.randn(1, 1, DECODER_WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, DECODER_WIDTH, GRID, GRID))
        self.blocks = nn.Sequential(*(Block(DECODER_WIDTH, HEADS) for _ in range(DECODER_DEPTH)))
        self.pixels = nn.Sequential(nn.LayerNorm(DECODER_WIDTH), nn.Linear(DECODER_WIDTH, 3 * PATCH**2))
        self.generator = torch.Generator().manual_seed(seed % 2**63)

    def trained(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def finish(self) -> None:
        """Nothing of the student was lent."""

    def loss(self, images: Tensor) -> Tensor:
        """Mean squared error over the hidden patches of (B, 3, H, W), each patch with mean 0, deviation 1."""
        grid = self.encoder.embed(images)
        patches = grid.flatten(2).transpose(1, 2)  # (B, N, D)
        order = hidden_order(len(images), patches.shape[1], self.generator)
        hidden, seen = order.tensor_split([round(VIT_SHARE * patches.shape[1])], 1)
        told = self._told(self.encoder.walk(_rows(patches, seen))[-1], seen, grid.shape[-2:])
        wanted = F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)  # (B, N, 3 * 16 * 16)
        wanted = (wanted - wanted.mean(2, keepdim=True)) / wanted.var(2, keepdim=True).add(FLAT).sqrt()
        return F.mse_loss(_rows(told, hidden), _rows(wanted, hidden))

    def _told(self, encoded: Tensor, seen: Tensor, grid: torch.Size) -> Tensor:
        """The pixels of all patches (B, N, 3 * 16 * 16), from the encoder's tokens of the seen ones."""
        positions = F.interpolate(self.positions, size=grid, mode="bicubic", align_corners=False)
        narrow = self.narrow(encoded)
        blank = self.blank.expand(len(encoded), grid.numel(), -1)
        tokens = blank.scatter(1, seen[:, :, None].expand_as(narrow), narrow)
        told: Tensor = self.pixels(self.blocks(tokens + positions.flatten(2).transpose(1, 2)))
        return told


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens (B, K, D) of (B, N, D) that ``index`` (B, K) names."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
