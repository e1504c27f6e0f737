"""How a run ended, left in its folder for the command that started it; of Flower that hears only "failed"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.canonical import canonical_json
from common.durable import write_atomic
from common.errors import DEFECT_EXIT_CODE, FederationError, WardroundError

ENDING = "ending.json"


class RunEnded(FederationError):
    """A run between hospitals that did not end well; ``exit_code`` is the run's own, of any kind."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


@contextmanager
def told_in(run_dir: Path) -> Iterator[None]:
    """Leave in ``run_dir`` what the block raises, or that it raised nothing."""
    try:
        yield
    except WardroundError as error:
        _write(run_dir, error.exit_code, str(error))
        raise
    except Exception as error:
        _write(
            run_dir,
            DEFECT_EXIT_CODE,
            f"a defect of Wardround ({type(error).__name__}): see the SuperLink's log",
        )
        raise
    _write(run_dir, 0, "")


def _write(run_dir: Path, code: int, message: str) -> None:
    write_atomic(run_dir / ENDING, canonical_json({"exit_code": code, "message": message}).encode())


def forget(run_dir: Path) -> None:
    (run_dir / ENDING).unlink(missing_ok=True)


def raise_for(run_dir: Path, log: Path) -> None:
    """Raises ``RunEnded`` unless the run in ``run_dir`` ended well; ``log``: where else to look."""
    try:
        found = json.loads((run_dir / ENDING).read_text(encoding="utf-8"))
        code, message = int(found["exit_code"]), str(found["message"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RunEnded(f"the run ended without a word: see {log}", DEFECT_EXIT_CODE) from None
    if code:
        raise RunEnded(message, code)
