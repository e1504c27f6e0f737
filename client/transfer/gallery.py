"""The folder of synthetic images that a site keeps to itself, with where each file comes from."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from client.evaluation import THRESHOLD
from client.painters import PAINTERS, painter_of
from client.prediction import label_image
from client.transfer.sets import TransferSet
from common.adapter import Adapter
from common.canonical import sha256_of
from common.durable import write_atomic
from common.errors import ArtefactError
from common.plan import RunPlan

SYNTHETIC = "synthetic"  # below the site's folder
PROVENANCE = "provenance.json"
GENERATOR_FILE = (
    "generator.safetensors"  # the adapter that painted them, where there is one; stays at the site
)

PROCEDURAL = "procedural shape prior (client.shapes); no patient's mask"
OWN_MASKS = "of this site's labelled patients"
OWN_PIXELS = "yes, of this site's labelled patients: these images never leave, whatever a policy allows"


@dataclass(frozen=True)
class SavedSet:
    """What lies in ``synthetic/``, each file as its provenance says.

    Attributes:
        images: (N, 3, S, S) in [0, 1].
        files: name -> bytes, of images and masks.
        provenance: as it was written.
    """

    images: Tensor
    files: dict[str, bytes]
    provenance: dict[str, Any]


def save_synthetic(images: TransferSet, folder: Path, plan: RunPlan, adapter: Adapter | None = None) -> None:
    """Write the images and their masks as PNG, and their provenance; the files of an earlier run go.

    Args:
        adapter: of the generator, if patients trained one.

    Raises ``DiskFault`` if the disk does not take it.
    """
    clear(folder)
    files = dict(_pictures(images, plan))
    for name, data in files.items():
        write_atomic(folder / name, data, lasting=False)
    provenance = {
        "images": len(images),
        "run_id": plan.run_id,
        "plan_sha256": plan.digest,
        **made_of(plan),
        "generator_adapter_sha256": "" if adapter is None else adapter.digest,
        "files": {name: sha256_of(data) for name, data in sorted(files.items())},
    }
    write_atomic(folder / PROVENANCE, (json.dumps(provenance, indent=2) + "\n").encode())


def made_of(plan: RunPlan) -> dict[str, str]:
    """Whose masks and pixels are in the images of ``plan``, and which network made them, if any."""
    name = painter_of(plan.generator.scope)
    kind = None if name is None else PAINTERS[name]
    own = kind is not None and kind.own_pixels
    found = {
        "scope": str(plan.generator.scope),
        "made_by": "diffusion network" if kind is None else kind.about,
        "masks": OWN_MASKS if own else PROCEDURAL,
        "pixels_of_patients": OWN_PIXELS if own else "",
    }
    return found if kind is not None else found | {"generator_sha256": plan.models[plan.generator.name]}


def read_synthetic(folder: Path, plan: RunPlan) -> SavedSet:
    """The set that the run of ``plan`` left in ``folder``.

    Raises ``ArtefactError``, with every fault, if there is none, it is of another run, or a file was changed,
    added or taken away: whatever is let out must be what the generator made.
    """
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        wanted: Mapping[str, str] = provenance["files"]
        of = str(provenance["plan_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{folder} holds no synthetic images with their provenance: run with a generator first"
        ) from error
    if of != plan.digest:
        raise ArtefactError(f"{folder} is of another run than plan.json: run again")
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != PROVENANCE}
    faults = [f"{name}: not of this run" for name in sorted(set(files) - set(wanted))]
    faults += [f"{name}: missing" for name in sorted(set(wanted) - set(files))]
    shared = sorted(set(files) & set(wanted))
    faults += [f"{name}: changed since" for name in shared if sha256_of(files[name]) != wanted[name]]
    if faults:
        raise ArtefactError(f"{folder} is not as the run left it: run again", faults)
    pictures = [_tensor(data) for name, data in files.items() if not name.endswith("_mask.png")]
    side = plan.data.image_size
    images = torch.stack(pictures) if pictures else torch.zeros(0, 3, side, side)
    return SavedSet(images, files, provenance)


def clear(folder: Path) -> None:
    """Make ``folder``, and remove the files of an earlier run from it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in (".png", ".json", ".html"):
            path.unlink()


def png(image: Tensor) -> bytes:
    """(3, H, W) in [0, 1]."""
    return _encoded((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def _pictures(images: TransferSet, plan: RunPlan) -> Iterator[tuple[str, bytes]]:
    for index, (image, mask) in enumerate(zip(images.images, images.masks, strict=True)):
        yield f"{index:04d}.png", png(image)
        yield f"{index:04d}_mask.png", _encoded(label_image(mask, plan.data, THRESHOLD))


def _encoded(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _tensor(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
