"""SAM's attention with decomposed relative positions (MViTv2, Li et al. 2022, eq. 4) on fused kernels.

The score of query i and key j is ``scale q_i.k_j + q_i.R_h[row_i - row_j] + q_i.R_w[col_i - col_j]``.
Written out, the last two terms are a table of tokens x tokens for every head. Two ways to add them:

- `masked`: the table is an additive mask. Least arithmetic, but it is there, and in training so are its
  softmax and its gradient.
- `folded`: the terms become further entries of query and key. With ``q' = [scale q, q R_h, q R_w]`` and
  ``k' = [k, onehot(row), onehot(col)]`` the score is ``q'.k'``, so that no tensor of tokens x tokens
  elements exists, forward or backward.

Guarantee: both equal transformers' eager ``SamVisionAttention`` within 1e-5 in float32, gradients too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.sam.modeling_sam import SamVisionAttention

# Tokens from which positions are folded. CPU time folded / masked, heads of 64, one thread (forward;
# forward and backward): 196 tokens 1.2; 1.1, 576 tokens 1.6; 1.2, 1024 tokens 0.8; 0.8, 2304 tokens 1.0; 1.0,
# 4096 tokens 1.2; 1.2. Memory is what folding is for, and below 1024 tokens the table is small.
FOLD_FROM = 1024
LANES = 8  # torch's memory-efficient CUDA kernel takes head widths that are multiples of this

# The wide copies exist for so many heads at a time. At 4096 tokens and 12 heads of 64, forward and backward,
# all at once peak at 0.19 of eager's memory, groups of 3 at 0.16, of 1 at 0.15, for the same CPU time.
HEADS_AT_ONCE = 2

# Tokens from which the wide copies of one head at a time are made again in the backward pass instead of kept:
# at 4096 tokens 0.15 of eager's memory or less instead of 0.16, for a sixth more CPU time.
RECOMPUTE_FROM = 4096

Parts = tuple[Tensor, Tensor, Tensor]  # query, key, value
Tables = tuple[Tensor, Tensor]


class RelativeAttention(nn.Module):
    """Takes over a ``SamVisionAttention``: its parameters, under their names.

    Dropout of attention weights is left out, as in transformers' own SDPA variant: SAM was trained without.

    Attributes:
        fold_from: `FOLD_FROM`, unless a test or a measurement sets another.
    """

    qkv: nn.Module
    proj: nn.Module
    rel_pos_h: nn.Parameter
    rel_pos_w: nn.Parameter
    fold_from: int = FOLD_FROM

    def __init__(self, old: SamVisionAttention) -> None:
        super().__init__()
        self.heads: int = old.num_attention_heads
        self.scale: float = old.scale
        self.relative: bool = old.use_rel_pos
        self.qkv, self.proj = old.qkv, old.proj
        if self.relative:
            self.rel_pos_h, self.rel_pos_w = old.rel_pos_h, old.rel_pos_w

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """(B, h, w, C) -> the same shape, and None where transformers has the attention weights."""
        batch, height, width, _ = hidden_states.shape
        joined = self.qkv(hidden_states).reshape(batch, height * width, 3, self.heads, -1)
        query, key, value = joined.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, d)
        if self.relative:
            tables = relative_table(self.rel_pos_h, height), relative_table(self.rel_pos_w, width)
            attend = folded if height * width >= self.fold_from else masked
            seen = attend((query, key, value), tables, self.scale)
        else:
            seen = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.proj(seen.transpose(1, 2).reshape(batch, height, width, -1)), None


def relative_table(rel_pos: Tensor, size: int) -> Tensor:
    """Vectors by relative position (L, d) -> (query, key, d) along an axis of ``size`` positions."""
    if len(rel_pos) != 2 * size - 1:
        rel_pos = F.interpolate(rel_pos.T[None], size=2 * size - 1, mode="linear")[0].T
    steps = torch.arange(size, device=rel_pos.device)
    return rel_pos[steps[:, None] - steps[None, :] + size - 1]


def masked(parts: Parts, tables: Tables, scale: float) -> Tensor:
    """Query, key and value (B, heads, T, d) -> (B, heads, T, d), with a mask of T x T a head."""
    query, key, value = parts
    by_row, by_column = _position_terms(query, tables)
    mask = (by_row[..., :, None] + by_column[..., None, :]).flatten(-2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def folded(parts: Parts, tables: Tables, scale: float) -> Tensor:
    """Query, key and value (B, heads, T, d) -> (B, heads, T, d), with heads of d + h + w entries instead."""
    places = _places(len(tables[0]), len(tables[1])).to(parts[1])
    again = parts[0].requires_grad and parts[0].shape[2] >= RECOMPUTE_FROM
    groups = zip(*(torch.split(part, 1 if again else HEADS_AT_ONCE, dim=1) for part in parts), strict=True)
    if again:
        return torch.cat(
            [checkpoint(_fold, group, tables, places, scale, use_reentrant=False) for group in groups], 1
        )
    return torch.cat([_fold(group, tables, places, scale) for group in groups], 1)


def _fold(parts: Parts, tables: Tables, places: Tensor, scale: float) -> Tensor:
    query, key, value = parts
    height, width = len(tables[0]), len(tables[1])
    # Value gets the same width: with another one torch leaves its fused kernel for one that builds T x T.
    spare = -(query.shape[-1] + height + width) % LANES
    wide = F.pad(torch.cat([query * scale, *_position_terms(query, tables)], -1), (0, spare))
    places = F.pad(places, (0, spare)).expand(*key.shape[:-1], -1)
    seen = F.scaled_dot_product_attention(
        wide, torch.cat([key, places], -1), F.pad(value, (0, height + width + spare)), scale=1.0
    )
    return seen[..., : value.shape[-1]]


def _position_terms(query: Tensor, tables: Tables) -> Tables:
    """What each query (B, heads, T, d) adds for a key's row (B, heads, T, h) and column (B, heads, T, w)."""
    height, width = len(tables[0]), len(tables[1])
    grid = query.reshape(*query.shape[:2], height, width, -1)
    by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, tables[0].to(query))
    by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, tables[1].to(query))
    return by_row.flatten(2, 3), by_column.flatten(2, 3)


def _places(height: int, width: int) -> Tensor:
    """(T, h + w): each token's row and column, one-hot."""
    rows = torch.eye(height).repeat_interleave(width, 0)
    return torch.cat([rows, torch.eye(width).repeat(height, 1)], -1)
