"""What teachers said of a site's transfer images, on the site's own disk: each is asked once in a run.

What is kept is made of patients' images. It lies in the site's folder, is readable by the site's user alone,
is deleted at the end of the student stage, and is handed to nothing but the making of transfer sets.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from client.transfer.labelling import MIRRORED, Outputs
from client.transfer.sets import TransferSet
from common.adapter import Adapter, tensors_digest
from common.canonical import canonical_json
from common.plan import RunPlan
from common.probability import background, excludes, probabilities
from common.recipe import TeacherCache

FOLDER = "teacher_outputs"  # below the site's folder
STEPS = 255  # of a probability that is kept in one byte
FAINTEST = 0.5 / STEPS  # what a kept 0 stands for: half a step, as nobody knows where below it lay

Rows = dict[str, Tensor]


def packed(said: Outputs, form: TeacherCache, exclusive: bool) -> Rows:
    """``said`` as it is kept; ``exclusive`` as in `common.probability`."""
    if form == TeacherCache.float16:
        return {name: tensor.half() for name, tensor in vars(said).items()}
    steps = (probabilities(said.logits.float(), exclusive) * STEPS).round().to(torch.uint8)
    return {"steps": steps, "tokens": said.tokens.bfloat16(), "features": said.features.bfloat16()}


def unpacked(rows: Rows, exclusive: bool) -> Outputs:
    """The inverse of `packed`, up to rounding; of a kept 0 or 255 the logits of half a step, so finite."""
    if "logits" in rows:
        return Outputs(**rows)
    share = rows["steps"].float() / STEPS
    bounded = share.clamp(FAINTEST, 1 - FAINTEST)
    if excludes(share, exclusive):
        logits = bounded.log() - background(share).clamp(FAINTEST, 1 - FAINTEST).log()
    else:
        logits = bounded.logit()
    return Outputs(logits.half(), rows["tokens"], rows["features"])


def row_keys(images: TransferSet, adapter: Adapter, plan: RunPlan) -> list[str]:
    """Of each image: a digest of its pixels, the teacher with ``adapter``, the view, and the form."""
    about = canonical_json(
        {
            "teacher": adapter.digest,
            "heads": [item.like for item in plan.data.classes],
            "exclusive": plan.data.exclusive,
            "mirrored": MIRRORED,
            "form": str(plan.student.teacher_cache),
        }
    )
    seeds = [0] * len(images) if images.views is None else images.views.tolist()
    keys = []
    for image, seed in zip(images.images, seeds, strict=True):
        digest = hashlib.sha256(f"{about}|{seed}|{tuple(image.shape)}|".encode())
        digest.update(image.contiguous().numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys


class OutputCache:
    """The outputs of one site's teachers, row by row, in ``folder / "teacher_outputs"``.

    Guarantees: what `fetch` returns for a key was made for this key, and is the same whether the disk takes
    it or not; a file that is damaged is not used; folder and files are open to the site's own user alone;
    `forget` leaves nothing behind.
    """

    def __init__(self, folder: Path, form: TeacherCache, exclusive: bool) -> None:
        self.folder = folder / FOLDER
        self.form, self.exclusive = form, exclusive
        self._shards: list[Rows] = []
        self._places: dict[str, tuple[int, int]] = {}  # key -> shard, row
        for path in sorted(self.folder.glob("*.safetensors")) if not self.folder.is_symlink() else []:
            self._hold(_read(path))

    def fetch(self, keys: Sequence[str], make: Callable[[Tensor], Outputs]) -> Outputs:
        """The outputs of ``keys``, in their order; ``make`` is asked, once, for missing indices."""
        missing = {key: index for index, key in enumerate(keys) if key not in self._places}
        if missing:
            said = make(torch.tensor(list(missing.values())))
            rows = packed(said, self.form, self.exclusive)
            kept = None
            with suppress(OSError):  # a full disk costs the next process time; this one goes on
                kept = self._write(list(missing), rows)
            self._hold(kept or (list(missing), rows))
        return unpacked(self._rows([self._places[key] for key in keys]), self.exclusive)

    def _hold(self, found: tuple[list[str], Rows] | None) -> None:
        if found is not None:
            keys, rows = found
            self._places |= {key: (len(self._shards), row) for row, key in enumerate(keys)}
            self._shards.append(rows)

    def _rows(self, places: Sequence[tuple[int, int]]) -> Rows:
        """Those of one whole shard as they are, mapped into memory; others are copied together."""
        shard = self._shards[places[0][0]]
        if [row for _, row in places] == list(range(len(next(iter(shard.values()))))) and (
            {number for number, _ in places} == {places[0][0]}
        ):
            return shard
        return {
            name: torch.stack([self._shards[number][name][row] for number, row in places]) for name in shard
        }

    def forget(self) -> None:
        """Delete the files and let go of the memory. Raises ``OSError`` if a file cannot be deleted."""
        self._shards, self._places = [], {}
        remove(self.folder.parent)

    def _write(self, keys: list[str], rows: Rows) -> tuple[list[str], Rows] | None:
        if self.folder.is_symlink():
            self.folder.unlink()  # whatever it leads to is not the site's to fill
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = len(list(self.folder.glob("*.safetensors")))
        path = self.folder / f"{number:04d}.safetensors"
        part = path.with_suffix(".part")
        about = {"keys": json.dumps(keys), "digest": tensors_digest(rows)}
        try:
            save_file({name: tensor.contiguous() for name, tensor in rows.items()}, part, metadata=about)
        except SafetensorError as error:  # its way of saying that the disk is full
            part.unlink(missing_ok=True)
            raise OSError(str(error)) from error
        part.chmod(0o600)
        part.replace(path)
        return _read(path)


def remove(folder: Path) -> None:
    """Delete what is kept below the site's ``folder``. Raises ``OSError`` if it cannot be deleted."""
    kept = folder / FOLDER
    if kept.is_symlink():
        kept.unlink()
    elif kept.exists():
        shutil.rmtree(kept)


def _read(path: Path) -> tuple[list[str], Rows] | None:
    """Keys and rows of a file, mapped into memory, if it is whole."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        keys = json.loads(about.get("keys", "[]"))
    except (OSError, SafetensorError, ValueError):
        return None
    return (keys, rows) if rows and about.get("digest") == tensors_digest(rows) else None
