"""Gradients of every image from one backward pass.

A layer's gradient for one image is made of what went into the layer and of the gradient that came back to
its output (Goodfellow 2015); making it costs less than its norm alone would, wherever an image has more
tokens than a factor has rank. Hooks at a trained layer catch both, and autograd is told that the layer is
frozen, so that the gradient summed over the batch is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.dp.clipping import add_up_patients
from client.dp.poisson import MicroBatch
from client.dp.tasks import PrivateTask
from client.dp.trained import Layout, Trained, TrainedLayer, trained_layers
from common.errors import ConfigError

backward_calls = 0  # of this process: tests assert that it is one a micro-batch

# layer, its input and the gradient of its output, both (B, n, ...) -> attribute -> (B, *shape); n windows
# of an image lie side by side
Rule = Callable[[Any, Tensor, Tensor, Mapping[str, str]], dict[str, Tensor]]


def _linear(layer: nn.Linear, given: Tensor, back: Tensor, wanted: Mapping[str, str]) -> dict[str, Tensor]:
    given, back = (
        given.reshape(len(given), -1, layer.in_features),
        back.reshape(len(back), -1, layer.out_features),
    )
    found = {}
    if "weight" in wanted:
        if layer.out_features <= layer.in_features:  # few rows and long ones: four times as fast on a CPU
            found["weight"] = torch.bmm(back.transpose(1, 2), given)
        else:
            found["weight"] = torch.bmm(given.transpose(1, 2), back).transpose(1, 2)
    if "bias" in wanted:
        found["bias"] = back.sum(1)
    return found


def _convolution(
    layer: nn.Conv2d, given: Tensor, back: Tensor, wanted: Mapping[str, str]
) -> dict[str, Tensor]:
    found = {}
    if "weight" in wanted:
        if _is_a_product(layer):
            back_rows, given_rows = (part.transpose(1, 2).flatten(2) for part in (back, given))
            found["weight"] = torch.bmm(back_rows, given_rows.transpose(1, 2))[..., None, None]
        else:
            images = zip(given, back, strict=True)
            found["weight"] = torch.stack([_kernel_gradient(layer, image, out) for image, out in images])
    if "bias" in wanted:
        found["bias"] = back.sum((1, 3, 4))
    return found


def _is_a_product(layer: nn.Conv2d) -> bool:
    """Whether the layer multiplies each pixel by one matrix."""
    return layer.kernel_size == (1, 1) == layer.stride and layer.padding == (0, 0) and layer.groups == 1


def _kernel_gradient(layer: nn.Conv2d, given: Tensor, back: Tensor) -> Tensor:
    """Torch's own kernel, for the windows of one image."""
    assert not isinstance(layer.padding, str)
    found: tuple[None, Tensor, None] = torch.ops.aten.convolution_backward(
        back, given, layer.weight, None, layer.stride, layer.padding, layer.dilation,
        False, (0, 0), layer.groups, (False, True, False),
    )  # fmt: skip
    return found[1]


def _layer_norm(
    layer: nn.LayerNorm, given: Tensor, back: Tensor, wanted: Mapping[str, str]
) -> dict[str, Tensor]:
    shape = (len(given), -1, *layer.normalized_shape)
    found = {}
    if "weight" in wanted:
        normal = F.layer_norm(given, layer.normalized_shape, eps=layer.eps)
        found["weight"] = (back * normal).reshape(shape).sum(1)
    if "bias" in wanted:
        found["bias"] = back.reshape(shape).sum(1)
    return found


def _group_norm(
    layer: nn.GroupNorm, given: Tensor, back: Tensor, wanted: Mapping[str, str]
) -> dict[str, Tensor]:
    found = {}
    if "weight" in wanted:
        normal = F.group_norm(given.flatten(0, 1), layer.num_groups, eps=layer.eps).view_as(given)
        found["weight"] = (back * normal).flatten(3).sum((1, 3))
    if "bias" in wanted:
        found["bias"] = back.flatten(3).sum((1, 3))
    return found


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}


class OnePass:
    """Patients' gradients of ``task`` by one backward pass a micro-batch.

    Guarantee: equal to a plain loop over patients within 2e-6 of a gradient's norm, where every trained layer
    is one of `RULES`, is run once a forward and sees an image's tokens or windows side by side; what is not
    so is refused by `client.dp.trained` or by `client.dp.reference.probe`.
    """

    def __init__(self, task: PrivateTask, trained: Trained) -> None:
        self._task, self._trained = task, trained
        self._layers, self._layout = trained_layers(task, trained), Layout(trained)
        self._rows = torch.empty(0)  # kept from one micro-batch to the next, which all have one shape

    def __call__(self, inputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
        """(B, `Layout.width`): the batch's patients' gradients, then zeros. Valid until the next call.

        Raises ``ConfigError`` if a layer is run twice, or not at all, or does not have the images first.
        """
        global backward_calls
        written: set[str] = set()
        shape = len(batch.rows), self._layout.width
        if self._rows.shape != shape:
            self._rows = next(iter(self._trained.values())).new_empty(shape)
        with self._hooked(written, batch), torch.enable_grad():
            loss = (self._task(*inputs) * batch.weights).sum()
            loss.backward()
            backward_calls += 1
        if missing := sorted(set(self._trained) - written):
            raise ConfigError(f"the loss does not run through {', '.join(missing)}: freeze it")
        return self._rows

    @contextmanager
    def _hooked(self, written: set[str], batch: MicroBatch) -> Iterator[None]:
        took = {name: parameter.requires_grad for name, parameter in self._trained.items()}
        handles = []
        try:
            for parameter in self._trained.values():
                parameter.requires_grad_(False)
            for layer in self._layers:
                handles.append(layer.module.register_forward_hook(self._hook(layer, written, batch)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in self._trained.items():
                parameter.requires_grad_(took[name])

    def _hook(self, layer: TrainedLayer, written: set[str], batch: MicroBatch) -> Callable[..., None]:
        images, seen = len(batch.rows), [0]

        def show(given: Tensor, back: Tensor) -> None:
            given, back = (part.reshape(images, -1, *part.shape[1:]) for part in (given, back))
            gradients = RULES[type(layer.module)](layer.module, given, back, layer.names)
            for attribute, name in layer.names.items():
                add_up_patients(gradients[attribute], batch, self._rows[:, self._layout.places[name]])
                written.add(name)

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[0] += 1
            if seen[0] > 1:
                raise ConfigError(f"{layer.path} is run twice for one image: a parameter may be used once")
            if len(args[0]) % images:
                raise ConfigError(f"{layer.path} does not have the images along its first axis")
            given = [args[0].detach()]  # let go of as soon as it was used, as autograd would
            if not out.requires_grad:  # everything before it is frozen, and here so is the layer itself
                out.requires_grad_()
            out.register_hook(lambda back: show(given.pop(), back))

        return hook
