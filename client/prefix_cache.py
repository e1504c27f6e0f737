"""The frozen part of the teacher below a site's adapters, run once for a fixed set of views.

Where an adapter trains only the last blocks of the encoder, the blocks below make the same of an image in
every epoch and every round. A site that trains on fixed views of its crops can keep what they make. The
cost: what is augmented is fixed with the views. The gain: a step runs only the blocks that learn.

What is kept is made of patients' images. It lies in the site's own folder, is readable by the site's user
alone, is deleted at the end of the student stage, and is handed to nothing but the training loop.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from client.losses import segmentation_loss
from client.patients import Patient
from client.sampling import PatchSampler
from common.adapter import Adapter, tensors_digest
from common.backbones.base import Backbone, Progress
from common.canonical import sha256_of
from common.errors import ConfigError
from common.plan import RunPlan
from common.seeding import derive_rng, derive_seed
from common.teacher import Teacher

FOLDER = "cache"  # below the site's folder
ENCODER = "encoder."  # how the names of the encoder's tensors begin in an adapter


@dataclass(frozen=True)
class Views:
    """Augmented crops that stay the same all through a run: (N, 3, S, S) and (N, C, S, S) float32."""

    images: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)


def draw_views(patients: Sequence[Patient], size: int, count: int, seed: int) -> Views:
    """``count`` views of the labelled patients, who take turns: each has as many as any other, or one more.

    The same for the same patients, ``size``, ``count`` and ``seed``.
    """
    labelled = [patient for patient in patients if patient.labelled]
    turns = derive_rng(seed, "turns").permutation(len(labelled)).tolist()
    images, masks = [], []
    for turn, place in enumerate(turns):
        mine = len(range(turn, count, len(turns)))
        if mine:
            sampler = PatchSampler(
                [labelled[place]], size, derive_seed(seed, "patient", place), labelled=True
            )
            batch = sampler.batch(mine)
            images.append(batch.images)
            masks.append(batch.masks)
    return Views(torch.cat(images), torch.cat(masks))


def frozen_blocks(encoder: Backbone, trained: Iterable[str]) -> int:
    """How many of the first blocks no tensor of ``trained`` (an adapter's names) lies in.

    0 if one lies in the encoder but in none of its blocks: it may come before them.
    """
    block = re.compile(rf"{re.escape(ENCODER + encoder.blocks_name)}\.(\d+)\.")
    lowest = len(encoder.blocks)
    for name in trained:
        if name.startswith(ENCODER):
            found = block.match(name)
            lowest = min(lowest, int(found[1]) if found else 0)
    return lowest


@torch.no_grad()
def run_prefix(network: Teacher, images: Tensor, cut: int) -> Progress:
    """``images`` (N, 3, S, S), not normalised, through the first ``cut`` blocks: contiguous float32.

    One image at a time, so that an image's values do not depend on its company in a batch to the last bit.
    """
    whole: Progress | None = None
    for index in range(len(images)):
        part = network.encoder.embed(network.prepared(images[index : index + 1]))
        part = network.encoder.run(part, 0, cut)
        if whole is None:
            whole = Progress(
                _room(part.hidden, images), tuple(_room(tap, images) for tap in part.taps), part.shared
            )
        whole.hidden[index] = part.hidden[0]
        for kept, tap in zip(whole.taps, part.taps, strict=True):
            kept[index] = tap[0]
    assert whole is not None
    return whole


def _room(part: Tensor, images: Tensor) -> Tensor:
    return torch.empty(len(images), *part.shape[1:], dtype=torch.float32)


def rows_of(prefix: Progress, chosen: Tensor) -> Progress:
    """The images ``chosen`` (indices), in that order."""
    return Progress(prefix.hidden[chosen], tuple(tap[chosen] for tap in prefix.taps), prefix.shared)


def prefix_key(network: Teacher, adapter: Adapter, images: Tensor, cut: int) -> str:
    """Digest of all that decides `run_prefix`: base, preprocessing, cut, image size, pixels, folded factors.

    Folded factors count where they lie below the cut; ``adapter`` is the one in ``network``.
    """
    folded = {name: tensor for name, tensor in adapter.tensors.items() if ".folded_" in name}
    below = {name: folded[name] for name in folded if frozen_blocks(network.encoder, [name]) < cut}
    return sha256_of(
        {
            "base": adapter.base_sha256,
            "preprocessing": [network.get_buffer(name).flatten().tolist() for name in ("mean", "std")],
            "layout": sha256_of(sorted(network.encoder.state_dict())),  # fused or split: not the same bits
            "cut": cut,
            "image_size": list(images.shape[-2:]),
            "images": tensors_digest({"images": images}),
            "folded": tensors_digest(below),
        }
    )


_held: dict[Path, tuple[str, Progress]] = {}  # a site's cache folder -> the key and what it names


class PrefixCache:
    """One prefix of one site, in this process and in ``folder / "cache"``.

    Guarantees: what `fetch` returns was made for this very key; a file that is damaged, or was made for
    another, is made anew and not used. Folder and file are open to the site's own user alone. `forget`
    leaves nothing behind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = (folder / FOLDER).absolute()

    def fetch(self, key: str, make: Callable[[], Progress]) -> Progress:
        """The prefix of ``key``: of this process, else from the file (memory-mapped), else from ``make``."""
        held = _held.get(self.folder)
        if held is None or held[0] != key:
            path = self.folder / f"prefix-{key}.safetensors"
            prefix = _read(path, key)
            if prefix is None:
                prefix = make()
                with suppress(OSError):  # a full disk costs the next process time; this one goes on
                    self._write(path, key, prefix)
                    prefix = _read(path, key) or prefix
            held = _held[self.folder] = (key, prefix)
        return held[1]

    def forget(self) -> None:
        """Delete the file and let go of the memory. Raises ``OSError`` if the file cannot be deleted."""
        _held.pop(self.folder, None)
        if self.folder.is_symlink():
            self.folder.unlink()
        elif self.folder.exists():
            shutil.rmtree(self.folder)

    def _write(self, path: Path, key: str, prefix: Progress) -> None:
        self.forget()  # a site keeps one prefix: one of another key will not be asked for again
        self.folder.mkdir(parents=True, mode=0o700)
        part, tensors = path.with_suffix(".part"), _named(prefix)
        try:
            save_file(tensors, part, metadata={"key": key, "digest": tensors_digest(tensors)})
        except SafetensorError as error:  # its way of saying that the disk is full
            shutil.rmtree(self.folder)
            raise OSError(str(error)) from error
        part.chmod(0o600)
        part.replace(path)


def _named(prefix: Progress) -> dict[str, Tensor]:
    tensors = {"hidden": prefix.hidden}
    tensors |= {f"taps.{index}": tap for index, tap in enumerate(prefix.taps)}
    tensors |= {f"shared.{index}": table.contiguous() for index, table in enumerate(prefix.shared)}
    return tensors


def _read(path: Path, key: str) -> Progress | None:
    """What the file holds, mapped into memory, if it is whole and was made for ``key``."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return None
    if (metadata.get("key"), metadata.get("digest")) != (key, tensors_digest(tensors)):
        return None
    taps, shared = (
        tuple(tensors[f"{kind}.{index}"] for index in range(sum(name.startswith(kind) for name in tensors)))
        for kind in ("taps", "shared")
    )
    return Progress(tensors["hidden"], taps, shared)


def shuffled(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices below ``count`` without end: every epoch names each index once, in a new order."""
    rng = derive_rng(seed, "epochs")
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.from_numpy(rng.permutation(count))])
        yield waiting[:batch]
        waiting = waiting[batch:]


def training_views(
    network: Teacher,
    adapter: Adapter,
    patients: Sequence[Patient],
    plan: RunPlan,
    visit: tuple[int, Path | None],
) -> Callable[[], Tensor]:
    """The loss of the next batch of a site's fixed views, for `client.fitting.fit`.

    Args:
        network: with ``adapter`` written into it, its trained tensors taking gradients.
        visit: (seed of the order of the batches, the site's folder). Without a folder nothing is kept.

    Guarantee: the same training, bit for bit, as if the prefix ran in every step. The views are those of
    the plan's seed, the same in all rounds.

    Raises:
        ConfigError: the adapter trains something in or before the first block.
    """
    seed, folder = visit
    encoder, settings = network.encoder, plan.teacher
    cut, depth = _cut(network, adapter, settings.cached_views), len(encoder.blocks)
    size, drawing = plan.data.image_size, derive_seed(plan.seed, "views")
    views = draw_views(patients, size, settings.cached_views, drawing)
    prefix = kept_prefix(network, adapter, views.images, cut, folder)
    batches = shuffled(len(views), settings.batch_size, seed)

    def loss_at() -> Tensor:
        chosen = next(batches)
        features = encoder.finish(encoder.run(rows_of(prefix, chosen), cut, depth))
        logits = network.decode(features, views.images[chosen]).logits
        return segmentation_loss(logits, views.masks[chosen], plan.data.exclusive)

    return loss_at


def _cut(network: Teacher, adapter: Adapter, views: int) -> int:
    """How many blocks stay as they are; a ``ConfigError`` for none."""
    cut = frozen_blocks(network.encoder, adapter.trained().tensors)
    if not cut:
        raise ConfigError(
            f"teacher.cached_views={views} needs blocks that are not trained, and adapter {adapter.preset} "
            "trains the first: choose a preset of the last blocks, or 0"
        )
    return cut


def kept_prefix(
    network: Teacher, adapter: Adapter, images: Tensor, cut: int, folder: Path | None
) -> Progress:
    """What the first ``cut`` blocks make of ``images``: kept in ``folder``, a site's, if there is one."""
    if folder is None:
        return run_prefix(network, images, cut)
    key = prefix_key(network, adapter, images, cut)
    return PrefixCache(folder).fetch(key, lambda: run_prefix(network, images, cut))
