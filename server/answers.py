"""The admitted answers of one round, on the disk until the round is settled.

Whoever compares the sites of a round, or votes on each coordinate of what they sent, needs all of their
answers. On the disk they cost no memory: a tensor is read where it is needed, and forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.adapter import AdapterUpdate
from common.durable import write_atomic
from common.errors import ArtefactError

SMALL_BYTES = 1 << 20  # a file of this size stays open: a round reads each of its tensors several times
MOST_OPEN = 64
SITE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True)
class _Answer:
    """``about`` is the update without its tensors, which lie in ``path``, flat; ``shapes``: what they had."""

    about: AdapterUpdate
    path: Path
    shapes: Mapping[str, torch.Size]


class Answers:
    """One file a site in ``folder``. Only what was added to this object is ever read from there.

    Args:
        watch: called with every whole answer that is read back.
    """

    def __init__(self, folder: Path, watch: Callable[[AdapterUpdate], None] = lambda _: None) -> None:
        self.folder = folder
        self._watch = watch
        self._answers: dict[str, _Answer] = {}
        self._open: dict[str, Any] = {}  # small files that were read from

    def add(self, site: str, update: AdapterUpdate) -> None:
        """Write ``update``, which may be freed afterwards.

        Raises:
            ArtefactError: if the site has answered, if its name cannot name a file, or if the disk is full
                (with what to free). Nothing is added then.
        """
        if site in self._answers:
            raise ArtefactError(f"site {site!r} has already answered in this round")
        if not SITE_NAME.fullmatch(site):
            raise ArtefactError(f"site {site!r} cannot name a file: use letters, digits, '-', '_' and '.'")
        path = self.folder / f"{site}.safetensors"
        tensors = dict(sorted(update.adapter.tensors.items()))
        # Flat, so that a part of one can be read alone.
        flat = {name: tensor.detach().cpu().reshape(-1) for name, tensor in tensors.items()}
        write_atomic(path, save(flat), lasting=False)  # a run that is stopped asks for the answers anew
        about = replace(update, adapter=replace(update.adapter, tensors={}))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._answers[site] = _Answer(about, path, shapes)

    def sites(self) -> list[str]:
        return sorted(self._answers)

    def weight(self, site: str) -> float:
        """What the site declared."""
        return self._of(site).about.weight

    def elements(self, site: str) -> Mapping[str, int]:
        """Name -> number of elements, of each tensor that the site sent."""
        return {name: shape.numel() for name, shape in self._of(site).shapes.items()}

    def part(self, site: str, name: str, start: int, stop: int) -> Tensor:
        """The values ``start`` to ``stop`` of one flattened tensor, and no more than that is read."""
        with self._opened(site) as file:
            part: Tensor = file.get_slice(name)[start:stop]
        return part

    def tensor(self, site: str, name: str) -> Tensor:
        """One tensor, and no more than that is read. Raises ``ArtefactError`` if it is not there."""
        with self._opened(site) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.view(self._of(site).shapes[name])

    def update(self, site: str) -> AdapterUpdate:
        """The whole answer, as it was added."""
        answer = self._of(site)
        with self._opened(site) as file:
            tensors = {name: file.get_tensor(name).view(shape) for name, shape in answer.shapes.items()}
        update = replace(answer.about, adapter=replace(answer.about.adapter, tensors=tensors))
        self._watch(update)
        return update

    def drop(self, site: str) -> None:
        """Remove the site's answer, file and all."""
        self._of(site).path.unlink(missing_ok=True)
        self._open.pop(site, None)
        del self._answers[site]

    def clear(self) -> None:
        for site in self.sites():
            self.drop(site)

    def _of(self, site: str) -> _Answer:
        if site not in self._answers:
            raise ArtefactError(f"site {site!r} has no answer in this round")
        return self._answers[site]

    @contextmanager
    def _opened(self, site: str) -> Iterator[Any]:
        path = self._of(site).path
        try:
            if site in self._open:
                yield self._open[site]
            elif path.stat().st_size <= SMALL_BYTES and len(self._open) < MOST_OPEN:
                self._open[site] = safe_open(path, framework="pt")
                yield self._open[site]
            else:
                with safe_open(path, framework="pt") as file:
                    yield file
        except (OSError, SafetensorError) as error:
            raise ArtefactError(
                f"cannot read the answer of site {site!r} in {path} ({error}): run again with --resume"
            ) from error
