"""`PrivacyPlan`: the settings of the noised steps and the event that they imply, in one object.

The mechanism reads its sampler, clip and noise here, and the accounting reads the event here, so what ran
and what was booked cannot drift apart. A plan is made by `calibrate` (from epsilon) or `PrivacyPlan.make`
(from the noise) and never put together by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from common.canonical import sha256_of
from common.errors import ArtefactError, ConfigError
from common.privacy.accounting import check_delta, epsilon, quick_epsilon, rdp_epsilon, shuffled
from common.privacy.events import Event

MAX_NOISE_MULTIPLIER = 1000.0
NEARLY = 2e-3  # calibration stops at this share below the wanted epsilon
_MAKER = object()  # what only this module can show to the constructor


class Unit(StrEnum):
    patient = "patient"  # one gradient a patient: the mean over the patient's images, clipped once
    image = "image"  # each image drawn and clipped for itself: several shares a patient


class Sampling(StrEnum):
    poisson = "poisson"  # each patient independently in each step
    shuffled = "shuffled"  # epochs over a shuffled list: charged without amplification


@dataclass(frozen=True)
class PlanSettings:
    """What is chosen before the noise is.

    Attributes:
        patients: N, as declared; public.
        sample_rate: q, the chance of each patient to be drawn in a step.
        steps: noised steps over the whole run, empty ones counted.
        max_grad_norm: C, the largest Euclidean norm of a patient's gradient.
        max_images_per_patient: k, of which a patient's gradient is the mean.
        stage: what is trained, a name of the run plan.
    """

    patients: int
    sample_rate: float
    steps: int
    delta: float = 1e-5
    max_grad_norm: float = 1.0
    max_images_per_patient: int = 8
    stage: str = "adapt"
    unit: Unit = Unit.patient
    sampling: Sampling = Sampling.poisson

    def faults(self) -> list[str]:
        """Everything that is wrong with these settings, one line each."""
        images = self.max_images_per_patient
        checks = [
            (self.patients >= 1, f"patients {self.patients}: at least 1"),
            (0 < self.sample_rate <= 1, f"sample_rate {self.sample_rate}: above 0, at most 1"),
            (self.steps >= 1, f"steps {self.steps}: at least 1"),
            (_positive(self.max_grad_norm), f"max_grad_norm {self.max_grad_norm}: above 0"),
            (images >= 1, f"max_images_per_patient {images}: at least 1"),
            (bool(self.stage), "stage: name what is trained"),
        ]  # fmt: skip
        found = [text for holds, text in checks if not holds]
        if self.unit is Unit.image and images > 1:
            found.append(
                "unit image: clipping images one by one does not protect a patient who has several. "
                "Use unit patient, or max_images_per_patient=1"
            )
        return found


@dataclass(frozen=True)
class PrivacyPlan(PlanSettings):
    """`PlanSettings` with their noise: the mechanism and its proof.

    Guarantees: `event` is computed from the very fields that the mechanism reads; the only ways to a plan
    check every field, and refuse image-level clipping under a patient's name and a delta of 1 / patients.

    Attributes:
        noise_multiplier: sigma, the noise's standard deviation over the clip.
    """

    noise_multiplier: float = 0.0
    maker: InitVar[object] = None

    def __post_init__(self, maker: object) -> None:
        if maker is not _MAKER:
            raise TypeError("a PrivacyPlan is made by calibrate() or PrivacyPlan.make(), never by hand")

    @classmethod
    def make(cls, settings: PlanSettings, noise_multiplier: float) -> PrivacyPlan:
        """The plan with this noise. Raises ``ConfigError`` listing every fault."""
        faults = settings.faults()
        if not _positive(noise_multiplier):
            faults.append(f"noise_multiplier {noise_multiplier}: above 0; without noise there is no plan")
        if faults:
            raise ConfigError("these settings are no privacy plan", faults)
        check_delta(settings.delta, settings.patients)
        chosen = {item.name: getattr(settings, item.name) for item in fields(PlanSettings)}
        return cls(**chosen, noise_multiplier=float(noise_multiplier), maker=_MAKER)

    @property
    def settings(self) -> PlanSettings:
        return PlanSettings(**{item.name: getattr(self, item.name) for item in fields(PlanSettings)})

    @property
    def expected_batch(self) -> float:
        """q N: what the sum of clipped gradients is divided by, whoever was drawn."""
        return self.sample_rate * self.patients

    @property
    def noise_std(self) -> float:
        """Standard deviation, per coordinate, of the noise on the sum of clipped patient gradients."""
        return self.noise_multiplier * self.max_grad_norm

    @property
    def noise_per_coordinate(self) -> float:
        """Standard deviation of the noise in the mean gradient, in clips: sigma / (q N)."""
        return self.noise_multiplier / self.expected_batch

    def event(self, steps: int | None = None) -> Event:
        """What ``steps`` of the mechanism (by default all) cost."""
        count = self.steps if steps is None else steps
        event = Event(self.noise_multiplier, self.sample_rate, count)
        return shuffled(event) if self.sampling is Sampling.shuffled else event

    def epsilon(self, history: Sequence[Event] = ()) -> float:
        """Of the whole run, together with what the same patients spent before. Patient, add/remove."""
        return epsilon([self.event(), *history], self.delta)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def digest(self) -> str:
        return sha256_of(self.to_json())

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PrivacyPlan:
        """The plan again, checked as if it were new. Raises ``ArtefactError`` if it is none."""
        try:
            given = dict(value)
            noise = given.pop("noise_multiplier")
            given |= {"unit": Unit(given["unit"]), "sampling": Sampling(given["sampling"])}
            return cls.make(PlanSettings(**given), noise)
        except (TypeError, ValueError, KeyError, ConfigError) as error:
            raise ArtefactError(f"not a privacy plan of this version: {error}") from error


def calibrate(settings: PlanSettings, target_epsilon: float, history: Sequence[Event] = ()) -> PrivacyPlan:
    """The plan with the least noise that keeps epsilon, after ``history``, at most ``target_epsilon``.

    Least to within 0.2 % of epsilon.

    Raises:
        ConfigError: if a setting is wrong, or if no noise is enough because ``history`` has spent it all.
    """
    if not _positive(target_epsilon):
        raise ConfigError(f"epsilon {target_epsilon}: above 0")
    PrivacyPlan.make(settings, 1.0)  # every fault before the search

    def spent(noise: float) -> float:
        return quick_epsilon([PrivacyPlan.make(settings, noise).event(), *history], settings.delta)

    def spent_by_rdp(noise: float) -> float:
        bound = rdp_epsilon([PrivacyPlan.make(settings, noise).event(), *history], settings.delta)
        return math.inf if bound is None else bound

    if not spent(MAX_NOISE_MULTIPLIER) <= target_epsilon:
        raise ConfigError(
            f"no noise keeps epsilon at {target_epsilon:g}: earlier releases about these patients have spent "
            "it. Raise the cap with a new signed policy, or leave those patients out"
        )
    root = settings.sample_rate * math.sqrt(2 * settings.steps * math.log(1 / settings.delta))
    start = max(0.5, root / target_epsilon)  # where a central limit would put it
    if math.isfinite(spent_by_rdp(MAX_NOISE_MULTIPLIER)):
        start = _least(spent_by_rdp, target_epsilon, start)  # cheap, and near
    noise = math.ceil(_least(spent, target_epsilon, start) * 1e4) / 1e4
    plan = PrivacyPlan.make(settings, noise)
    while plan.epsilon(history) > target_epsilon:  # the last digit of the two grids
        plan = PrivacyPlan.make(settings, round(plan.noise_multiplier + 1e-4, 4))
    return plan


def one_release(stage: str, target_epsilon: float, settings: PlanSettings) -> PrivacyPlan:
    """One noised sum over every patient of ``settings``: whose shares have norm 1 at most, nobody drawn.

    Its noise is the least that keeps the release alone at ``target_epsilon``. Raises ``ConfigError``.
    """
    single = replace(settings, stage=stage, sample_rate=1.0, steps=1, max_grad_norm=1.0)
    return calibrate(single, target_epsilon)


def _least(curve: Callable[[float], float], target: float, start: float) -> float:
    """Noise at which the falling ``curve`` is at most ``target`` and nearly it: a guarded secant in logs."""
    low, high, noise, slope = 1e-3, MAX_NOISE_MULTIPLIER, start, 1.3
    aim = target * (1 - NEARLY / 2)
    before: tuple[float, float] | None = None
    while high / low > 1 + NEARLY / 10:
        value = curve(noise)
        if target * (1 - NEARLY) <= value <= target:
            return noise
        low, high = (low, noise) if value <= target else (noise, high)
        if before is not None and noise != before[0] and 0 < value != before[1]:
            slope = min(4.0, max(0.3, math.log(value / before[1]) / math.log(before[0] / noise)))
        before = (noise, value)
        noise *= (value / aim) ** (1 / slope)
        if not low < noise < high:
            noise = math.sqrt(low * high)
    return high


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
