"""Each adapter preset against the contract, and what is its own.

The documented elements are of a SAM of 4 blocks, 16 channels and an MLP of 32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from common import checkpoints, public_factors
from common.decoder import MaskDecoder
from common.errors import ConfigError
from common.recipe import DecoderTraining, TeacherConfig
from common.teacher import teacher_info, teacher_slots
from common.tuning.bottleneck import Bottleneck
from common.tuning.presets import PRESETS, Kind, mix_faults, rank_of, settings_faults, site_teacher
from common.tuning.slots import sharing_copy
from tests.contract.adapter import AdapterContract, moved, small_teacher

BLOCK = "encoder.vision_encoder.layers"


class TestLite(AdapterContract):
    preset = "lite"
    elements = 4 * 2 * 4 * (16 + 16)  # blocks, layers, rank, in + out

    def test_it_sits_on_query_and_value_of_every_block(self) -> None:
        layers = self.slots().plan.layers
        assert layers == tuple(f"{BLOCK}.{block}.attn.qkv.{part}" for block in range(4) for part in "qv")


class TestBase(AdapterContract):
    preset = "base"
    elements = 4 * 2 * 8 * (16 + 16)

    def test_a_rank_of_its_own_beats_the_presets(self) -> None:
        assert self.slots(rank=3).initial(0).trained().elements == 4 * 2 * 3 * (16 + 16)


class TestWide(AdapterContract):
    preset = "wide"
    elements = 4 * 4 * 16 * (16 + 16)


class TestDp(AdapterContract):
    preset = "dp"
    elements = 4 * 2 * 4 * 16  # B alone; the encoder has fewer blocks than the last six

    def test_a_is_fixed_and_never_leaves(self) -> None:
        slots = self.slots()
        start = slots.initial(3)
        self.train(slots, steps=2)
        trained = slots.read()
        factors_a = [name for name in start.tensors if name.endswith(".lora_A")]
        assert factors_a
        assert all(torch.equal(trained.tensors[name], start.tensors[name]) for name in factors_a)
        assert not set(factors_a) & set(trained.trained().tensors)


class TestFused(AdapterContract):
    preset = "fused"
    elements = 4 * 8 * ((16 + 48) + (16 + 16))

    def test_it_leaves_the_fused_layer_whole(self) -> None:
        assert f"{BLOCK}.0.attn.qkv" in self.slots().plan.layers


class TestLast3(AdapterContract):
    preset = "last3"
    elements = 3 * 2 * 8 * (16 + 16)

    def test_it_leaves_the_first_block_alone(self) -> None:
        assert not [name for name in self.slots().plan.layers if name.startswith(f"{BLOCK}.0.")]


class TestBottleneck(AdapterContract):
    preset = "bottleneck"
    elements = 4 * 2 * ((16 * 4 + 4) + (4 * 16 + 16))

    def test_one_follows_attention_and_one_stands_beside_the_mlp(self) -> None:
        slots = self.slots()
        found = [name for name, module in slots.network.named_modules() if isinstance(module, Bottleneck)]
        assert found[:2] == [f"{BLOCK}.0.attn.proj.bottleneck", f"{BLOCK}.0.mlp.bottleneck"]
        with torch.no_grad():
            for module in slots.network.modules():
                if isinstance(module, Bottleneck):
                    module.up.bias.fill_(0.5)
            attention = slots.network.get_submodule(f"{BLOCK}.0.attn.proj")
            seen = torch.rand(2, 16)
            assert torch.allclose(attention(seen), attention.get_submodule("inner")(seen) + 0.5, atol=1e-6)

    def test_its_first_weights_are_the_same_in_every_process(self) -> None:
        assert self.slots().initial(0).digest == self.slots().initial(1).digest


class TestNorm(AdapterContract):
    preset = "norm"
    # Patch embedding; in a block two norms, qkv, output, MLP; two norms of the neck.
    elements = 16 + 4 * (2 * 32 + 48 + 16 + 32 + 16) + 2 * 16


class TestDecoder(AdapterContract):
    preset = "decoder"
    decoder = DecoderTraining.full
    elements = sum(p.numel() for p in small_teacher().decoder.parameters())

    def test_nothing_of_the_encoder_is_trained(self) -> None:
        assert all(name.startswith("decoder.") for name in self.slots().trainable())

    def test_with_a_frozen_decoder_nothing_is_left_to_train(self) -> None:
        with pytest.raises(ConfigError) as caught:
            self.slots(decoder=DecoderTraining.frozen)
        assert "nothing is trained" in caught.value.faults[0]


class TestFull(AdapterContract):
    preset = "full"
    elements = sum(p.numel() for p in small_teacher().encoder.parameters())


def test_every_preset_has_a_contract_class() -> None:
    assert sorted(each.preset for each in AdapterContract.__subclasses__()) == sorted(PRESETS)


class TestDecoderTraining:
    counts: ClassVar[dict[DecoderTraining, int]] = {}

    def trained(self, decoder: DecoderTraining) -> set[str]:
        config = TeacherConfig(adapter="lite", decoder=decoder)
        return set(teacher_slots(sharing_copy(small_teacher()), config).trainable())

    def test_full_trains_every_weight_and_frozen_none(self) -> None:
        names = {f"decoder.{name}" for name, _ in small_teacher().decoder.named_parameters()}
        encoder = self.trained(DecoderTraining.frozen)
        assert not [name for name in encoder if name.startswith("decoder.")]
        assert self.trained(DecoderTraining.full) == encoder | names

    def test_head_trains_the_last_layer(self) -> None:
        assert self.trained(DecoderTraining.head) - self.trained(DecoderTraining.frozen) == {
            "decoder.head.weight", "decoder.head.bias",
        }  # fmt: skip

    def test_shallow_trains_all_but_what_takes_the_encoders_maps_in(self) -> None:
        full, shallow = self.trained(DecoderTraining.full), self.trained(DecoderTraining.shallow)
        left = {name.split(".")[1] for name in full - shallow}
        assert shallow < full
        assert left == {"project", "laterals", "joins"}

    def test_lora_trains_factors_of_the_convolutions_and_the_head_as_it_is(self) -> None:
        found = self.trained(DecoderTraining.lora) - self.trained(DecoderTraining.frozen)
        assert {"decoder.head.weight", "decoder.head.bias", "decoder.fine.0.lora_A"} <= found
        assert not [name for name in found if "lora_" not in name and ".head." not in name]
        assert not [name for name in found if "branches" in name], "a depthwise kernel has no low rank"

    def test_factors_of_the_decoder_have_a_rank_beside_a_preset_without_one(self) -> None:
        config = TeacherConfig(adapter="norm", decoder=DecoderTraining.lora)
        adapter = teacher_slots(sharing_copy(small_teacher()), config).initial(0)
        assert adapter.rank == rank_of(config) == 8
        assert all(name.startswith("decoder.") for name in adapter.layers())


def test_the_first_rows_of_a_are_the_same_in_every_preset_and_rank() -> None:
    lite, wide = (
        teacher_slots(sharing_copy(small_teacher()), TeacherConfig(adapter=name)).initial(7)
        for name in ("lite", "wide")
    )
    for layer in lite.layers():
        if layer.startswith("encoder."):
            a = wide.tensors[f"{layer}.lora_A"]
            assert torch.equal(lite.tensors[f"{layer}.lora_A"], a[:4])


def test_folded_factors_reach_layers_of_every_preset() -> None:
    """What other presets trained is added to the base of one that does not train it."""
    wide = teacher_slots(sharing_copy(small_teacher()), TeacherConfig(adapter="wide"))
    lite = teacher_slots(sharing_copy(small_teacher()), TeacherConfig(adapter="lite"))
    theirs, start = moved(wide.initial(3), 1), lite.initial(3)
    tensors = {name: tensor for name, tensor in theirs.tensors.items() if name.startswith("decoder.")}
    tensors |= {name: start.tensors[name] for name in start.tensors if name.startswith("encoder.")}
    for layer in theirs.layers():
        for half in "AB":
            tensors[f"{layer}.folded_{half}"] = theirs.tensors[f"{layer}.lora_{half}"]
    wide.write(theirs)
    lite.write(replace(start, tensors=tensors))
    contract = TestLite()
    assert torch.allclose(contract.see(lite), contract.see(wide), atol=1e-5)


def test_a_decoder_learns_from_channels_last_taps_of_a_frozen_encoder() -> None:
    """torch 2.13 ends the process in GroupNorm's backward where such an input takes no gradient."""
    decoder = MaskDecoder(8, (16,), 2)
    tap = torch.rand(1, 6, 6, 16).permute(0, 3, 1, 2)
    logits, _ = decoder(torch.rand(1, 8, 3, 3), [tap], torch.rand(1, 3, 24, 24))
    logits.sum().backward()
    assert decoder.laterals[0][0].weight.grad is not None  # type: ignore[index]


def test_a_rank_for_what_has_no_factors_is_a_fault() -> None:
    assert settings_faults(TeacherConfig(adapter="norm", rank=4)) == [
        "adapter norm has no factors, so it has no rank"
    ]
    assert not settings_faults(TeacherConfig(adapter="norm", rank=4, decoder=DecoderTraining.lora))


def test_a_sites_word_beats_the_recipes() -> None:
    recipe = TeacherConfig(adapter="base", rank=6)
    assert rank_of(site_teacher(recipe, None, None)) == 6
    assert rank_of(site_teacher(recipe, "lite", None)) == 6
    assert rank_of(site_teacher(recipe, "lite", 2)) == 2
    assert rank_of(site_teacher(replace(recipe, rank=None), "lite", None)) == 4


@pytest.mark.parametrize("first", PRESETS)
@pytest.mark.parametrize("second", PRESETS)
def test_factors_mix_where_they_see_query_key_and_value_alike(first: str, second: str) -> None:
    chosen = {"a": (second, 4)}
    mixable = first == second or (
        {PRESETS[first].kind, PRESETS[second].kind} == {Kind.lora} and "fused" not in (first, second)
    )
    assert bool(mix_faults((first, 8), chosen, "exact_split")) == (not mixable)
    assert mix_faults((first, 8), chosen, "flora") == mix_faults((first, 8), chosen, "exact_split")
    assert bool(mix_faults((first, 8), chosen, "flexlora")) == (first != second)
    assert mix_faults((first, 8), chosen, "fedit"), "FedIT has no mean of two ranks"
    assert not mix_faults((first, 4), {"a": (first, 4)}, "fedit")


def test_the_card_counts_what_the_built_network_has() -> None:
    card = teacher_info("ward-sam-tiny")
    assert set(card["presets"]) == set(PRESETS)
    blocks, width = card["encoder"]["config"]["num_hidden_layers"], card["encoder"]["config"]["hidden_size"]
    assert card["presets"]["base"]["elements"] == blocks * 2 * 8 * 2 * width
    assert card["presets"]["base"]["targets"] == ["attn.qkv.q", "attn.qkv.v"]
    assert card["presets"]["wide"]["rank"] == 16
    assert card["presets"]["decoder"]["elements"] == 0
    assert card["decoder"]["full"] > card["decoder"]["lora"] > card["decoder"]["head"] > 0


def test_the_card_leaves_out_presets_that_the_encoder_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    card = dict(checkpoints.card("ward-sam-tiny")) | {"encoder": {"family": "dinov2", "config": config}}
    monkeypatch.setattr(checkpoints, "card", lambda _: card)
    monkeypatch.setattr(public_factors, "missing", lambda _: True)
    assert set(teacher_info("ward-sam-tiny")["presets"]) == set(PRESETS) - {"fused"}
