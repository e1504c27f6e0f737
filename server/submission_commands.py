"""Jobs at the coordinator, on the command line: ``consortium submit | status``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from common.console import print_json

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=PATH, required=True, help="The run's folder: new, or empty.")
@click.option(
    "--roster", type=PATH, required=True,
    help="The sites that may be asked, with the fingerprint of each one's node and its signing key.",
)  # fmt: skip
@click.option(
    "--expires", type=click.IntRange(1, 3650), help="Days after which no site works on it any more."
)
@click.option("--bundle", default="", help="SHA-256 of the bundle whose code runs at the sites.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def submit(
    recipe: str, overrides: tuple[str, ...], out: Path, roster: Path, as_json: bool, **terms: Any
) -> None:
    """Stage RECIPE as a job in --out: its plan, which the sites are then asked to approve. Nothing is sent.

    \b
    Example:
      wardround consortium submit retina --roster roster.json --out runs/retina-1 --expires 30
    """
    from datetime import UTC, datetime

    from common.config import load_recipe
    from common.errors import UsageError
    from server.invited import read_roster
    from server.submission import Asked
    from server.submission import submit as stage

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: name another --out")
    asked = Asked(read_roster(roster), terms["expires"], terms["bundle"])
    plan = stage(load_recipe(recipe, overrides), out, asked, datetime.now(UTC).date())
    if as_json:
        print_json({"run_id": plan.run_id, "plan_sha256": plan.digest, "expires": plan.expires})
        return
    click.echo(
        f"job {plan.digest}\nrun {plan.run_id}, last day {plan.expires or 'none'}\n"
        f"Ask the sites (mode=ask), then: wardround consortium status {out}"
    )


@click.command()
@click.argument("run_dir", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def status(run_dir: Path, as_json: bool) -> None:
    """Show where each site stands to the job in RUN_DIR: who approved, refused or has not answered.

    \b
    Example:
      wardround consortium status runs/retina-1
    """
    from dataclasses import asdict

    from common.errors import UsageError
    from server.approvals import ApprovalBook, State
    from server.submission import Submission

    job = Submission.load(run_dir)
    if job is None:
        raise UsageError(f"{run_dir} holds no job (no plan.json): wardround consortium submit makes one")
    standings = ApprovalBook(job).standings()
    if as_json:
        about = {"run_id": job.plan.run_id, "plan_sha256": job.plan.digest, "expires": job.plan.expires}
        print_json(about | {"sites": [asdict(one) for one in standings]})
        return
    approved = sum(one.state is State.approved for one in standings)
    click.echo(f"job {job.plan.digest}: {approved} of {len(standings)} sites have approved it")
    for one in standings:
        details = [one.since and f"since {one.since}", one.who and f"by {one.who}", one.why]
        click.echo(f"  {one.site:<20} {one.state:<12} {', '.join(filter(None, details))}")
