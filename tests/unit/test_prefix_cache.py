"""The frozen prefix: it changes no bit of the training, is never stale, and leaves nothing behind."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import SamVisionConfig

import client.prefix_cache as prefix_cache
from client.deadline import Deadline
from client.fitting import Schedule, fit
from client.losses import segmentation_loss
from client.patients import Patient, Sample, Split
from client.prefix_cache import (
    PrefixCache,
    draw_views,
    frozen_blocks,
    prefix_key,
    rows_of,
    run_prefix,
    shuffled,
    training_views,
)
from common.adapter import Adapter
from common.backbones.base import Backbone, Progress
from common.backbones.sam import SamBackbone
from common.errors import ConfigError
from common.plan import RunPlan
from common.teacher import Preprocessing, Teacher
from tests.architecture.sources import imports_of, modules, name_of

FOREVER = Deadline(1e9)
BLOCK = "encoder.vision_encoder.layers"
DEPTH, CUT, VIEWS, BATCH = 4, 3, 6, 4


def small_teacher(preprocessing: Preprocessing | None = None) -> Teacher:
    torch.manual_seed(3)
    config = SamVisionConfig(
        hidden_size=32, num_hidden_layers=DEPTH, num_attention_heads=2, mlp_dim=64, patch_size=8,
        image_size=64, output_channels=16, window_size=3, global_attn_indexes=[1, 3], initializer_range=0.1,
    )  # fmt: skip
    encoder = SamBackbone(config)
    teacher = (
        Teacher(encoder, 1) if preprocessing is None else Teacher(encoder, 1, preprocessing=preprocessing)
    )
    return teacher.requires_grad_(False)


def adapter_of(tensors: dict[str, Tensor]) -> Adapter:
    return Adapter(tensors, "base", 2, "last3")


@pytest.fixture
def teacher() -> Teacher:
    return small_teacher()


def trained(teacher: Teacher) -> dict[str, torch.nn.Parameter]:
    """The last block's projections and the decoder, taking gradients."""
    found = {
        name: parameter
        for name, parameter in teacher.named_parameters()
        if name.startswith(("decoder.", f"{BLOCK}.{CUT}.attn.qkv"))
    }
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def adapter_in(teacher: Teacher) -> Adapter:
    return adapter_of({name: tensor.detach().clone() for name, tensor in trained(teacher).items()})


@pytest.fixture
def plan(smoke_plan: RunPlan) -> RunPlan:
    settings = replace(smoke_plan.teacher, cached_views=VIEWS, batch_size=BATCH, steps=5)
    return replace(smoke_plan, teacher=settings)


def fitted(teacher: Teacher, loss_at: Callable[[], Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    live = trained(teacher)
    losses = fit(list(live.values()), Schedule(1e-2, 5), loss_at, FOREVER, "testing")
    return losses, {name: tensor.detach().clone() for name, tensor in live.items()}


# -- the training ------------------------------------------------------------------------------------


def test_cached_training_equals_uncached_training_on_the_same_views_bit_for_bit(
    plan: RunPlan, patients: list[Patient], tmp_path: Path
) -> None:
    """Uncached: the blocks below run again, and anew, for every image of every step."""
    results = []
    for kept in (None, tmp_path, tmp_path, "uncached"):
        teacher = small_teacher()
        if kept == "uncached":
            loss_at = uncached(teacher, patients, plan)
        else:
            loss_at = training_views(teacher, adapter_in(teacher), patients, plan, (7, kept))
        prefix_cache._held.clear()  # the second time in the folder, the file is what there is
        results.append(fitted(teacher, loss_at))
    for losses, tensors in results[:-1]:
        assert losses == results[-1][0]
        assert all(torch.equal(tensors[name], tensor) for name, tensor in results[-1][1].items())
    untouched = trained(small_teacher())
    assert not any(torch.equal(tensor, untouched[name]) for name, tensor in results[0][1].items())


def uncached(teacher: Teacher, patients: list[Patient], plan: RunPlan) -> Callable[[], Tensor]:
    views = draw_views(patients, 64, VIEWS, prefix_cache.derive_seed(plan.seed, "views"))
    batches, encoder = shuffled(VIEWS, BATCH, 7), teacher.encoder

    def loss_at() -> Tensor:
        chosen = next(batches)
        deep = encoder.run(run_prefix(teacher, views.images[chosen], CUT), CUT, DEPTH)
        logits = teacher.decode(encoder.finish(deep), views.images[chosen]).logits
        return segmentation_loss(logits, views.masks[chosen], False)

    return loss_at


def test_the_prefix_and_the_rest_are_the_whole_network(teacher: Teacher) -> None:
    images = torch.rand(3, 3, 64, 64)
    whole = teacher(images)
    for cut in range(DEPTH + 1):
        chosen = torch.tensor([2, 0])
        deep = teacher.encoder.run(rows_of(run_prefix(teacher, images, cut), chosen), cut, DEPTH)
        output = teacher.decode(teacher.encoder.finish(deep), images[chosen])
        assert torch.allclose(output.logits, whole.logits[chosen], atol=1e-5)
        assert torch.allclose(output.tokens, whole.tokens[chosen], atol=1e-5)


def test_an_images_prefix_does_not_depend_on_its_company(teacher: Teacher) -> None:
    images = torch.rand(5, 3, 64, 64)
    together, alone = run_prefix(teacher, images, CUT), run_prefix(teacher, images[3:4], CUT)
    assert torch.equal(together.hidden[3:4], alone.hidden)
    assert len(together.taps) == 3
    assert all(torch.equal(ours[3:4], tap) for ours, tap in zip(together.taps, alone.taps, strict=True))


def test_no_prefix_block_runs_in_a_cached_epoch(
    plan: RunPlan, patients: list[Patient], teacher: Teacher, tmp_path: Path
) -> None:
    adapter = adapter_in(teacher)
    before = Backbone.blocks_run
    loss_at = training_views(teacher, adapter, patients, plan, (0, tmp_path))
    assert Backbone.blocks_run - before == VIEWS * CUT  # the cache is built
    for seed in (1, 2):
        before = Backbone.blocks_run
        fitted(teacher, loss_at)
        assert Backbone.blocks_run - before == 5 * (DEPTH - CUT)  # steps x trained blocks, and no other
        before = Backbone.blocks_run
        loss_at = training_views(teacher, adapter, patients, plan, (seed, tmp_path))  # the next round
        assert Backbone.blocks_run == before


def test_an_adapter_that_leaves_no_prefix_frozen_is_a_config_error(
    plan: RunPlan, patients: list[Patient], teacher: Teacher
) -> None:
    for name in (f"{BLOCK}.0.attn.qkv.lora_A", "encoder.vision_encoder.patch_embed.projection.bias"):
        with pytest.raises(ConfigError, match="cached_views=6"):
            training_views(teacher, adapter_of({name: torch.zeros(1)}), patients, plan, (0, None))


def test_the_frozen_blocks_are_those_below_the_lowest_trained(teacher: Teacher) -> None:
    encoder = teacher.encoder
    assert frozen_blocks(encoder, ["decoder.head.weight"]) == DEPTH
    assert frozen_blocks(encoder, [f"{BLOCK}.3.mlp.lin1.lora_A", f"{BLOCK}.2.attn.qkv.lora_B"]) == 2
    assert frozen_blocks(encoder, ["encoder.vision_encoder.neck.conv1.weight"]) == 0
    assert frozen_blocks(encoder, [f"{BLOCK}.10.attn.qkv.lora_A"]) == DEPTH  # a number, not its first digit


# -- the views ---------------------------------------------------------------------------------------


def coloured(count: int) -> list[Patient]:
    """Labelled patients that are told apart by the share of their two first channels."""
    found = []
    for number in range(count):
        image = torch.full((3, 64, 64), 0.5)
        image[0] = 0.2 + 0.1 * number
        mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
        mask[:, 10:20, 10:20] = 1
        found.append(
            Patient(str(number), Split.train, (Sample(image, mask, torch.ones(64, 64, dtype=torch.bool)),))
        )
    return found


def test_patients_take_turns_in_the_views() -> None:
    everyone = coloured(5)
    unlabelled = Patient("none", Split.train, (replace(everyone[0].samples[0], mask=None),))
    for count, expected in ((12, [2, 2, 2, 3, 3]), (5, [1] * 5), (3, [1] * 3)):
        views = draw_views([unlabelled, *everyone], 32, count, 0)
        assert views.images.shape == (count, 3, 32, 32)
        assert views.masks.shape == (count, 1, 32, 32)
        shares = [round(float(image[0].mean() - image[1].mean()), 1) for image in views.images]
        assert sorted(Counter(shares).values()) == expected


def test_views_repeat_and_depend_on_the_seed(patients: list[Patient]) -> None:
    first, again, other = (draw_views(patients, 64, VIEWS, seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)


def test_every_epoch_names_each_view_once() -> None:
    for count, batch in ((6, 4), (3, 8), (4, 4)):
        flat = torch.cat(list(islice(shuffled(count, batch, 5), 12))).tolist()
        assert len(flat) == 12 * batch
        epochs = [flat[start : start + count] for start in range(0, len(flat) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    assert flat == torch.cat(list(islice(shuffled(4, 4, 5), 12))).tolist()


# -- the key -----------------------------------------------------------------------------------------


def low_rank(name: str, kind: str, value: float = 1.0) -> dict[str, Tensor]:
    return {f"{name}.{kind}_A": torch.full((2, 32), value), f"{name}.{kind}_B": torch.ones(96, 2)}


ABOVE, BELOW = f"{BLOCK}.{CUT}.attn.qkv", f"{BLOCK}.1.attn.qkv"


def key_of(**changes: object) -> str:
    settings: dict[str, object] = {
        "network": small_teacher(), "adapter": adapter_of(low_rank(ABOVE, "lora")),
        "images": torch.zeros(2, 3, 64, 64), "cut": CUT,
    }  # fmt: skip
    return prefix_key(**(settings | changes))  # type: ignore[arg-type]


def test_another_base_cut_image_or_folded_prefix_gives_another_key() -> None:
    pixel = torch.zeros(2, 3, 64, 64)
    pixel[1, 2, 63, 63] = 1e-6
    base = low_rank(ABOVE, "lora")
    keys = [
        key_of(),
        key_of(adapter=replace(adapter_of(base), base_sha256="other")),
        key_of(cut=CUT - 1),
        key_of(images=pixel),
        key_of(images=torch.zeros(2, 3, 32, 32)),
        key_of(images=torch.zeros(3, 3, 64, 64)),
        key_of(network=small_teacher(Preprocessing((0.5,) * 3, (0.25,) * 3))),
        key_of(adapter=adapter_of(base | low_rank(BELOW, "folded"))),
        key_of(adapter=adapter_of(base | low_rank(BELOW, "folded", 2.0))),
    ]
    assert len(set(keys)) == len(keys)


def test_what_lies_above_the_cut_does_not_change_the_key() -> None:
    assert key_of(adapter=adapter_of(low_rank(ABOVE, "lora", 5.0))) == key_of()
    both = low_rank(ABOVE, "lora") | low_rank(ABOVE, "folded") | low_rank("decoder.head", "folded")
    assert key_of(adapter=adapter_of(both)) == key_of()


# -- the file ----------------------------------------------------------------------------------------


@pytest.fixture
def made() -> Progress:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 4, 5, generator=generator) for _ in range(3)]
    return Progress(parts[0], (parts[1],), (parts[2][0],))


@pytest.fixture(autouse=True)
def another_process() -> Iterator[None]:
    prefix_cache._held.clear()
    yield
    prefix_cache._held.clear()


def never() -> Progress:
    raise AssertionError("the prefix was made again")


def same(found: Progress, wanted: Progress) -> bool:
    pairs = zip(
        (found.hidden, *found.taps, *found.shared), (wanted.hidden, *wanted.taps, *wanted.shared), strict=True
    )
    return all(torch.equal(left, right) for left, right in pairs)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").glob("**/*") if path.is_file())


def test_a_prefix_is_kept_in_the_process_and_in_the_sites_folder(tmp_path: Path, made: Progress) -> None:
    assert same(PrefixCache(tmp_path).fetch("k", lambda: made), made)
    assert same(PrefixCache(tmp_path).fetch("k", never), made)
    prefix_cache._held.clear()
    found = PrefixCache(tmp_path).fetch("k", never)
    assert same(found, made)
    (file,) = files_of(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert str(file) in Path("/proc/self/maps").read_text()  # mapped, not read into memory


def test_two_sites_do_not_meet(tmp_path: Path, made: Progress) -> None:
    other = replace(made, hidden=made.hidden + 1)
    PrefixCache(tmp_path / "a").fetch("k", lambda: made)
    assert same(PrefixCache(tmp_path / "b").fetch("k", lambda: other), other)
    assert same(PrefixCache(tmp_path / "a").fetch("k", never), made)


def test_another_key_replaces_what_was_kept(tmp_path: Path, made: Progress) -> None:
    other = replace(made, hidden=made.hidden + 1)
    PrefixCache(tmp_path).fetch("k", lambda: made)
    assert same(PrefixCache(tmp_path).fetch("l", lambda: other), other)
    assert [file.name for file in files_of(tmp_path)] == ["prefix-l.safetensors"]
    assert same(PrefixCache(tmp_path).fetch("k", lambda: made), made)


@pytest.mark.parametrize("harm", ["cut short", "one bit", "empty", "of another key", "a link"])
def test_a_corrupt_or_foreign_file_is_made_again_and_not_trusted(
    tmp_path: Path, made: Progress, harm: str
) -> None:
    PrefixCache(tmp_path).fetch("k", lambda: made)
    (file,) = files_of(tmp_path)
    data = bytearray(file.read_bytes())
    prefix_cache._held.clear()
    if harm == "cut short":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "one bit":
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "of another key":
        PrefixCache(tmp_path / "other").fetch("l", lambda: replace(made, hidden=made.hidden + 1))
        file.write_bytes(files_of(tmp_path / "other")[0].read_bytes())
    else:
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    calls = []
    found = PrefixCache(tmp_path).fetch("k", lambda: calls.append(1) or made)  # type: ignore[func-returns-value]
    assert calls == [1]
    assert same(found, made)
    prefix_cache._held.clear()
    assert same(PrefixCache(tmp_path).fetch("k", never), made)
    assert not file.is_symlink()


def test_a_full_disk_costs_the_file_and_not_the_training(
    tmp_path: Path, made: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("no space left")

    monkeypatch.setattr(prefix_cache, "save_file", full)
    assert same(PrefixCache(tmp_path).fetch("k", lambda: made), made)
    assert same(PrefixCache(tmp_path).fetch("k", never), made)
    assert files_of(tmp_path) == []


def test_to_forget_leaves_nothing_behind(tmp_path: Path, made: Progress) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    cache = PrefixCache(tmp_path)
    cache.forget()  # nothing there is fine
    cache.fetch("k", lambda: made)
    cache.forget()
    assert not (tmp_path / "cache").exists()
    assert prefix_cache._held == {}
    (tmp_path / "cache").symlink_to(outside)
    cache.forget()
    assert not (tmp_path / "cache").exists()
    assert (outside / "file").exists()  # a link is taken away, not followed


# -- the border --------------------------------------------------------------------------------------


def test_only_the_training_reaches_the_cache() -> None:
    """The exit (`client.egress`), the guard and the courier never see it."""
    users = {name_of(path) for path in modules() if "client.prefix_cache" in imports_of(path)}
    assert users == {
        "client.adaptation",
        "client.dp.tasks",
        "client.workshop",
        "simulations.benchmark.dp",
        "simulations.benchmark.prefix",
    }
    (own,) = (path for path in modules() if name_of(path) == "client.prefix_cache")
    assert not {"client.egress", "client.guard", "common.wire", "common.guard_api"} & set(imports_of(own))
