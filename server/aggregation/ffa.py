"""FFA: A never changes, B is averaged.

With the weights ``p_k`` normalised over the sites that replied, of each layer::

    A = A_0        B = sum p_k B_k        (FFA-LoRA: Sun et al., ICLR 2024)

Exact: ``sum p_k (B_k A_0) = (sum p_k B_k) A_0``. The price is in what can be learnt: every change has the
rows of the first ``A_0``, so the result hangs on its seed; `fedsvd` lets A turn. Floats of a layer: r out
up, r (in + out) down. One preset and rank for all sites, and one that trains B alone. Noise on B stays
linear: ``(B + N) A_0 = B A_0 + N A_0``.

It is the rule of private runs with factors, whose ``A_0`` is public and fixed by its digest. As B alone
moves, it is treated as a dense tensor is: it takes the server's momentum, and what the wire's rounding cuts
off it goes down with a later round. The residual is that of the rounding, with momentum as without.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from server.aggregation.factor_mean import FactorMeanRule, Means


class FFA(FactorMeanRule):
    name: ClassVar[str] = "ffa"

    def _means(self, layer: str, total: float) -> Means:
        means = super()._means(layer, total)
        name = f"{layer}.lora_B"
        b = self._moved(name, self._factor[name], means.b)
        if not self.momentum.factor:
            return replace(means, b=b)
        return replace(means, b=b, product=b @ self._factor[f"{layer}.lora_A"].double())

    def _to_keep(self, name: str, half: Tensor) -> Tensor:
        return half

    def _next_factors(self, layer: str, means: Means) -> tuple[Tensor, Tensor]:
        # Not the mean of A: a mean of equals may differ from them in the last bit.
        return self._factor[f"{layer}.lora_A"], means.b
