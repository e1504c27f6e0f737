"""Small private tasks that several tests train: what is trained in them, and made-up patients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderTiny
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import SamVisionConfig

from client.dp.poisson import MicroBatch, micro_batches
from client.dp.tasks import DiffusionTask, PatientCrops, PrivateTask, SegmentationTask
from client.prefix_cache import run_prefix
from common.backbones.base import Backbone
from common.backbones.dino import build_dinov2
from common.backbones.sam import SamBackbone
from common.backbones.sam2 import build as build_sam2
from common.generator import TARGETS, StyleDiffusion
from common.image_space import LatentSpace
from common.teacher import Teacher
from simulations.latent_pretraining import CODEC

SIDE = 64
PATIENTS = [[0], [1, 2], [3, 4, 5], [6]]
DEPTH, CUT = 3, 2


@dataclass(frozen=True)
class Terms:
    sample_rate: float = 1.0
    max_grad_norm: float = 0.1
    noise_std: float = 0.0
    steps: int = 100
    max_images_per_patient: int = 3
    expected_batch: float = 4.0


class TableTask(PrivateTask):
    """The mean square of ``network`` on rows of ``table`` (N, ...)."""

    def __init__(self, network: nn.Module, table: Tensor, patients: list[list[int]] | None = None) -> None:
        super().__init__()
        self.network, self.table = network, table
        self.patients = patients or [[row] for row in range(len(table))]

    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (self.table[rows],)

    def forward(self, *inputs: Tensor) -> Tensor:
        losses: Tensor = self.network(inputs[0]).flatten(1).square().mean(1)
        return losses


def trained_of(task: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}


def every_patient(size: int = 8) -> MicroBatch:
    return next(micro_batches(PATIENTS, size))


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest norm of a row's difference, of the wanted row's norm (absolute where that is zero)."""
    norm = wanted.norm(dim=1)
    return float(((found - wanted).norm(dim=1) / torch.where(norm > 0, norm, 1.0)).max())


def crops(classes: int = 1, side: int = SIDE) -> PatientCrops:
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(7, 3, side, side, generator=draw)
    masks = torch.zeros(7, classes, side, side)
    for row in range(7):  # classes exclude each other
        masks[row, row % classes, 10 : 20 + 3 * row, 8:30] = 1
    return PatientCrops(images, masks, PATIENTS)


def with_lora(network: nn.Module, layers: list[str], train_a: bool = True) -> None:
    """Factors at ``layers``, none of them zero; nothing else takes gradients."""
    network.requires_grad_(False)
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=layers, bias="none")
    inject_adapter_in_model(lora, network, adapter_name="default")
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
                parameter.requires_grad_(train_a or ".lora_B" in name)


def sam(window: int) -> SamBackbone:
    torch.manual_seed(0)
    return SamBackbone(
        SamVisionConfig(
            hidden_size=32, num_hidden_layers=DEPTH, num_attention_heads=2, mlp_dim=64, patch_size=8,
            image_size=SIDE, output_channels=16, window_size=window, global_attn_indexes=[1],
            initializer_range=0.1,
        )
    )  # fmt: skip


def dino() -> Backbone:
    torch.manual_seed(0)
    return build_dinov2(
        {"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "mlp_ratio": 2,
         "image_size": SIDE, "patch_size": 8}
    )  # fmt: skip


def hiera() -> Backbone:
    torch.manual_seed(0)
    trunk = {
        "hidden_size": 16, "num_attention_heads": 1, "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 4, 2], "global_attention_blocks": [3],
        "model_type": "sam2_hiera_det_model",
    }  # fmt: skip
    return build_sam2(
        {"backbone_config": trunk, "backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 32}
    )


def lora_task(encoder: Backbone, last: int | None = None, train_a: bool = True) -> SegmentationTask:
    network = Teacher(encoder, 2).eval()
    roles = [role for role in encoder.LAYERS if role in ("qkv", "q", "v", "k", "out", "mlp")]
    roles = ["qkv", "out", "mlp"] if "qkv" in roles else roles
    with_lora(network, [f"encoder.{name}" for name in encoder.layers(roles, last)], train_a)
    cut = 0 if last is None else len(encoder.blocks) - last
    table = crops(2)
    return SegmentationTask(
        network, table, True, run_prefix(network, table.images, cut) if cut else None, cut
    )


def b_alone_task() -> SegmentationTask:
    """Factor B alone, at a whole encoder and at the decoder's convolutions."""
    network = Teacher(sam(3), 1).eval()
    encoder = [f"encoder.{name}" for name in network.encoder.layers(["qkv", "out"])]
    with_lora(network, [*encoder, "decoder.project", "decoder.squeeze", "decoder.fine.0"], train_a=False)
    return SegmentationTask(network, crops(), False)


def decoder_task(cached: bool = True) -> SegmentationTask:
    """The whole decoder of a teacher whose encoder is frozen."""
    network = Teacher(sam(3), 1).eval().requires_grad_(False)
    network.decoder.requires_grad_(True)
    table, depth = crops(), len(network.encoder.blocks)
    held = run_prefix(network, table.images, depth) if cached else None
    return SegmentationTask(network, table, False, held, depth if cached else 0)


def diffusion_task(draws: int = 1, latent: bool = False) -> DiffusionTask:
    """Factors at the attention and the convolutions of the generator, as a site trains it."""
    torch.manual_seed(0)
    space = LatentSpace(AutoencoderTiny.from_config(CODEC)) if latent else None
    network = StyleDiffusion(space).eval()
    torch.nn.init.normal_(network.unet.conv_out.weight, std=0.1)
    with_lora(network, list(network.layers(TARGETS)))
    return DiffusionTask(network, crops(side=32), seed=3, draws=draws)
