"""One site's work in one private round: one noised gradient of the teacher, as a step that is ready to leave.

DP-FedSGD (McMahan et al. 2018, with noise at each site in place of the server's): every site clips and noises
its own gradient, so nobody else has to be trusted, and the server averages after every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.charges import Reservation
from client.dp.bench import Bench
from client.dp.mechanism import Execution, PrivateGradient
from client.dp.randomness import Randomness, SystemRandomness
from client.dp.tasks import SegmentationTask, segmentation_task
from client.dp.trained import Trained
from client.patients import Patient
from common.adapter import Adapter
from common.plan import RunPlan
from common.teacher import ResidentTeacher

PHYSICAL_BATCH = 16  # images through the network at once, or one patient's if those are more
LAST_RATE = 0.1  # of the learning rate, which falls in a line


@dataclass(frozen=True)
class PrivateStep:
    """``step``: by how much each tensor moves, float32, all of it from the mechanism.

    ``guaranteed``: whether the plan's guarantee holds for it; never for noise from a seed.
    """

    step: Adapter
    guaranteed: bool


def learning_rate(plan: RunPlan, round_index: int) -> float:
    """Of round ``round_index`` (0-based); a fixed schedule, which looks at no value."""
    return plan.privacy.learning_rate * (1 - (1 - LAST_RATE) * round_index / plan.rounds)


def private_step(
    teacher: ResidentTeacher,
    adapter: Adapter,
    patients: Sequence[Patient],
    plan: RunPlan,
    order: tuple[int, Reservation, Path | None],
    source: Randomness | None = None,
) -> PrivateStep:
    """The step from ``adapter`` of a site with ``patients``.

    Args:
        order: round index, what was reserved for the step, and the site's folder, where the frozen prefix is
            kept.
        source: None: the system's randomness; the mechanism then stays ready for the run's next round
            (`client.dp.bench`). A test may give a seeded one; what comes of it is not guaranteed, and
            `client.egress` does not let it leave.

    Raises:
        ArtefactError: the adapter does not fit.
        ConfigError: the mechanism cannot train what the adapter holds.
        DataError: a gradient is not finite.
    """
    index, reservation, folder = order
    with teacher.visit(adapter, train=True) as network:
        trained = teacher.slots.trainable()

        def make() -> tuple[PrivateGradient, int]:
            task = segmentation_task(network, adapter, patients, plan, folder)
            rows = PHYSICAL_BATCH * sum(parameter.nbytes for parameter in trained.values())
            return _mechanism(task, trained, reservation, source or SystemRandomness()), task.nbytes + rows

        # Folded factors are part of what features are made of, and may be others in every round.
        name = f"{plan.digest} {adapter.folded_digest}"
        made_for = (network, reservation.terms, *trained.values(), *patients)
        kept = Bench(None if source else folder, name, made_for)
        with kept.mechanism(reservation.step, make) as gradient:
            noised = gradient.step(reservation.step)
    rate = learning_rate(plan, index)
    step = Adapter(
        {name: -rate * tensor for name, tensor in noised.items()},
        adapter.base_sha256,
        adapter.rank,
        adapter.preset,
    )
    return PrivateStep(step, gradient.guaranteed)


def _mechanism(
    task: SegmentationTask, trained: Trained, paid: Reservation, source: Randomness
) -> PrivateGradient:
    execution = Execution(max(PHYSICAL_BATCH, paid.terms.max_images_per_patient))
    return PrivateGradient(task, trained, paid.terms, source, execution, first_step=paid.step)
