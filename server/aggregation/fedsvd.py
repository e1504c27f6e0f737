"""FedSVD: sites train B; the server turns A to the singular directions of what came of it.

With the weights ``p_k`` normalised over the sites that replied, of each layer::

    U S V^T = svd(sum p_k B_k A)        A <- V^T        B <- U S        (FedSVD, arXiv 2505.12805, 2025)

Exact: A is the same at all sites, so the mean of ``B_k A`` is ``(sum p_k B_k) A``, whose rank is at most
r, and the new factors have that product. The rows of the new A are orthonormal, so the gradient of B is
no longer than that of the weight itself: clipping bites less. Where ``sum p_k B_k A`` has fewer than r
components, A keeps directions of the old A, made orthonormal to the new ones, and B is zero there. The
first A is that of the initial adapter, which is not orthonormal.

The decomposition is taken through the factors (a QR of B, then a small SVD); the dense product is not
needed for it. Floats of a layer: r out up, r (in + out) down. One preset and rank for all sites, and one
that trains B alone. Noise on B stays linear, ``(B + N) A = B A + N A``, and the decomposition costs no
privacy: it sees only what was sent up.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from server.aggregation.components import signs
from server.aggregation.factor_mean import FactorMeanRule, Means


class FedSVD(FactorMeanRule):
    name: ClassVar[str] = "fedsvd"

    def _next_factors(self, layer: str, means: Means) -> tuple[Tensor, Tensor]:
        return turned(self._factor[f"{layer}.lora_A"].double(), means.b)


def turned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product as ``b`` (out, r) times ``a`` (r, in), the rows of the first orthonormal.

    Returns:
        A (r, in) and B (out, r). Rows of A beyond ``in``, which could not be orthogonal, are zero.
    """
    rank = a.shape[0]
    basis, triangle = torch.linalg.qr(b)
    u, s, vt = torch.linalg.svd(triangle @ a, full_matrices=False)
    u = basis @ u
    present = int((s > torch.finfo(s.dtype).eps * max(b.shape[0], a.shape[1]) * s[0]).sum())
    sign = signs(u[:, :present])
    left, rows = u[:, :present] * (s[:present] * sign), sign[:, None] * vt[:present]
    # Householder's QR: orthonormal even where the old rows lie in the span of the new ones.
    frame = torch.linalg.qr(torch.cat([rows, a]).T)[0].T[:rank]
    full = torch.cat([rows, frame[present:]])
    return pad(full, (0, 0, 0, rank - full.shape[0])), pad(left, (0, rank - present))
