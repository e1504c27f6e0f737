"""dual: exact_split between the sites, and an adapter of its own at each, which stays at home.

On the server and on the wire this is `exact_split`, to the byte::

    G <- G + sum_k p_k (B'_k A'_k - B_k A_k)

What is more happens at the sites, after the last round (`client.personal`): each folds all of ``G`` into its
frozen base, and trains fresh factors and the decoder on its own patients. That personal adapter labels the
site's own images for its student, and is measured beside the shared teacher; nothing of it is sent.

After FedDPA-F (Yang et al., NeurIPS 2024), whose sites keep a second adapter and train it when the
federation is over. Left out of it: the weighing of the two adapters for each image; here the personal one
stands on top of the global one.

Exact, as `exact_split` is, at any mix of ranks and presets. Floats of a layer: r_k (in + out) up;
n (in + out) down for n components, at most ``max_rank``. Noise on both factors is multiplied in ``G`` as
there; the personal adapter is trained without noise, because it never leaves.
"""

from __future__ import annotations

from typing import ClassVar

from server.aggregation.exact_split import ExactSplit


class Dual(ExactSplit):
    name: ClassVar[str] = "dual"
