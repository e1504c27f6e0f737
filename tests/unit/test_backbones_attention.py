"""Relative-position attention without a table of tokens x tokens, against transformers' eager module."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention

from common.backbones import attention
from common.backbones.attention import FOLD_FROM, RelativeAttention, relative_table

ALWAYS, NEVER = 0, 10**9
GRIDS = [(1, 1), (4, 4), (7, 7), (3, 5), (10, 6), (14, 14), (2, 9)]


def eager_module(
    height: int, width: int, heads: int = 2, head_width: int = 8, relative: bool = True
) -> SamVisionAttention:
    torch.manual_seed(height * 100 + width)
    config = SamVisionConfig(
        hidden_size=heads * head_width, num_attention_heads=heads, qkv_bias=True, use_rel_pos=relative
    )
    module = SamVisionAttention(config, window_size=max(height, width))
    if relative:
        module.rel_pos_h = nn.Parameter(torch.randn(2 * height - 1, head_width))
        module.rel_pos_w = nn.Parameter(torch.randn(2 * width - 1, head_width))
    return module


def taken_over(old: SamVisionAttention, fold_from: int) -> RelativeAttention:
    module = RelativeAttention(copy.deepcopy(old))
    module.fold_from = fold_from
    return module


def with_gradients(module: nn.Module, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    hidden = hidden.clone().requires_grad_()
    output = module(hidden)[0]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    (output * weights).mean().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return output.detach(), {**gradients, "hidden": hidden.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("fold_from", [ALWAYS, NEVER], ids=["folded", "masked"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_both_equal_the_eager_module_gradients_too(grid: tuple[int, int], fold_from: int) -> None:
    old = eager_module(*grid)
    hidden = torch.randn(3, *grid, 16)
    expected, wanted = with_gradients(old, hidden)
    output, gradients = with_gradients(taken_over(old, fold_from), hidden)
    assert torch.allclose(output, expected, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted[name], atol=1e-5), name


def test_made_again_in_the_backward_pass_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients within 1e-6; and it is made again, head by head."""
    module, hidden = taken_over(eager_module(5, 7, heads=4), ALWAYS), torch.randn(2, 5, 7, 32)
    expected, wanted = with_gradients(module, hidden)
    module.zero_grad()
    calls: list[int] = []
    plain = attention._fold

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return plain(*arguments)

    monkeypatch.setattr(attention, "_fold", counted)
    monkeypatch.setattr(attention, "RECOMPUTE_FROM", 1)
    output, gradients = with_gradients(module, hidden)
    assert len(calls) == 4 * 2, "four heads, each twice"
    assert torch.allclose(output, expected, atol=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted[name], atol=1e-6), name
    with torch.no_grad():
        module(hidden)
    assert len(calls) == 4 * 2 + 2, "without gradients two heads at a time, once"


@pytest.mark.parametrize("fold_from", [ALWAYS, NEVER], ids=["folded", "masked"])
def test_positions_matter(fold_from: int) -> None:
    """With its tables at zero the module gives something else: the comparison above could have failed."""
    old = eager_module(5, 7)
    hidden = torch.randn(1, 5, 7, 16)
    module = taken_over(old, fold_from)
    for table in (module.rel_pos_h, module.rel_pos_w):
        before = module(hidden)[0]
        with torch.no_grad():
            table.zero_()
        assert (module(hidden)[0] - before).abs().max() > 1e-2


def test_both_equal_each_other_at_the_size_of_sam() -> None:
    """4096 tokens in heads of 64, as in SAM ViT-B at 1024 pixels."""
    old = eager_module(64, 64, heads=1, head_width=64)
    hidden = torch.randn(1, 64, 64, 64)
    with torch.no_grad():
        expected = old(hidden)[0]
        assert torch.allclose(taken_over(old, ALWAYS)(hidden)[0], expected, atol=1e-5)
        assert torch.allclose(taken_over(old, NEVER)(hidden)[0], expected, atol=1e-5)


@pytest.mark.parametrize("fold_from", [ALWAYS, NEVER], ids=["folded", "masked"])
def test_tables_of_another_grid_are_interpolated_as_transformers_does(fold_from: int) -> None:
    old = eager_module(9, 4)
    hidden = torch.randn(2, 6, 7, 16)
    with torch.no_grad():
        assert torch.allclose(taken_over(old, fold_from)(hidden)[0], old(hidden)[0], atol=1e-5)


def test_a_relative_table_holds_the_vector_of_each_distance() -> None:
    vectors = torch.arange(5.0)[:, None]  # of the distances -2 ... 2
    assert relative_table(vectors, 3)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_any_number_of_heads_is_folded_in_groups(heads: int) -> None:
    old = eager_module(4, 5, heads=heads)
    hidden = torch.randn(2, 4, 5, 8 * heads)
    with torch.no_grad():
        assert torch.allclose(taken_over(old, ALWAYS)(hidden)[0], old(hidden)[0], atol=1e-5)


def test_without_relative_positions_it_is_plain_attention() -> None:
    old = eager_module(4, 6, relative=False)
    module = taken_over(old, ALWAYS)
    hidden = torch.randn(2, 4, 6, 16)
    with torch.no_grad():
        assert torch.allclose(module(hidden)[0], old(hidden)[0], atol=1e-5)
    assert module.state_dict().keys() == old.state_dict().keys()


def test_parameters_keep_their_names_and_are_the_same_objects() -> None:
    old = eager_module(4, 6)
    new = RelativeAttention(old)
    assert {name: id(p) for name, p in new.named_parameters()} == {
        name: id(p) for name, p in old.named_parameters()
    }


class Largest(TorchDispatchMode):
    """The most elements that any tensor had, forward or backward, of those that torch's operators return."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def largest_tensor(module: nn.Module, hidden: Tensor) -> int:
    with Largest() as seen:
        module(hidden.requires_grad_())[0].sum().backward()
    return seen.elements


def test_no_tensor_has_tokens_times_tokens_elements() -> None:
    """At 4096 tokens, forward and backward; the eager module has one, so this test can fail."""
    old = eager_module(64, 64, heads=1)
    hidden = torch.randn(1, 64, 64, 8)
    square = 4096**2
    folded = RelativeAttention(copy.deepcopy(old))
    assert folded.fold_from == FOLD_FROM
    assert largest_tensor(folded, hidden) < square // 16
    assert largest_tensor(old, hidden) >= square
    assert largest_tensor(taken_over(old, NEVER), hidden) >= square


def test_the_way_is_chosen_by_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("folded", "masked"):
        function = getattr(attention, name)

        def spy(*args: Any, _name: str = name, _function: Any = function) -> Tensor:
            taken.append(_name)
            result: Tensor = _function(*args)
            return result

        monkeypatch.setattr(attention, name, spy)
    side = math.isqrt(FOLD_FROM)
    module = RelativeAttention(eager_module(side, side))
    with torch.no_grad():
        module(torch.randn(5, side - 1, side - 1, 16))  # the batch does not count
        module(torch.randn(1, side, side, 16))
    assert taken == ["masked", "folded"]


@pytest.mark.parametrize("fold_from", [ALWAYS, NEVER], ids=["folded", "masked"])
def test_half_precision_is_close_and_its_gradients_are_finite(fold_from: int) -> None:
    old = eager_module(8, 6)
    module = taken_over(old, fold_from)
    hidden = torch.randn(2, 8, 6, 16)
    expected, wanted = with_gradients(module, hidden)
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = module(hidden)[0]
        assert half.dtype == torch.bfloat16
        _, gradients = with_gradients(module, hidden)
    assert (half.float() - expected).pow(2).mean().sqrt() < 0.03 * expected.std()
    for name, gradient in gradients.items():
        error, size = (t.pow(2).mean().sqrt() for t in (gradient - wanted[name], wanted[name]))
        assert error < 0.05 * size + 1e-5, name


# vmap takes the fused kernel image by image, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("fold_from", [ALWAYS, NEVER], ids=["folded", "masked"])
def test_gradients_of_each_image_alone_can_be_taken(fold_from: int) -> None:
    """torch.func's vmap of grad, which per-patient clipping may use, equals a plain loop."""
    module = taken_over(eager_module(4, 5), fold_from)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    images = torch.randn(3, 4, 5, 16)

    def loss(given: dict[str, Tensor], image: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, given, (image[None],))[0]
        return output.square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    for index, image in enumerate(images):
        alone = torch.func.grad(loss)(parameters, image)
        for name, gradient in alone.items():
            assert torch.allclose(together[name][index], gradient, atol=1e-4, rtol=1e-4), name
