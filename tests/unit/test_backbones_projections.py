"""A fused query-key-value layer taken apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.backbones.projections import SplitQkv, split_fused
from common.errors import ConfigError


@pytest.mark.parametrize("bias", [True, False])
def test_the_parts_are_the_rows_of_the_fused_layer(bias: bool) -> None:
    torch.manual_seed(0)
    fused = nn.Linear(5, 12, bias=bias)
    split = SplitQkv(fused)
    hidden = torch.randn(2, 3, 5)
    assert torch.allclose(split(hidden), fused(hidden), atol=1e-6)
    assert list(split.state_dict()) == [
        f"{part}.{kind}" for part in "qkv" for kind in (["weight", "bias"] if bias else ["weight"])
    ]
    assert all(type(part) is nn.Linear for part in split.children())
    assert torch.equal(split.get_parameter("k.weight"), fused.weight[4:8])


def test_the_parts_share_no_memory_with_the_fused_layer() -> None:
    fused = nn.Linear(4, 6)
    split = SplitQkv(fused)
    before = split.get_parameter("q.weight").clone()
    with torch.no_grad():
        fused.weight.zero_()
    assert torch.equal(split.get_parameter("q.weight"), before)


def test_what_was_frozen_stays_frozen() -> None:
    for wanted in (True, False):
        split = SplitQkv(nn.Linear(4, 6).requires_grad_(wanted))
        assert {parameter.requires_grad for parameter in split.parameters()} == {wanted}


def test_splitting_twice_is_splitting_once() -> None:
    holder = SimpleNamespace(qkv=nn.Linear(4, 6))
    split_fused([holder])
    once = holder.qkv
    split_fused([holder])
    assert holder.qkv is once


def test_a_layer_with_an_adapter_is_refused_and_nothing_changes() -> None:
    first, second = SimpleNamespace(qkv=nn.Linear(4, 6)), SimpleNamespace(qkv=nn.Sequential(nn.Linear(4, 6)))
    with pytest.raises(ConfigError, match="before adapters"):
        split_fused([first, second])
    assert type(first.qkv) is nn.Linear
