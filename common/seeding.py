"""One seed for a run; every other seed is derived from it by name.

A derived seed depends on nothing but its own path of names, so that the order in which sites are
visited, the engine, and a resume cannot change it.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(run_seed: int, *path: str | int) -> int:
    """A 63-bit seed for ``path`` (for example ``"site-3", "adapt", 2``) under ``run_seed``."""
    name = "\x1f".join([str(run_seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def derive_rng(run_seed: int, *path: str | int) -> np.random.Generator:
    """A numpy generator for ``path``. Torch generators take ``derive_seed`` itself."""
    return np.random.default_rng(derive_seed(run_seed, *path))
