"""Where noise and the draw of patients come from: an AES-256 keystream in counter mode.

The key is the operating system's and lives in this process alone, so nobody can repeat the noise or know who
was drawn; the guarantee is computational, resting on AES (Balcer and Vadhan 2018 say why that is enough).
Normals are sums of four Box-Muller draws in float64, halved: a single draw's low bits give away what was
added to (Mironov 2012; Holohan and Braghin 2021, whose cure this is).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from math import pi, prod

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from common.errors import PolicyRefusal

KEY_BYTES = 32
DRAWS = 4  # normals summed for one
CHUNK = 8192  # normals made at a time: the buffers stay in the processor's cache
UNIT = 2.0**-53


class Randomness:
    """Uniform and normal numbers from one keystream. Use `SystemRandomness` or `SeededRandomness`."""

    secure: bool = False  # whether a privacy guarantee may rest on it

    def __init__(self, key: bytes) -> None:
        # Under a fresh key a counter from zero never repeats; 2^128 blocks are not reached.
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._zeros = bytes(8 * DRAWS * CHUNK)
        self._bytes = bytearray(len(self._zeros) + 16)

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """``count`` numbers, uniform on the multiples of 2^-53 in [0, 1)."""
        found = np.empty(count)
        for start in range(0, count, DRAWS * CHUNK):
            part = found[start : start + DRAWS * CHUNK]
            np.multiply(self._integers(len(part)), UNIT, out=part)
        return found

    def normals(self, shape: Sequence[int]) -> Tensor:
        """Independent N(0, 1), float64, of ``shape``."""
        found = torch.empty(prod(shape), dtype=torch.float64)
        for start in range(0, len(found), CHUNK):
            part = found[start : start + CHUNK]
            part.copy_(self._normals(len(part)))
        return found.view(*shape)

    def laplaces(self, count: int) -> NDArray[np.float64]:
        """``count`` draws of scale 1, each the difference of two exponentials; none is beyond 36.8.

        A draw's low bits give away what it is added to: round it first, and add to whole numbers.
        """
        waits = -np.log(self.uniforms(2 * count) + UNIT)  # of (0, 1]: never log 0
        return np.asarray(waits[:count] - waits[count:])

    def _normals(self, count: int) -> Tensor:
        """Box and Muller 1958: 2 ``count`` pairs; a number's four draws are of four different pairs."""
        drawn = torch.from_numpy(self._integers(DRAWS * count).astype(np.float64))
        radius = ((drawn[: 2 * count] + 1) * UNIT).log_().mul_(-2).sqrt_()  # of (0, 1]: never log 0
        angle = drawn[2 * count :] * (2 * pi * UNIT)
        across = (angle.cos() * radius).view(2, count).sum(0)
        down = (angle.sin() * radius).view(2, count).sum(0)
        return (across + down.roll(1)) / 2

    def _integers(self, count: int) -> NDArray[np.int64]:
        """Integers of 53 bits; at most as many as the buffer holds. Valid until the next call."""
        length = 8 * count
        self._stream.update_into(memoryview(self._zeros)[:length], self._bytes)
        words = np.frombuffer(self._bytes, np.uint64, count) >> np.uint64(11)
        return words.view(np.int64)  # the values are below 2^53; int64 becomes float64 faster


class SystemRandomness(Randomness):
    """Keyed by the operating system; it takes no seed.

    Guarantee: no two sources share a value, in one process, in two, or after a fork.
    """

    secure = True

    def __init__(self) -> None:
        self._process = os.getpid()
        super().__init__(os.urandom(KEY_BYTES))

    def _integers(self, count: int) -> NDArray[np.int64]:
        if os.getpid() != self._process:  # a forked child would go on in its parent's keystream
            SystemRandomness.__init__(self)
        return super()._integers(count)

    def __reduce__(self) -> str:
        raise TypeError("a keystream is neither copied nor stored: two copies would draw the same noise")


class SeededRandomness(Randomness):
    """The same numbers for the same seed: for simulations and tests, and no guarantee for anybody."""

    def __init__(self, seed: int) -> None:
        super().__init__(hashlib.sha256(f"wardround simulation {seed}".encode()).digest())


def open_randomness(simulated: bool, seed: int | None = None) -> Randomness:
    """The source of a site's mechanism.

    A simulation may name a seed; what it then makes is marked as no guarantee (`Randomness.secure`).

    Raises:
        PolicyRefusal: a seed where real patients are: who knows it can take the noise off again.
    """
    if seed is None:
        return SystemRandomness()
    if not simulated:
        raise PolicyRefusal(
            "a seed was given for the noise of a site: leave it out, the system's randomness is used",
            field="randomness",
        )
    return SeededRandomness(seed)
