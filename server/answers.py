"""The admitted answers of one round, on the disk until the round is settled.

Whoever compares the sites of a round, or votes on each coordinate of what they sent, needs all of their
answers. On the disk they cost no memory: a tensor is read where it is needed, and forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.adapter import AdapterUpdate
from common.durable import write_atomic
from common.errors import ArtefactError

SITE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True)
class _Answer:
    """``about`` is the update without its tensors, which lie in ``path``; ``elements``: name -> how many."""

    about: AdapterUpdate
    path: Path
    elements: Mapping[str, int]


class Answers:
    """One file a site in ``folder``. Only what was added to this object is ever read from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._answers: dict[str, _Answer] = {}

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
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in update.adapter.tensors.items()
        }
        write_atomic(path, save(tensors))
        about = replace(update, adapter=replace(update.adapter, tensors={}))
        elements = {name: tensor.numel() for name, tensor in sorted(tensors.items())}
        self._answers[site] = _Answer(about, path, elements)

    def sites(self) -> list[str]:
        return sorted(self._answers)

    def weight(self, site: str) -> float:
        """What the site declared."""
        return self._of(site).about.weight

    def elements(self, site: str) -> Mapping[str, int]:
        """Name -> number of elements, of each tensor that the site sent."""
        return self._of(site).elements

    def tensor(self, site: str, name: str) -> Tensor:
        """One tensor, and no more than that is read. Raises ``ArtefactError`` if it is not there."""
        return self._read(site, [name])[name]

    def update(self, site: str) -> AdapterUpdate:
        """The whole answer, as it was added."""
        answer = self._of(site)
        tensors = self._read(site, answer.elements)
        return replace(answer.about, adapter=replace(answer.about.adapter, tensors=tensors))

    def drop(self, site: str) -> None:
        """Remove the site's answer, file and all."""
        self._of(site).path.unlink(missing_ok=True)
        del self._answers[site]

    def clear(self) -> None:
        for site in self.sites():
            self.drop(site)

    def _of(self, site: str) -> _Answer:
        if site not in self._answers:
            raise ArtefactError(f"site {site!r} has no answer in this round")
        return self._answers[site]

    def _read(self, site: str, names: Iterable[str]) -> dict[str, Tensor]:
        path = self._of(site).path
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise ArtefactError(
                f"cannot read the answer of site {site!r} in {path} ({error}): run again with --resume"
            ) from error
