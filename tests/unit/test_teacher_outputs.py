"""What teachers said, kept on the site's disk: asked once, never stale, its rounding bounded, and private."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

import client.transfer.kept as kept
import client.transfer.labelling as labelling
from client.deadline import Deadline
from client.distillation import distil
from client.losses import softened_logit_loss
from client.painters import SyntheticSet
from client.patients import Patient
from client.students import build_student
from client.transfer.kept import OutputCache, packed, row_keys, unpacked
from client.transfer.labelling import Outputs, gather, label_with_ensemble, teacher_outputs
from client.transfer.sets import TransferSet, real_crops
from client.transfer.views import AS_IT_IS, view_of, with_views
from common.adapter import Adapter
from common.plan import RunPlan
from common.probability import logits_of, probabilities
from common.recipe import ClassConfig, TeacherCache
from common.teacher import ResidentTeacher, initial_adapter, resident_teacher

FOREVER = Deadline(1e9)
BOTH = [TeacherCache.float16, TeacherCache.uint8]


def said_of(numbers: Tensor) -> Outputs:
    """Outputs that say which index they are of."""
    column = numbers.view(-1, 1, 1, 1).float() / 8
    parts = column.expand(-1, 1, 4, 4), column.expand(-1, 3, 2, 2), column.expand(-1, 2, 2, 2)
    return Outputs(*(part.clone() for part in parts))


class Asked:
    """A teacher that counts."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []

    def __call__(self, missing: Tensor) -> Outputs:
        self.indices.append(missing.tolist())
        return said_of(missing)


def same(one: Outputs, other: Outputs) -> bool:
    return all(torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("**/*") if path.is_file())


def student_of(plan: RunPlan, **changes: object) -> RunPlan:
    return replace(plan, student=replace(plan.student, **changes))  # type: ignore[arg-type]


# -- asked once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", BOTH)
def test_a_teacher_is_asked_once_for_each_image(form: TeacherCache, tmp_path: Path) -> None:
    asked, cache = Asked(), OutputCache(tmp_path, form, False)
    first = cache.fetch(["a", "b", "c"], asked)
    assert same(cache.fetch(["a", "b", "c"], asked), first)
    more = cache.fetch(["c", "new", "a"], asked)
    assert asked.indices == [[0, 1, 2], [1]]
    assert torch.equal(more.tokens[0], first.tokens[2])
    assert torch.equal(more.features[2], first.features[0])
    assert torch.equal(more.logits[2], first.logits[0])
    again = OutputCache(tmp_path, form, False)  # a resumed run
    assert same(again.fetch(["a", "b", "c"], asked), first)
    assert same(again.fetch(["c", "new", "a"], asked), more)
    assert len(asked.indices) == 2


@pytest.mark.parametrize("form", BOTH)
def test_a_full_disk_changes_nothing_but_the_time(
    form: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = OutputCache(tmp_path / "roomy", form, False).fetch(["a", "b"], Asked())

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(kept, "save_file", full)
    asked, cache = Asked(), OutputCache(tmp_path / "full", form, False)
    assert same(cache.fetch(["a", "b"], asked), whole)
    assert same(cache.fetch(["a", "b"], asked), whole)
    assert asked.indices == [[0, 1]]
    assert files_of(tmp_path / "full") == []


def test_a_damaged_file_is_not_used(tmp_path: Path) -> None:
    asked, wanted = Asked(), said_of(torch.arange(2))
    OutputCache(tmp_path, TeacherCache.float16, False).fetch(["a", "b"], asked)
    (path,) = files_of(tmp_path)
    whole = path.read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
        for old in files_of(tmp_path):
            old.unlink()  # not written over: what is mapped into memory would change with it
        path.write_bytes(content)
        found = OutputCache(tmp_path, TeacherCache.float16, False).fetch(["a", "b"], asked)
        assert torch.equal(found.logits.float(), wanted.logits)
        assert torch.equal(found.features.float(), wanted.features)
    assert asked.indices == [[0, 1]] * 4


def test_only_the_sites_user_can_read_it_and_nothing_is_left(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, TeacherCache.uint8, False)
    cache.fetch(["a"], Asked())
    assert stat.S_IMODE((tmp_path / kept.FOLDER).stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in files_of(tmp_path)} == {0o600}
    cache.forget()
    assert list(tmp_path.iterdir()) == []
    cache.forget()  # twice does no harm


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / kept.FOLDER).symlink_to(elsewhere)
    cache = OutputCache(tmp_path / "site", TeacherCache.float16, False)
    cache.fetch(["a"], Asked())
    assert files_of(elsewhere) == []
    assert len(files_of(tmp_path / "site" / kept.FOLDER)) == 1


# -- the key -----------------------------------------------------------------------------------------


def test_another_pixel_teacher_view_form_or_meaning_gives_another_key(smoke_plan: RunPlan) -> None:
    adapter = Adapter({"x": torch.zeros(2)}, "base", 2, "base")
    images = TransferSet(torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1) > 0)
    pixel = images.images.clone()
    pixel[0, 2, 3, 3] = 1e-7
    heads = [ClassConfig("other", 255, "vessel")]
    keys = [
        row_keys(images, adapter, smoke_plan),
        row_keys(replace(images, images=pixel), adapter, smoke_plan),
        row_keys(replace(images, images=torch.zeros(1, 3, 2, 8)), adapter, smoke_plan),
        row_keys(replace(images, views=torch.tensor([7])), adapter, smoke_plan),
        row_keys(images, replace(adapter, tensors={"x": torch.ones(2)}), smoke_plan),
        row_keys(images, replace(adapter, base_sha256="other"), smoke_plan),
        row_keys(images, adapter, student_of(smoke_plan, teacher_cache=TeacherCache.uint8)),
        row_keys(images, adapter, replace(smoke_plan, data=replace(smoke_plan.data, classes=heads))),
        row_keys(images, adapter, replace(smoke_plan, data=replace(smoke_plan.data, exclusive=True))),
    ]
    flat = [key for found in keys for key in found]
    assert len(set(flat)) == len(flat) == 9
    assert row_keys(replace(images, views=torch.tensor([AS_IT_IS])), adapter, smoke_plan) == keys[0]
    assert row_keys(replace(images, masks=images.masks + 1), adapter, smoke_plan) == keys[0]


# -- rounding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_probability_in_a_byte_is_at_most_half_a_step_off(exclusive: bool) -> None:
    raw = torch.rand(4, 2, 8, 8) / (2 if exclusive else 1)
    raw[0] = 0
    raw[1, 0] = 1
    raw[1, 1] = 0 if exclusive else 1
    logits = logits_of(raw, exclusive)
    said = Outputs(logits, torch.randn(4, 3, 2, 2), torch.randn(4, 2, 4, 4))
    rows = packed(said, TeacherCache.uint8, exclusive)
    assert (rows["steps"].dtype, rows["tokens"].dtype) == (torch.uint8, torch.bfloat16)
    found = unpacked(rows, exclusive)
    off = (probabilities(found.logits.float(), exclusive) - raw).abs()
    # half a step of rounding; where background and classes are bounded apart, their sum moves it once more
    assert off.max() <= (2.5 if exclusive else 0.55) / 255
    assert ((found.tokens.float() - said.tokens) / said.tokens).abs().max() < 2**-8


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_kept_nought_and_a_kept_whole_leave_the_softened_loss_finite(exclusive: bool) -> None:
    steps = torch.tensor([[0, 255, 128, 0], [0, 0, 127, 255]], dtype=torch.uint8).view(1, 2, 2, 2)
    rows = {"steps": steps, "tokens": torch.zeros(1, 1, 1, 1), "features": torch.zeros(1, 1, 1, 1)}
    teacher = unpacked(rows, exclusive).logits.float()
    assert bool(teacher.isfinite().all())
    for student in (torch.randn(1, 2, 2, 2), teacher):
        loss = softened_logit_loss(student, teacher, 2.0, exclusive)
        assert bool(loss.isfinite())
        assert loss >= -1e-6
    if not exclusive:
        assert probabilities(teacher, False)[0, 0, 0, 0] == pytest.approx(0.5 / 255, rel=2e-2)
        assert probabilities(teacher, False)[0, 0, 0, 1] == pytest.approx(1 - 0.5 / 255, abs=1e-4)


# -- with a real teacher -----------------------------------------------------------------------------


@pytest.fixture
def teacher(smoke_plan: RunPlan) -> ResidentTeacher:
    return resident_teacher(smoke_plan.teacher, smoke_plan.data)


@pytest.fixture
def crops(smoke_plan: RunPlan, patients: list[Patient]) -> TransferSet:
    found = gather(real_crops(patients, smoke_plan, 0), None)
    assert found is not None
    return found


@pytest.fixture
def ask(smoke_plan: RunPlan, teacher: ResidentTeacher, crops: TransferSet) -> Callable[[Tensor], Outputs]:
    def asked(missing: Tensor) -> Outputs:
        with teacher.visit(initial_adapter(smoke_plan.teacher, smoke_plan.data, 0)) as network:
            return labelling.teacher_outputs(network, crops.images[missing], False)

    return asked


def test_an_image_passes_a_teacher_as_often_as_it_is_mirrored_and_never_again(
    ask: Callable[[Tensor], Outputs], crops: TransferSet, smoke_plan: RunPlan, tmp_path: Path
) -> None:
    adapter = initial_adapter(smoke_plan.teacher, smoke_plan.data, 0)
    keys = row_keys(crops, adapter, smoke_plan)
    before = labelling.teacher_calls
    first = OutputCache(tmp_path, TeacherCache.float16, False).fetch(keys, ask)
    assert labelling.teacher_calls - before == labelling.MIRRORED * len(set(keys))
    before = labelling.teacher_calls
    assert same(OutputCache(tmp_path, TeacherCache.float16, False).fetch(keys, ask), first)
    assert labelling.teacher_calls == before


def test_bytes_for_probabilities_change_the_student_a_little(
    ask: Callable[[Tensor], Outputs],
    crops: TransferSet,
    smoke_plan: RunPlan,
    patients: list[Patient],
    tmp_path: Path,
) -> None:
    """Not the same bits, and nearly the same masks."""
    plan = student_of(smoke_plan, steps=12, transfer_batch_size=4)
    adapter = initial_adapter(plan.teacher, plan.data, 0)
    masks, weights, sizes = [], [], []
    for form in BOTH:
        chosen = student_of(plan, teacher_cache=form)
        said = OutputCache(tmp_path / form, form, False).fetch(row_keys(crops, adapter, chosen), ask)
        student = build_student("unet-xs", plan.data, True, 0)
        distil(student, patients, replace(crops, **vars(said)), plan, 0, FOREVER)
        weights.append(torch.cat([value.flatten() for value in student.state_dict().values()]))
        with torch.inference_mode():
            masks.append(student(crops.images) > 0)
        sizes.append(sum(path.stat().st_size for path in files_of(tmp_path / form)))
    assert not torch.equal(*weights)
    both = (masks[0] & masks[1]).sum()
    assert 2 * both / (masks[0].sum() + masks[1].sum()) > 0.98
    assert sizes[1] < sizes[0]


def test_an_ensemble_is_the_mean_probability_and_teaches_by_outputs_alone(
    smoke_plan: RunPlan, teacher: ResidentTeacher, crops: TransferSet
) -> None:
    start = initial_adapter(smoke_plan.teacher, smoke_plan.data, 0)
    name = "decoder.head.bias"
    other = replace(start, tensors={**start.tensors, name: start.tensors[name] + 3})
    alone = []
    for adapter in (start, other):
        with teacher.visit(adapter) as network:
            known = teacher_outputs(network, crops.images, False)
            alone.append(known.logits.float().sigmoid())
    found = label_with_ensemble([teacher.visit(start), teacher.visit(other)], crops, False)
    assert found.logits is not None
    assert torch.allclose(found.logits.float().sigmoid(), (alone[0] + alone[1]) / 2, atol=2e-3)
    assert (alone[1] - alone[0]).max() > 0.1
    assert found.tokens is None
    assert found.features is None


# -- views -------------------------------------------------------------------------------------------


def test_a_view_can_be_made_again_from_the_image_and_its_seed(crops: TransferSet) -> None:
    seen = with_views(crops, 3, 9)
    count = len(crops)
    assert len(seen) == 3 * count
    assert seen.views is not None
    assert torch.equal(seen.images[:count], crops.images)
    assert seen.views[:count].tolist() == [AS_IT_IS] * count
    assert len(set(seen.views.tolist())) == 1 + 2 * count
    for index in range(count, 3 * count):
        image, mask = view_of(crops.images[index % count], crops.masks[index % count], int(seen.views[index]))
        assert torch.equal(image, seen.images[index])
        assert torch.equal(mask, seen.masks[index])
        assert not torch.equal(image, crops.images[index % count])
        assert 0 <= image.min() <= image.max() <= 1
    assert torch.equal(with_views(crops, 3, 9).images, seen.images)
    assert not torch.equal(with_views(crops, 3, 8).images, seen.images)


def test_a_view_moves_image_and_mask_together_and_keeps_the_surround_black() -> None:
    mask = torch.zeros(1, 16, 16)
    mask[:, 2:7, 3:12] = 1
    image = mask.expand(3, -1, -1) * 0.5
    for seed in range(1, 12):
        moved, where = view_of(image, mask, seed)
        assert torch.equal(moved[:1] > 0, where > 0)
        assert where.sum() == mask.sum()


def test_synthetic_images_come_after_real_ones_and_alone_where_no_teacher_is(crops: TransferSet) -> None:
    painted = SyntheticSet(torch.rand(2, 3, 64, 64), torch.ones(2, 1, 64, 64))
    real = (crops.images, crops.masks)
    both, alone = gather(real, painted), gather(real, painted, masked=True)
    assert both is not None
    assert alone is not None
    assert both.synthetic.tolist() == [False] * len(crops) + [True] * 2
    assert torch.equal(alone.images, painted.images)
    assert gather(real, None, masked=True) is None
