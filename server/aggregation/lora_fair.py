"""LoRA-FAIR: the means of the factors, with B corrected towards the mean of the products.

With the weights ``p_k`` normalised over the sites that replied, of each layer::

    A = sum p_k A_k        B = sum p_k B_k + D        M = sum p_k B_k A_k

    D = argmin ||(sum p_k B_k + D) A - M||^2 + lambda ||D||^2
      = (M - sum p_k B_k A) A^T (A A^T + lambda I)^-1                     lambda = 0.01

After LoRA-FAIR (Bian et al., ICCV 2025), which measures the first term by the cosine and solves it in
steps; squared distance has this closed form. Not exact: ``B A`` has rank r and M may have more, and only B
moves. Never further from M than `fedit`, which is ``D = 0``. Floats of a layer: r (in + out) up, as many
down. One preset and rank for all sites. Noise on both factors is multiplied, as in `fedit`, and D passes
on the products of two noises that are in M.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from server.aggregation.factor_mean import FactorMeanRule, Means

WEIGHT_OF_CORRECTION = 0.01  # lambda; the paper's


class LoraFair(FactorMeanRule):
    name: ClassVar[str] = "lora_fair"

    def _next_factors(self, layer: str, means: Means) -> tuple[Tensor, Tensor]:
        a = means.a
        gram = a @ a.T + WEIGHT_OF_CORRECTION * torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
        missing = means.product - means.b @ a
        # The matrix is symmetric: solved for the transpose, so that no inverse is formed.
        return a, means.b + torch.linalg.solve(gram, a @ missing.T).T
