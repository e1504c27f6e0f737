"""One step of DP-SGD with the patient as the unit: sample, clip, sum, noise, divide.

Abadi et al. 2016, algorithm 1, with one gradient a patient (the mean over its drawn images) in place of one
an image. The divisor is the expected number of patients, which is public, and never the number drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from client.dp.clipping import add_clipped
from client.dp.onepass import RULES, OnePass
from client.dp.poisson import PoissonSampler, Row, micro_batches
from client.dp.randomness import Randomness
from client.dp.reference import Gradients, Reference, probe
from client.dp.tasks import PrivateTask
from client.dp.trained import Layout, Trained, refuse_untrainable
from common.errors import BudgetExceeded, ConfigError, DataError


class StepTerms(Protocol):
    """What of a privacy plan decides a step; the plan accounts for exactly these.

    Attributes:
        sample_rate: q, with which each patient takes part in a step.
        max_grad_norm: C, the longest that a patient's gradient may be.
        noise_std: of the noise on every coordinate of the sum of clipped gradients; sigma C.
        steps: how many are accounted for.
        max_images_per_patient: of a step.
        expected_batch: q N with the public N, by which the noised sum is divided.
    """

    @property
    def sample_rate(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def noise_std(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def max_images_per_patient(self) -> int: ...
    @property
    def expected_batch(self) -> float: ...


@dataclass(frozen=True)
class Execution:
    """How a step is computed: nothing here changes what it guarantees, or its result beyond rounding.

    Attributes:
        physical_batch: images through the network at once.
        reference: take gradients by `torch.func`, which knows every layer, instead of in one pass.
    """

    physical_batch: int = 16
    reference: bool = False


class ClippedSum:
    """The sum of patients' clipped gradients, without noise: it must not leave the mechanism.

    Raises:
        ConfigError: something trained cannot be; before any image is used.
    """

    def __init__(
        self, task: PrivateTask, trained: Trained, max_grad_norm: float, execution: Execution
    ) -> None:
        refuse_untrainable(task, trained, None if execution.reference else RULES)
        self.layout = Layout(trained)
        self._task, self._max_norm, self._physical_batch = task, max_grad_norm, execution.physical_batch
        self._like = next(iter(trained.values())).detach()
        self._gradients: Gradients = (Reference if execution.reference else OnePass)(task, trained)
        probe(task, trained, self._gradients)

    def __call__(self, drawn: list[list[Row]]) -> Tensor:
        """For ``drawn`` (each patient's rows) the sum, (`Layout.width`,); zeros for nobody.

        Raises:
            DataError: a gradient is not finite.
        """
        total = self._like.new_zeros(self.layout.width)
        for batch in micro_batches(drawn, self._physical_batch):
            rows = self._gradients(self._task.inputs(batch.rows), batch)
            add_clipped(total, rows, self._max_norm)
        return total


class PrivateGradient:
    """A site's noised gradient, step by step, at whatever the trained parameters are at that moment.

    Guarantees: every tensor that it returns went through the sampler, the clip and the noise of ``terms``;
    a step is taken once and none beyond ``terms.steps``; an empty draw is noised and counted like any
    other; after a failure no further step is taken.

    Args:
        trained: name in an adapter -> live parameter, such as `AdapterSlots.trainable`.
        source: of the coins and of the noise.
        first_step: the steps that the ledger has already booked for this plan.

    Raises:
        ConfigError: something trained cannot be, or an image batch is too small for one patient.
    """

    def __init__(
        self,
        task: PrivateTask,
        trained: Trained,
        terms: StepTerms,
        source: Randomness,
        execution: Execution | None = None,
        first_step: int = 0,
    ) -> None:
        execution = execution or Execution()
        if execution.physical_batch < terms.max_images_per_patient:
            raise ConfigError(
                f"physical_batch {execution.physical_batch} is below max_images_per_patient "
                f"{terms.max_images_per_patient}: raise it, for a patient's images go together"
            )
        self.terms, self._source = terms, source
        self._sampler = PoissonSampler(task.patients, terms.sample_rate, terms.max_images_per_patient)
        self._clipped_sum = ClippedSum(task, trained, terms.max_grad_norm, execution)
        self.steps_taken = first_step
        self._sealed = False

    @property
    def guaranteed(self) -> bool:
        """Whether the plan's guarantee holds for what `step` returns: not with a seed, not without noise."""
        return self._source.secure and self.terms.noise_std > 0

    def step(self, index: int) -> dict[str, Tensor]:
        """The noised gradient of step ``index``, name -> the live parameter's shape and dtype.

        It counts as taken from the moment it begins, whatever comes of it.

        Raises:
            BudgetExceeded: the step was taken before, is not the next, or is not in the plan.
            DataError: a gradient is not finite; the mechanism takes no step after that.
        """
        if self._sealed:
            raise DataError("this mechanism failed and takes no further step: begin a new plan")
        if index != self.steps_taken or index >= self.terms.steps:
            raise BudgetExceeded(
                f"step {index} is asked for, {self.steps_taken} of {self.terms.steps} are taken: "
                "only the next one is accounted for"
            )
        self.steps_taken, self._sealed = index + 1, True
        clipped_sum = self._clipped_sum(self._sampler.draw(self._source))
        noised = self._noised(clipped_sum)
        self._sealed = False
        return self._clipped_sum.layout.split(noised)

    def _noised(self, clipped_sum: Tensor) -> Tensor:
        """Added and divided in float64, then rounded once."""
        noised = self._source.normals(clipped_sum.shape).mul_(self.terms.noise_std).add_(clipped_sum)
        return noised.div_(self.terms.expected_batch).to(clipped_sum.dtype)
