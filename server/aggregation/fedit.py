"""FedIT: FedAvg of the two factors, each for itself. The textbook baseline.

With the weights ``p_k`` normalised over the sites that replied, of each layer::

    A = sum p_k A_k        B = sum p_k B_k        (Zhang et al., arXiv 2305.05644, 2023)

Not exact: the mean of products is not the product of means, for ``B A`` holds cross terms ``B_i A_j`` of
different sites. `close_round` reports how far that is from the mean of what the sites trained, and
nothing corrects it. Floats of a layer: r (in + out) up, as many down. One preset and rank for all sites.
Noise on both factors is multiplied: ``(B + N_B)(A + N_A)`` has the product ``N_B N_A`` of two noises.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from server.aggregation.factor_mean import FactorMeanRule, Means


class FedIT(FactorMeanRule):
    name: ClassVar[str] = "fedit"

    def _next_factors(self, layer: str, means: Means) -> tuple[Tensor, Tensor]:
        return means.a, means.b
