"""The rehearsal: every test of this build's mechanism, with the very settings of a plan.

Briefly before a run (`client.account`), thoroughly when an officer asks (``wardround privacy audit``). No
patient's data are needed, so it may be repeated at will.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from client.dp.canaries import CanaryCheck, WorstCase, check_canaries, check_worst_case
from client.dp.mechanism import Execution
from client.dp.poisson import PoissonSampler
from client.dp.randomness import Randomness, SystemRandomness
from client.dp.rehearsal import (
    ClipCheck,
    NoiseCheck,
    SamplerCheck,
    check_clip,
    check_noise,
    check_sampler,
)
from common.code_digest import code_sha256
from common.privacy.plan import PrivacyPlan

NOISE, THOROUGH_NOISE = 200_000, 1_000_000  # numbers looked at: 0.52 % and 0.23 % of the spread are seen
DRAWS = 2_000  # of the sampler
PRESENCES = 20  # of each patient, at least: where q is small there are more draws
MOST_PATIENTS = 2_000  # that are drawn from; a sampler that is right for these is right for more
CANARIES = 1_000
ATTEMPTS = 3  # of noise and draws: a right build fails all of them once in millions of rehearsals


@dataclass(frozen=True)
class Rehearsal:
    """What was found of the code with digest ``code_sha256``, rehearsed with ``plan``.

    ``attempts``: how often noise and draws were tested, each time afresh; the last is shown. ``canaries``
    and ``worst_case`` are None after a brief one.
    """

    code_sha256: str
    plan: PrivacyPlan
    attempts: int
    noise: NoiseCheck
    sampler: SamplerCheck
    clip: ClipCheck
    canaries: CanaryCheck | None = None
    worst_case: WorstCase | None = None

    @property
    def passed(self) -> bool:
        checks = (self.noise, self.sampler, self.clip, self.canaries, self.worst_case)
        return all(check.passed for check in checks if check is not None)

    def to_json(self) -> dict[str, Any]:
        """``audits/rehearsal.json``."""
        canaries = None
        if self.canaries is not None:
            canaries = {**asdict(self.canaries.bound), "upper": self.canaries.upper}
        return {
            "schema": 1,
            "kind": "rehearsal",
            "passed": self.passed,
            "code_sha256": self.code_sha256,
            "plan": self.plan.to_json(),
            "attempts": self.attempts,
            "noise": {**asdict(self.noise), "quantiles": [list(pair) for pair in self.noise.quantiles]},
            "sampler": {
                **asdict(self.sampler),
                "sizes": {str(size): steps for size, steps in self.sampler.sizes.items()},
            },
            "clip": asdict(self.clip),
            "canaries": canaries,
            "worst_case": None if self.worst_case is None else asdict(self.worst_case),
        }

    def lines(self) -> list[str]:
        """For people."""
        noise, sampler = self.noise, self.sampler
        found = [
            f"REHEARSAL  {'passed' if self.passed else 'FAILED'}   code {self.code_sha256[:12]}",
            f"  noise: {noise.std:.4f} of the claimed spread (allowed {1 - noise.std_allowed:.4f} to "
            f"{1 + noise.std_allowed:.4f}), {noise.count:,} numbers, KS p {noise.ks_p:.3f}",
            f"  draws: rate {sampler.rate:.4f} of {sampler.asked_rate:g}, p {sampler.counts_p:.3f} of the "
            f"counts, {sampler.variance_p:.3f} of the batch sizes, {sampler.empty} of {sampler.steps} empty",
            f"  clip: an outlier {self.clip.outlier:.5f}, many images {self.clip.many_images:.5f} of a norm",
        ]
        if self.canaries is not None:
            bound = self.canaries.bound
            found.append(
                f"  canaries: {bound.right}/{bound.guesses} of {bound.canaries} right -> eps >= "
                f"{bound.lower:.2f}; {bound.ceiling:.2f} could show; claimed {self.canaries.upper:.2f}"
            )
        if self.worst_case is not None:
            worst = self.worst_case
            found.append(
                f"  worst case: {worst.trainings} trainings a side -> eps >= {worst.lower:.2f}; "
                f"{worst.ceiling:.2f} could show; claimed {worst.upper:.2f}"
            )
        return found


@lru_cache(maxsize=1)
def installed_code() -> str:
    """Digest of the code that runs here, whatever a plan says of its own."""
    return code_sha256()


def rehearse(plan: PrivacyPlan, source: Randomness | None = None, thorough: bool = False) -> Rehearsal:
    """Test noise, draws and clip with ``plan``'s settings; if ``thorough`` on more numbers, and by attacks.

    Args:
        source: None: the system's, as in a run.
    """
    source = source or SystemRandomness()
    attempts, numbers = 0, THOROUGH_NOISE if thorough else NOISE
    while True:
        attempts += 1
        noise = check_noise(source, plan.noise_std, plan.max_grad_norm, numbers)
        sampler = _check_draws(plan, source)
        if attempts == ATTEMPTS or (noise.passed and sampler.passed):
            break
    return Rehearsal(
        installed_code(),
        plan,
        attempts,
        noise,
        sampler,
        check_clip(plan.max_grad_norm, Execution(max(16, plan.max_images_per_patient))),
        check_canaries(plan, source, CANARIES) if thorough else None,
        check_worst_case(plan, source) if thorough else None,
    )


def _check_draws(plan: PrivacyPlan, source: Randomness) -> SamplerCheck:
    patients = [[row] for row in range(min(plan.patients, MOST_PATIENTS))]
    sampler = PoissonSampler(patients, plan.sample_rate, plan.max_images_per_patient)
    return check_sampler(sampler, source, max(DRAWS, round(PRESENCES / plan.sample_rate)))
