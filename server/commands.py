"""The coordinator's verbs on the command line."""

from __future__ import annotations

from pathlib import Path

import click

from common.console import print_json


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def report(run_dir: Path, as_json: bool) -> None:
    """Make report.html of the run in RUN_DIR again, from its report.json alone.

    \b
    Example:
      wardround report runs/demo-0-20260101-120000
    """
    from server.report import rebuild

    page = rebuild(run_dir)
    if as_json:
        print_json({"report": str(page)})
    else:
        click.echo(f"report: {page}")
