"""What an item of the exam answers with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """One item's outcome. ``figure`` and ``limit`` are for the reader, ``passed`` is what counts."""

    item: str
    asked: str
    figure: str
    limit: str
    passed: bool

    def row(self) -> str:
        outcome = "pass" if self.passed else "FALLS SHORT"
        return f"| {self.item} | {self.asked} | {self.figure} | {self.limit} | {outcome} |"
