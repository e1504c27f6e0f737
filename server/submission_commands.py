"""Jobs at the coordinator, on the command line: ``consortium submit | ask | run | status``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.console import print_json

if TYPE_CHECKING:
    from server.submission import Asked

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=PATH, required=True, help="The run's folder: new, or empty.")
@click.option("--consortium", type=PATH, help="The consortium's folder; its members may be asked.")
@click.option(
    "--roster", type=PATH,
    help="Instead of a consortium: the sites, with the fingerprint of each one's node and its signing key.",
)  # fmt: skip
@click.option(
    "--expires", type=click.IntRange(1, 3650), help="Days after which no site works on it any more."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def submit(
    recipe: str, overrides: tuple[str, ...], out: Path, expires: int | None, as_json: bool, **whom: Path
) -> None:
    """Stage RECIPE as a job in --out: its plan, which the sites are then asked to approve. Nothing is sent.

    The job of a consortium names the bundle of this installation's source, whose code would run at the sites.

    \b
    Example:
      wardround consortium submit retina --consortium /srv/consortium --out runs/retina-1 --expires 30
    """
    from datetime import UTC, datetime

    from common.config import load_recipe
    from common.errors import UsageError
    from server.submission import submit as stage

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: name another --out")
    asked = _asked(whom["consortium"], whom["roster"], expires)
    plan = stage(load_recipe(recipe, overrides), out, asked, datetime.now(UTC).date())
    if as_json:
        about = {"run_id": plan.run_id, "plan_sha256": plan.digest, "expires": plan.expires}
        print_json({**about, "bundle_sha256": plan.bundle_sha256})
        return
    click.echo(
        f"job {plan.digest}\nbundle {plan.bundle_sha256 or 'none'}\n"
        f"run {plan.run_id}, last day {plan.expires or 'none'}\n"
        f"Next: wardround consortium ask {whom['consortium'] or 'FOLDER'} {out}"
    )


def _asked(consortium: Path | None, roster: Path | None, days: int | None) -> Asked:
    from common.canonical import sha256_of
    from common.errors import UsageError
    from common.release import build_bundle, bundle_code_sha256
    from server.invited import read_roster
    from server.network.consortium import Consortium
    from server.network.runs import roster_of
    from server.submission import Asked

    if consortium is not None and roster is None:
        bundle = build_bundle()
        members = roster_of(Consortium.open(consortium.resolve()))
        return Asked(members, days, sha256_of(bundle), bundle_code_sha256(bundle))
    if roster is not None and consortium is None:
        return Asked(read_roster(roster), days)
    raise UsageError("who is asked? Give --consortium FOLDER, or --roster FILE")


def _hand_over(folder: Path, run_dir: Path, mode: str) -> None:
    from common.signals import told_to_end
    from server.network.consortium import Consortium
    from server.network.runs import work

    with told_to_end() as told:
        work(Consortium.open(folder.resolve()), run_dir.resolve(), mode, told.wait)


@click.command()
@click.argument("folder", type=PATH)
@click.argument("run_dir", type=PATH)
@click.pass_context
def ask(context: click.Context, folder: Path, run_dir: Path) -> None:
    """Put the job in RUN_DIR to the sites that have not approved it, and show where each stands.

    \b
    Example:
      wardround consortium ask /srv/consortium runs/retina-1
    """
    _hand_over(folder, run_dir, "ask")
    context.invoke(status, run_dir=run_dir, as_json=False)


@click.command()
@click.argument("folder", type=PATH)
@click.argument("run_dir", type=PATH)
def run(folder: Path, run_dir: Path) -> None:
    """Run the job in RUN_DIR with the sites that approved it, or go on with it; the teacher is then there.

    The exit code is the run's own. Ctrl-C stops it at the SuperLink; what was folded is kept.

    \b
    Example:
      wardround consortium run /srv/consortium runs/retina-1
    """
    _hand_over(folder, run_dir, "run")
    click.echo(f"done: {run_dir}")


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
