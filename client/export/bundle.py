"""A MONAI bundle: configuration, weights and the little code around them, run by ``monai.bundle run``.

The layout is that of MONAI's bundle specification 0.3. The network is TorchScript, so that the bundle needs
no installation of ours; the same parameters lie beside it as ``model.pt``.
"""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from client.export.probing import Fidelity
from client.export.torchscript import export_torchscript
from client.students import LoadedStudent, StudentCard
from common.recipe import EvaluationConfig

SCRIPTS = {
    "client.pixels": "pixels",
    "common.probability": "probability",
    "client.export.bundled": "segmenting",
}
LICENCE = "Apache-2.0"
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)


def export_bundle(student: LoadedStudent, folder: Path) -> Fidelity:
    """Write the bundle into ``folder``, which is made. Raises `ArtefactError` as `export_torchscript`."""
    for part in ("configs", "models", "docs", "scripts"):
        (folder / part).mkdir(parents=True)
    fidelity = export_torchscript(student, folder / "models" / "model.ts")
    torch.save(student.module.state_dict(), folder / "models" / "model.pt")
    _write_json(folder / "configs" / "metadata.json", _metadata(student.card))
    _write_json(folder / "configs" / "inference.json", _inference(student.card))
    _write_scripts(folder / "scripts")
    (folder / "docs" / "README.md").write_text(_readme(student.card), encoding="utf-8")
    (folder / "LICENSE").write_text(_licence(), encoding="utf-8")
    return fidelity


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")


def _write_scripts(folder: Path) -> None:
    """Copies of our modules, which name each other by their place in the bundle."""
    (folder / "__init__.py").write_text('"""Code of this bundle."""\n', encoding="utf-8")
    for module, name in SCRIPTS.items():
        source = inspect.getsource(import_module(module))
        for other, place in SCRIPTS.items():
            source = source.replace(f"from {other} import", f"from scripts.{place} import")
        (folder / f"{name}.py").write_text(source, encoding="utf-8")


def _metadata(card: StudentCard) -> dict[str, Any]:
    tile, classes = card.image_size, len(card.classes)
    shape = {"type": "image", "num_channels": 3, "spatial_shape": [tile, tile], "dtype": "float32"}
    found = {"0": "background"} | {str(item.label): item.name for item in card.classes}
    names = {str(number): item.name for number, item in enumerate(card.classes)}
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by wardround {version('wardround')}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"pillow": version("pillow"), "scipy": version("scipy")},
        "optional_packages_version": {},
        "name": f"{card.name} ({card.model})",
        "task": "segmentation of " + ", ".join(item.name for item in card.classes),
        "description": "A student that a hospital took home from federated distillation; see model-card.md.",
        "authors": "the hospital that exported it",
        "copyright": "the hospital that exported it",
        "intended_use": "Research; no medical device. No privacy guarantee covers it: see model-card.md.",
        "wardround": {"run_id": card.run_id, "weights_sha256": card.sha256, "labels": found},
        "network_data_format": {
            "inputs": {
                "image": shape
                | {
                    "format": "magnitude", "modality": "n/a", "value_range": [0, 1],
                    "is_patch_data": True, "channel_def": {"0": "red", "1": "green", "2": "blue"},
                }
            },
            "outputs": {
                "pred": shape
                | {
                    "format": "logits", "num_channels": classes, "value_range": [],
                    "is_patch_data": True, "channel_def": names,
                }
            },
        },
    }  # fmt: skip


def _inference(card: StudentCard) -> dict[str, Any]:
    """`segmenting` prepares, cuts, blends and decides as Wardround does."""
    settings = {
        "_target_": "scripts.segmenting.Settings",
        "image_size": card.image_size,
        "longest_side": card.longest_side,
        "find_field": card.field_of_view,
        "exclusive": card.exclusive,
        "values": [item.values for item in card.classes],
        "labels": [item.label for item in card.classes],
        "overlap": EvaluationConfig().overlap,
        "threshold": 0.5,
    }
    return {
        "imports": ["$import sys"],
        "bundle_root": ".",
        "image_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cpu')",
        "scripts_path": "$sys.path.insert(0, @bundle_root)",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device).eval()",
        "settings": settings,
        "initialize": ["$@scripts_path"],
        "segmenting": {
            "_target_": "scripts.segmenting.run",
            "images": "@image_dir",
            "masks": "@output_dir",
            "network": "@network_def",
            "settings": "@settings",
        },
        "run": ["$@segmenting"],
    }


def _readme(card: StudentCard) -> str:
    labels = "\n".join(f"- {item.label}: {item.name}" for item in card.classes)
    tile = card.image_size
    return f"""# {card.name} ({card.model})

A segmentation student of {card.params:,} parameters. `model-card.md` says what it was trained on, how good it
is, and that no privacy guarantee covers it.

In this folder, with MONAI, Fire, Pillow and SciPy installed:

    python -m monai.bundle run --config_file configs/inference.json --image_dir images --output_dir masks

Every picture (PNG, JPEG, TIFF) of `image_dir` gives an 8-bit PNG of labels of its own size:

- 0: background
{labels}

`models/model.ts` is the network in TorchScript: tiles (B, 3, {tile}, {tile}) in [0, 1] to logits.
`models/model.pt` has its parameters under the same names. `scripts/` prepares an image and blends the tiles.
Never run a bundle's configuration from a source that you do not trust: it may hold any code.
"""


def _licence() -> str:
    return (
        f"The code in scripts/ and configs/ is part of Wardround ({LICENCE}, "
        "https://www.apache.org/licenses/LICENSE-2.0).\n"
        "The weights in models/ belong to the hospital that trained them: they may be used on its terms.\n"
    )
