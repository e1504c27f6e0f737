"""The wire's precision: how far values move, what is exact, and what a malformed packing gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.adapter import Adapter
from common.errors import ArtefactError
from common.precision import BLOCK, PART, SCALE, carried, norm, pack, pack_down, sendable, unpack
from common.recipe import WireDtype

EVERY = list(WireDtype)


def adapter(*sizes: int, scale: float = 1.0, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"t{size}": scale * torch.randn(size, generator=generator) for size in sizes}
    tensors["l.lora_A"] = scale * torch.randn(3, 100, generator=generator)
    return Adapter(tensors, "ab", 3, "base")


def largest_gap(left: Adapter, right: Adapter) -> float:
    assert left.tensors.keys() == right.tensors.keys()
    return max(float((left.tensors[name] - right.tensors[name]).abs().max()) for name in left.tensors)


def test_float32_is_exact() -> None:
    given_adapter = adapter(5, 300)
    assert unpack(pack(given_adapter, WireDtype.float32)).digest == given_adapter.digest


@given(st.integers(1, 3 * BLOCK), st.floats(1e-20, 1e20))
def test_int8_moves_a_value_by_at_most_half_a_level_of_its_block(size: int, scale: float) -> None:
    original = adapter(size, scale=scale)
    found = unpack(pack(original, WireDtype.int8))
    for name, tensor in original.tensors.items():
        for block, again in zip(
            tensor.flatten().split(BLOCK), found.tensors[name].flatten().split(BLOCK), strict=True
        ):
            level = float(block.abs().max()) / 127
            assert float((block - again).abs().max()) <= level / 2 * (1 + 1e-5)


def test_bfloat16_moves_a_value_by_at_most_one_part_in_256() -> None:
    original = adapter(4000)
    found = unpack(pack(original, WireDtype.bfloat16))
    for name, tensor in original.tensors.items():
        assert bool(((found.tensors[name] - tensor).abs() <= tensor.abs() * 2.0**-8).all())


@pytest.mark.parametrize("dtype", EVERY)
def test_the_tensors_carried_are_those_that_unpacking_gives(dtype: WireDtype) -> None:
    """Only an int8 tensor has a scale; beside another, a tensor of that name is one of its own."""
    packed = pack(adapter(7), dtype)
    beside = replace(packed, tensors={**packed.tensors, f"x{SCALE}": torch.ones(1)})
    assert carried(beside) == set(unpack(beside).tensors) == {"t7", "l.lora_A", f"x{SCALE}"}


@pytest.mark.parametrize("dtype", EVERY)
def test_zeros_stay_zeros(dtype: WireDtype) -> None:
    zero = replace(adapter(7), tensors={"a": torch.zeros(7), "b": torch.zeros(2, 300)})
    assert largest_gap(unpack(pack(zero, dtype)), zero) == 0.0


@pytest.mark.parametrize("dtype", EVERY)
def test_of_sendable_values_nothing_is_lost_on_the_way_down(dtype: WireDtype) -> None:
    given_adapter = adapter(500)
    rounded = replace(
        given_adapter, tensors={k: sendable(v, dtype) for k, v in given_adapter.tensors.items()}
    )
    assert unpack(pack_down(rounded, dtype)).digest == rounded.digest
    assert all(tensor.dtype != torch.int8 for tensor in pack_down(rounded, dtype).tensors.values())


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1.0), ("bfloat16", 0.5), ("int8", 0.2540)])
def test_bytes_are_those_of_the_dtype(dtype: str, share: float) -> None:
    large = adapter(100 * BLOCK)
    packed = pack(large, WireDtype(dtype)).tensors.values()
    whole = sum(tensor.nbytes for tensor in large.tensors.values())
    assert sum(tensor.nbytes for tensor in packed) / whole == pytest.approx(share, abs=2e-4)


@pytest.mark.parametrize("dtype", EVERY)
def test_what_is_not_finite_stays_so(dtype: WireDtype) -> None:
    """Or the checks behind it would see numbers where there were none."""
    for bad in (float("nan"), float("inf")):
        spoilt = replace(adapter(7), tensors={"a": torch.tensor([1.0, bad, 2.0])})
        packed = pack(spoilt, dtype)
        assert not all(bool(torch.isfinite(tensor).all()) for tensor in packed.tensors.values())


@pytest.mark.parametrize("dtype", EVERY)
def test_the_norm_is_that_of_what_is_carried(dtype: WireDtype) -> None:
    packed = pack(adapter(5, 700, 3 * PART + 17), dtype)
    whole = torch.cat([tensor.double().flatten() for tensor in unpack(packed).tensors.values()])
    assert norm(packed) == pytest.approx(float(whole.norm()), rel=1e-6)


def test_scales_must_fit_their_tensor() -> None:
    packed = pack(adapter(300), WireDtype.int8)
    for scale in (None, torch.ones(1), torch.ones(2, dtype=torch.float64), torch.ones(2, 1)):
        tensors = {**packed.tensors, "t300.scale": scale}
        if scale is None:
            del tensors["t300.scale"]
        with pytest.raises(ArtefactError, match="scales"):
            unpack(replace(packed, tensors=tensors))


def test_a_tensor_that_only_looks_like_scales_is_kept() -> None:
    layer_norm = replace(adapter(7), tensors={"norm.scale": torch.ones(3), "norm": torch.ones(2)})
    for dtype in (WireDtype.float32, WireDtype.bfloat16):
        assert unpack(pack(layer_norm, dtype)).digest == layer_norm.digest
