"""Patients' gradients the slow and certain ways, and the probe that holds the fast way against them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from client.dp.clipping import add_up_patients
from client.dp.poisson import MicroBatch, micro_batches
from client.dp.tasks import PrivateTask
from client.dp.trained import Layout, Trained
from common.errors import ConfigError

Gradients = Callable[[tuple[Tensor, ...], MicroBatch], Tensor]
TOLERANCE = 1e-4  # of a patient's gradient norm; rounding makes about 1e-6
SHIFT = 0.02  # added to the parameters while probing: factors that start at zero hide an error behind them


class Reference:
    """Patients' gradients of ``task`` by ``vmap(grad)`` over images: any layer that treats images apart."""

    def __init__(self, task: PrivateTask, trained: Trained, chunk: int | None = None) -> None:
        self._task, self._trained, self._chunk = task, trained, chunk
        paths = {id(parameter): path for path, parameter in task.named_parameters()}
        self._paths = {name: paths[id(parameter)] for name, parameter in trained.items()}

    def __call__(self, inputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
        """(B, `Layout.width`): the batch's patients' gradients, then zeros."""
        live = {self._paths[name]: parameter.detach() for name, parameter in self._trained.items()}
        rest = {
            path: tensor.detach()
            for path, tensor in [*self._task.named_parameters(), *self._task.named_buffers()]
            if path not in live
        }

        def loss(trained: dict[str, Tensor], row: tuple[Tensor, ...], weight: Tensor) -> Tensor:
            losses: Tensor = functional_call(self._task, (trained, rest), tuple(part[None] for part in row))
            return losses.sum() * weight

        each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different", chunk_size=self._chunk)
        with sdpa_kernel(SDPBackend.MATH):  # of attention kernels the one that vmap can batch
            found = each(live, inputs, batch.weights)
        each_image = torch.cat([found[path].flatten(1) for path in self._paths.values()], 1)
        rows = torch.empty_like(each_image)
        add_up_patients(each_image, batch, rows)
        return rows


def plain_gradients(
    task: PrivateTask, trained: Trained, inputs: tuple[Tensor, ...], batch: MicroBatch
) -> Tensor:
    """As `Reference`, by one plain forward and backward for each patient alone."""
    parameters = list(trained.values())
    rows = parameters[0].new_zeros(len(batch.rows), Layout(trained).width)
    with _taking_gradients(trained), torch.enable_grad():
        for slot in range(batch.patients):
            own = (batch.slots == slot) & (batch.weights > 0)
            loss = task(*(part[own] for part in inputs)).mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            rows[slot] = torch.cat([gradient.flatten() for gradient in gradients])
    return rows


def probe(task: PrivateTask, trained: Trained, gradients: Gradients) -> None:
    """Hold ``gradients`` against the plain loop on random images, before a patient's image is used.

    Two patients, one of them with two images, and a row beyond them.

    Raises:
        ConfigError: they differ, so that a layer mixes images, or has them elsewhere than along the first
            axis, or a parameter is used past its layer; or a buffer changes, which would carry patients'
            statistics along.
    """
    batch = next(micro_batches([[0], [1, 2]], 4))
    inputs = _random_like(task.inputs(torch.zeros(len(batch.rows), dtype=torch.int64)))
    buffers = {path: buffer.clone() for path, buffer in task.named_buffers()}
    with _shifted(trained):
        wanted, found = plain_gradients(task, trained, inputs, batch), gradients(inputs, batch)
    if moved := [path for path, old in buffers.items() if not torch.equal(old, task.get_buffer(path))]:
        raise ConfigError(f"{', '.join(moved)} changes as images pass: nothing may be kept of them")
    allowed = TOLERANCE * wanted.norm(dim=1)[: batch.patients].clamp(min=1e-30)
    off = {
        name: (found - wanted)[: batch.patients, place].norm(dim=1)
        for name, place in Layout(trained).places.items()
    }
    wrong = [name for name, by in off.items() if not bool((by <= allowed).all())]
    if wrong:
        raise ConfigError(
            f"the gradients of {', '.join(wrong)} are not those of one patient alone: freeze what they "
            "belong to, or take the reference path"
        )


def _random_like(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same shapes with noise in them; whole numbers stay as they are."""
    draw = torch.Generator().manual_seed(0)
    return tuple(
        torch.rand(part.shape, generator=draw, dtype=part.dtype) if part.is_floating_point() else part
        for part in inputs
    )


@contextmanager
def _taking_gradients(trained: Trained) -> Iterator[None]:
    took = [parameter.requires_grad for parameter in trained.values()]
    try:
        for parameter in trained.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, before in zip(trained.values(), took, strict=True):
            parameter.requires_grad_(before)


@contextmanager
def _shifted(trained: Trained) -> Iterator[None]:
    draw = torch.Generator().manual_seed(0)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    try:
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(SHIFT * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(before[name])
