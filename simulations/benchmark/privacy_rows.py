"""What is measured of a recipe's privacy, and what came of it: rows, and a cell for each row and seed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from common.errors import UsageError
from common.recipe import PrivacyConfig


@dataclass(frozen=True)
class Row:
    """One way to a teacher.

    Attributes:
        epsilon: of each site's patients; None: no noise and no clip.
        steps: None: the recipe's noised steps.
        learning_rate: None: the recipe's, of noised steps or of an ordinary round.
        patients: that many of each site's labelled ones take part; None: all.
        best: of those without noise the one that is not held to the noised rows' terms: the whole decoder is
            trained, and every step draws new crops.
    """

    epsilon: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    patients: int | None = None
    best: bool = False

    @classmethod
    def parse(cls, text: str, patients: int | None = None) -> Row:
        """From ``EPSILON:STEPS:RATE``; without noise ``none`` or ``best`` in place of epsilon.

        Raises ``UsageError``.
        """
        parts = text.split(":")
        try:
            first, steps, rate = (*parts, *[""] * (3 - len(parts)))
            epsilon = None if first in ("none", "best") else float(first)
            taken, at = int(steps) if steps else None, float(rate) if rate else None
            row = cls(epsilon, taken, at, patients, first == "best")
        except ValueError as error:
            raise UsageError(
                f"no row {text!r}: write EPSILON:STEPS:RATE, such as 8, 3:40, none:300 or best:300"
            ) from error
        if row.epsilon is None and row.steps is None:
            raise UsageError(f"no row {text!r}: say for how many steps, such as none:300")
        return row

    def privacy(self, asked: PrivacyConfig) -> PrivacyConfig:
        """The recipe's settings with the row's own."""
        return replace(
            asked,
            epsilon=self.epsilon,
            noise_multiplier=None,
            steps=self.steps or asked.steps,
            learning_rate=self.learning_rate or asked.learning_rate,
        )

    def __str__(self) -> str:
        noise = "no noise" if self.epsilon is None else f"epsilon {self.epsilon:g}"
        noise += ", whole decoder and new crops" if self.best else ""
        steps = "the recipe’s" if self.steps is None else self.steps
        return f"{noise}, {steps} steps, {self.patients or 'all'} patients a site"


@dataclass(frozen=True)
class Cell:
    """One row with one seed.

    Attributes:
        dice: of the teacher, as `Pool.dice`.
        cpu_s: processor seconds of the teacher's training.
        steps: that were taken.
        noise: standard deviation, a coordinate, of the noise on a site's mean gradient, in clips.
        patients: of each site, on average.
        student: mean Dice of the sites' students, ``own`` on their own test patients, ``worst`` the lowest
            of these, ``all`` on everybody's; empty: none were trained.
    """

    row: Row
    seed: int
    dice: dict[str, float]
    cpu_s: float
    steps: int
    noise: float
    patients: float
    student: dict[str, float] = field(default_factory=dict)

    @property
    def sites(self) -> list[float]:
        """The teacher's Dice at each site."""
        return [value for name, value in self.dice.items() if name.startswith("site ")]
