"""What every adapter preset promises: the base class that each preset's test class inherits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.adapter import Adapter
from common.backbones import build_backbone
from common.errors import ArtefactError
from common.recipe import DecoderTraining, TeacherConfig
from common.teacher import Teacher, teacher_slots
from common.tuning.presets import PRESETS, rank_of
from common.tuning.slots import AdapterSlots, sharing_copy

# Four blocks, two of them windowed; big weights, so that an adapter's effect is no rounding error.
SMALL_SAM = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_dim": 32, "output_channels": 8,
    "image_size": 32, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1, 3],
    "initializer_range": 0.3,
}  # fmt: skip


@lru_cache(maxsize=1)
def small_teacher() -> Teacher:
    """Never trained: tests take a `sharing_copy`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Teacher(build_backbone("sam", SMALL_SAM), classes=2).eval()


def image() -> Tensor:
    return torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))


def moved(adapter: Adapter, seed: int, scale: float = 0.1) -> Adapter:
    """``adapter`` after some training: every tensor that a site trains is another."""
    generator = torch.Generator().manual_seed(seed)
    noise = {
        k: scale * torch.randn(t.shape, generator=generator) for k, t in adapter.trained().tensors.items()
    }
    changed = {name: adapter.tensors[name] + part for name, part in noise.items()}
    return replace(adapter, tensors={**adapter.tensors, **changed})


class AdapterContract:
    """Inherited by one class a preset.

    ``elements`` is what a site sends up of the small teacher's encoder; ``decoder`` the training of the
    decoder beside it, where the encoder's part is looked at alone.
    """

    preset: ClassVar[str] = ""
    elements: ClassVar[int] = -1
    decoder: ClassVar[DecoderTraining] = DecoderTraining.frozen

    def settings(self, **changes: object) -> TeacherConfig:
        return replace(TeacherConfig(adapter=self.preset), **{"decoder": self.decoder, **changes})  # type: ignore[arg-type]

    def slots(self, **changes: object) -> AdapterSlots:
        return teacher_slots(sharing_copy(small_teacher()), self.settings(**changes))

    def see(self, slots: AdapterSlots) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = slots.network(image()).logits
        return logits

    @pytest.mark.parametrize("decoder", [DecoderTraining.full, DecoderTraining.lora, DecoderTraining.head])
    def test_it_starts_as_the_network_was(self, decoder: DecoderTraining) -> None:
        with torch.inference_mode():
            before = small_teacher()(image()).logits
        slots = self.slots(decoder=decoder)
        slots.write(slots.initial(3))
        assert torch.allclose(self.see(slots), before, atol=1e-6)

    def test_only_its_own_tensors_take_gradients_and_only_during_a_visit(self) -> None:
        slots = self.slots()
        with slots.visit(moved(slots.initial(3), 1), train=True):
            slots.network(image()).logits.square().sum().backward()
            took = {id(p) for p in slots.network.parameters() if p.grad is not None}
            assert took == {id(p) for p in slots.trainable().values()}
            assert all(p.grad.abs().sum() > 0 for p in slots.trainable().values() if p.grad is not None)
        assert not any(p.requires_grad or p.grad is not None for p in slots.network.parameters())

    def test_a_visit_leaves_nothing_for_the_next_site(self) -> None:
        alone, after = self.slots(), self.slots()
        wanted = moved(alone.initial(3), 2)
        with after.visit(moved(after.initial(5), 9), train=True):
            after.network(image()).logits.square().sum().backward()
            torch.optim.SGD(after.trainable().values(), lr=0.1).step()
        for slots in (alone, after):
            slots.write(wanted)
        assert torch.equal(self.see(alone), self.see(after))
        theirs = after.network.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in alone.network.state_dict().items())

    def test_training_never_touches_the_base(self) -> None:
        base = {name: tensor.clone() for name, tensor in small_teacher().state_dict().items()}
        self.train(self.slots(), steps=2)
        now = small_teacher().state_dict()
        assert all(torch.equal(tensor, now[name]) for name, tensor in base.items())

    def test_what_is_written_is_read_back_to_the_bit(self) -> None:
        slots = self.slots()
        adapter = moved(slots.initial(3), 4)
        slots.write(adapter)
        read = slots.read()
        assert read.digest == adapter.digest
        slots.write(moved(adapter, 5))
        assert read.digest == adapter.digest, "no alias of a live parameter"
        slots.write(read)
        assert slots.read().digest == adapter.digest

    def test_its_digest_changes_with_every_tensor_and_with_preset_rank_and_base(self) -> None:
        adapter = self.slots().initial(3)
        others = [
            replace(adapter, preset="another"),
            replace(adapter, rank=adapter.rank + 1),
            replace(adapter, base_sha256="ab" * 32),
        ]
        for name, tensor in adapter.tensors.items():
            others.append(replace(adapter, tensors={**adapter.tensors, name: tensor + 1}))
        digests = {adapter.digest, *(other.digest for other in others)}
        assert len(digests) == len(adapter.tensors) + 4

    def test_its_elements_are_the_documented_ones(self) -> None:
        slots = self.slots()
        adapter = slots.initial(3)
        assert adapter.trained().elements == self.elements
        assert sum(p.numel() for p in slots.trainable().values()) == self.elements
        assert adapter.rank == rank_of(self.settings()) == slots.plan.rank
        assert bool(adapter.layers()) == (adapter.rank > 0)

    def test_training_lowers_the_loss(self) -> None:
        losses = self.train(self.slots(), steps=12)
        assert losses[-1] < 0.98 * losses[0]

    def train(self, slots: AdapterSlots, steps: int) -> list[float]:
        """Towards other tokens, for which an adapter of the encoder needs no decoder; else other logits."""
        generator = torch.Generator().manual_seed(8)
        encoder = self.decoder is DecoderTraining.frozen
        target = torch.randn((2, 8, 4, 4) if encoder else (2, 2, 32, 32), generator=generator)
        losses = []
        with slots.visit(slots.initial(3), train=True):
            optimiser = torch.optim.AdamW(slots.trainable().values(), lr=1e-2)
            for _ in range(steps):
                output = slots.network(image())
                loss = F.mse_loss(output.tokens if encoder else output.logits, target)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
        return losses

    def test_another_presets_adapter_is_refused_before_anything_changes(self) -> None:
        slots = self.slots()
        slots.write(moved(slots.initial(3), 4))
        before = {name: tensor.clone() for name, tensor in slots.network.state_dict().items()}
        for spoil in self.spoilt():
            with pytest.raises(ArtefactError) as caught:
                slots.write(spoil(slots.initial(3)))
            assert caught.value.exit_code == 12
        now = slots.network.state_dict()
        assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())

    def spoilt(self) -> list[Callable[[Adapter], Adapter]]:
        other = next(name for name in PRESETS if name != self.preset)
        return [
            lambda adapter: replace(adapter, preset=other),
            lambda adapter: replace(adapter, rank=adapter.rank + 1),
            lambda adapter: replace(adapter, base_sha256="ab" * 32),
            lambda adapter: replace(adapter, tensors=dict(list(adapter.tensors.items())[1:])),
            lambda adapter: replace(adapter, tensors={**adapter.tensors, "more": torch.zeros(1)}),
        ]
