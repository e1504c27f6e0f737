"""Seeds, canonical text, plans, adapters: the vocabulary itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.adapter import Adapter
from common.canonical import canonical_json, sha256_of
from common.errors import ArtefactError, WardroundError
from common.plan import RunPlan, Stage
from common.seeding import derive_seed
from common.tuning.halves import A_ALONE, B_ALONE, BOTH, trained_halves, turns


def adapter(scale: float = 1.0) -> Adapter:
    tensors = {
        "layer.lora_A": torch.arange(6.0).view(2, 3) * scale,
        "layer.lora_B": torch.ones(4, 2),
        "head.bias": torch.tensor([0.5]),
    }
    return Adapter(tensors, "base", 2, "lite")


@given(st.integers(0, 2**32), st.lists(st.text(max_size=5), max_size=3))
def test_seed_depends_on_its_own_path_alone(seed: int, path: list[str]) -> None:
    assert derive_seed(seed, *path) == derive_seed(seed, *path)
    assert 0 <= derive_seed(seed, *path) < 2**63
    assert derive_seed(seed, *path) != derive_seed(seed, *path, "more")


def test_seed_paths_do_not_run_together() -> None:
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")


def test_canonical_json_has_one_text_and_no_nan() -> None:
    assert canonical_json({"b": 1, "a": [1.5]}) == '{"a":[1.5],"b":1}'
    assert sha256_of({"a": 1, "b": 2}) == sha256_of({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(math.nan)


def test_adapter_round_trips_through_its_file(tmp_path: Path) -> None:
    given_adapter = adapter()
    given_adapter.save(tmp_path / "a.safetensors")
    read = Adapter.load(tmp_path / "a.safetensors")
    assert read.digest == given_adapter.digest
    assert (read.base_sha256, read.rank, read.preset, read.layers()) == ("base", 2, "lite", ["layer"])


@pytest.mark.parametrize("change", ["value", "name", "base", "rank", "preset"])
def test_adapter_digest_changes_with_anything_in_it(change: str) -> None:
    original = adapter()
    other = {
        "value": adapter(2.0),
        "name": replace(original, tensors={f"x{k}": v for k, v in original.tensors.items()}),
        "base": replace(original, base_sha256="other"),
        "rank": replace(original, rank=3),
        "preset": replace(original, preset="base"),
    }[change]
    assert other.digest != original.digest


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ArtefactError, match="not a Wardround adapter"):
        Adapter.load(tmp_path / "a.safetensors")


def test_adapter_change_adds_folded_and_trainable_factors() -> None:
    tensors = {
        "l.lora_A": torch.randn(2, 5), "l.lora_B": torch.randn(4, 2),
        "l.folded_A": torch.randn(3, 5), "l.folded_B": torch.randn(4, 3),
    }  # fmt: skip
    whole = Adapter(tensors, "base", 2, "lite")
    expected = tensors["l.lora_B"] @ tensors["l.lora_A"] + tensors["l.folded_B"] @ tensors["l.folded_A"]
    assert torch.allclose(whole.change("l"), expected)
    assert set(whole.trained().tensors) == {"l.lora_A", "l.lora_B"}
    assert set(replace(whole, preset="dp").trained().tensors) == {"l.lora_B"}, "its A is fixed"
    assert set(whole.trained(A_ALONE).tensors) == {"l.lora_A"}
    assert set(replace(whole, preset="dp").trained(A_ALONE).tensors) == set()
    assert whole.folded_layers() == whole.layers() == ["l"]


def test_the_halves_of_a_round_follow_from_preset_rule_and_index() -> None:
    assert [trained_halves("base", "rolora", index) for index in range(4)] == [B_ALONE, A_ALONE] * 2
    assert trained_halves("base", "exact_split", 1) == BOTH
    assert trained_halves("dp", "fedsvd", 1) == B_ALONE
    assert turns("generator", "rolora") == (B_ALONE, A_ALONE)


def test_a_file_without_its_preset_is_refused(tmp_path: Path) -> None:
    save_file(dict(adapter().tensors), tmp_path / "old.safetensors", {"base_sha256": "base", "rank": "2"})
    with pytest.raises(ArtefactError, match="preset"):
        Adapter.load(tmp_path / "old.safetensors")


def test_plan_round_trips_and_its_digest_covers_every_setting(smoke_plan: RunPlan) -> None:
    assert RunPlan.from_json(smoke_plan.to_json()) == smoke_plan
    changed = replace(smoke_plan, teacher=replace(smoke_plan.teacher, steps=smoke_plan.teacher.steps + 1))
    assert changed.digest != smoke_plan.digest
    assert smoke_plan.payload(Stage.adapt) is not None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"surprise": 1}'])
def test_a_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ArtefactError, match="not a run plan"):
        RunPlan.from_json(text)


def test_every_error_has_a_documented_exit_code() -> None:
    found = {kind.__name__: kind.exit_code for kind in WardroundError.__subclasses__()}
    assert found == {
        "UsageError": 2, "ConfigError": 10, "DataError": 11, "ArtefactError": 12, "PolicyRefusal": 20,
        "BudgetExceeded": 21, "VerificationFailed": 22, "FederationError": 30, "DeadlinePassed": 31,
    }  # fmt: skip


def test_an_error_shows_all_its_faults() -> None:
    assert str(WardroundError("two faults", ["first", "second"])) == "two faults\n  - first\n  - second"
