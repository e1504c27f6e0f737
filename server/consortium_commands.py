"""The coordinator of a consortium on the command line: ``consortium``."""

from __future__ import annotations

import click


@click.group()
def consortium() -> None:
    """The coordinator: its jobs.

    \b
    Example:
      wardround consortium status runs/retina-1
    """
