"""What our HTML pages share: one style sheet, the wording of numbers, the marks of charts. No torch."""

from __future__ import annotations

from pathlib import Path

STYLE = Path(__file__).parent / "style.css"
