"""Import of every known checkpoint layout: ``python -m simulations.benchmark.imports`` prints a table.

Key maps are those of the real models at their real sizes (meta device, no weights). The output difference is
measured on a small model of the same layout with random weights in a real file, against transformers' own
model; Hugging Face layouts are read by transformers' own loader.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from common.backbones import build_backbone
from common.foundation.catalogue import CATALOGUE, KnownTeacher
from common.foundation.importing import identify, teacher_tensors
from common.foundation.layouts import Layout, encoder_config, layouts
from common.foundation.sources import open_checkpoint
from common.seeding import derive_seed
from common.teacher import HEADS, Teacher

SIDE = 64  # pixels
_VIT = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}
_HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 16,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 4, 2],
    "global_attention_blocks": [3],
}
# The parts around these encoders (prompts, masks, memory) keep their usual sizes.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "sam": ("sam-vit-b", {**_VIT, "mlp_dim": 96, "window_size": 3, "global_attn_indexes": [1, 3]}),
    "sam2": (
        "sam2.1-hiera-tiny",
        {"backbone_config": _HIERA, "backbone_channel_list": [128, 64, 32, 16]},
    ),
    "dinov2": ("dinov2-small", _VIT),
    "dinov2_registers": ("dinov2-registers-small", _VIT),
    "dinov3": ("dinov3-vits16", {**_VIT, "intermediate_size": 96, "num_register_tokens": 4}),
}


@dataclass(frozen=True)
class Row:
    """One layout of one model; ``refused`` are the keys named when one is removed and one renamed."""

    model: str
    layout: str
    keys: int
    mapped: int
    left_out: int
    refused: tuple[str, ...]
    difference: float


def rows() -> Iterator[Row]:
    for entry in CATALOGUE.values():
        for layout in layouts(entry.family, encoder_config(entry.family, entry.config)):
            mapped = len(layout.encoder)
            yield Row(
                entry.name,
                layout.name,
                len(layout.shapes),
                mapped,
                len(layout.shapes) - mapped,
                refused_keys(layout),
                output_difference(entry.family, layout.name),
            )


def refused_keys(layout: Layout) -> tuple[str, ...]:
    """What is told of a checkpoint that lacks one encoder key and has another under a wrong name."""
    removed, renamed = list(layout.encoder)[5], list(layout.encoder)[-5]
    shapes = dict(layout.shapes)
    del shapes[removed]
    shapes[f"{renamed}_renamed"] = shapes.pop(renamed)
    return tuple(layout.faults(shapes))


@lru_cache(maxsize=64)
def output_difference(family: str, layout_name: str) -> float:
    """Largest difference between an imported small encoder's tokens and transformers' own."""
    entry = small_entry(family)
    config = encoder_config(family, entry.config)
    layout = next(item for item in layouts(family, config) if item.name == layout_name)
    generator = torch.Generator().manual_seed(derive_seed(0, "imports", layout_name))
    tensors = {
        key: 0.1 * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0)
        for key, shape in layout.shapes.items()
    }
    image = torch.randn(2, 3, SIDE, SIDE, generator=generator)
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        folder = Path(place)
        if layout_name.startswith("Hugging Face"):
            network = _by_transformers(folder, layout_name.split(",")[0].split()[-1], config, tensors)
            file = folder / "model.safetensors"
        else:
            network = transformers.SamVisionModel(transformers.SamVisionConfig(**config))
            own = {goal.removeprefix("encoder."): tensors[key] for key, goal in layout.encoder.items()}
            network.load_state_dict(own)
            file = folder / "sam.pth"
            torch.save(tensors, file)
        checkpoint = open_checkpoint(str(file), download=False)
        identity = identify(checkpoint, entry)
        assert identity.layout.name == layout_name
        teacher = Teacher(build_backbone(family, identity.config), len(HEADS)).eval()
        teacher.load_state_dict(teacher_tensors(checkpoint, identity))
        tokens = teacher.encoder(image).tokens
        return float((tokens - own_tokens(network.eval(), image)).abs().max())


def small_entry(family: str) -> KnownTeacher:
    name, config = SMALL[family]
    return replace(CATALOGUE[name], config=config, image_size=SIDE)


def _by_transformers(folder: Path, kind: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The checkpoint in ``folder`` as transformers itself reads it."""
    network_class = getattr(transformers, kind)
    settings = network_class.config_class
    if "vision_config" in settings.sub_configs:
        sub_type = "sam2_vision_model" if kind.startswith("Sam2") else "sam_vision_model"
        whole = settings(vision_config={"model_type": sub_type, **config})
    else:
        whole = settings(**config)
    (folder / "config.json").write_text(json.dumps(whole.to_dict()))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    network, report = network_class.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return network


def own_tokens(network: Any, image: Tensor) -> Tensor:
    """What transformers' encoder makes of a square image, as (B, C, h, w)."""
    out = getattr(network, "vision_encoder", network)(image)
    if hasattr(out, "fpn_hidden_states"):
        deepest: Tensor = out.fpn_hidden_states[-1]
        return deepest
    hidden: Tensor = out.last_hidden_state
    if hidden.dim() == 4:
        return hidden
    side = image.shape[-1] // network.config.patch_size
    return hidden[:, -side * side :].transpose(1, 2).reshape(len(image), -1, side, side)


def markdown(found: list[Row]) -> str:
    head = (
        "| model | layout | keys | taken | left out | refused: 1 removed, 1 renamed | largest difference |\n"
        "|---|---|---:|---:|---:|---|---:|"
    )
    lines = [
        f"| {row.model} | {row.layout} | {row.keys} | {row.mapped} | {row.left_out} "
        f"| {len(row.refused)} faults named | {row.difference:.1e} |"
        for row in found
    ]
    return "\n".join([head, *lines])


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, refused keys in full.")
def main(as_json: bool) -> None:
    """Print the table of layouts."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = list(rows())
    click.echo(json.dumps([vars(row) for row in found], indent=2) if as_json else markdown(found))


if __name__ == "__main__":
    main()
