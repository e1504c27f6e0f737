"""A hospital's word on each job, on the command line: ``site jobs | approve | refuse | stop``."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console import print_json

if TYPE_CHECKING:
    from client.site import Site
    from client.steward import Job, Steward

FOLDER = click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
OFFICER = click.option("--officer", help="Who answers, as it is signed; by default this user's name.")


@click.command()
@FOLDER
@click.argument("job", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--plan", "copy_to", type=click.Path(path_type=Path),
    help="Write the plan of JOB to this file, as `privacy policy draft --plan` reads it.",
)  # fmt: skip
def jobs(folder: Path, job: str | None, as_json: bool, copy_to: Path | None) -> None:
    """List the jobs that were put to the site in FOLDER, or show JOB in words.

    JOB is the beginning of its digest. What is new in it is shown against the plan that was approved last.

    \b
    Examples:
      wardround site jobs /srv/wardround
      wardround site jobs /srv/wardround 3f9a51c2
    """
    from common.durable import write_atomic
    from common.errors import UsageError

    site, steward = _open(folder)
    if job is None:
        if copy_to is not None:
            raise UsageError("--plan: of which job? Name it")
        _list(steward, as_json)
        return
    found = steward.find(job)
    if copy_to is not None:
        write_atomic(copy_to, found.text.encode())
    _show(site, steward, found, as_json)


@click.command()
@FOLDER
@click.argument("job")
@OFFICER
@click.option("--until", default="", help="The last day (UTC, YYYY-MM-DD); by default the plan's own.")
def approve(folder: Path, job: str, officer: str | None, until: str) -> None:
    """Approve JOB, this very plan and no other, in the name of the site in FOLDER.

    The approval is signed with the site's key and takes effect at once; a running guard need not be
    restarted. It goes to the coordinator, --officer with it, when the sites are asked next.

    \b
    Example:
      wardround site approve /srv/wardround 3f9a51c2 --officer "M. Ruiz"
    """
    _, steward = _open(folder)
    found = steward.find(job)
    word = steward.approve(found.plan, officer or getpass.getuser(), until)
    click.echo(f"approved {found.plan.digest}, last day {word.expires or 'none'}, signed {word.key[:16]}")
    if steward.stopped:
        click.echo("this site has stopped taking part: wardround site stop --undo", err=True)


@click.command()
@FOLDER
@click.argument("job")
@click.option("--reason", required=True, help="Why, in one line; it stays at the site.")
@click.option("--tell", is_flag=True, help="Tell the coordinator the reason too.")
@OFFICER
def refuse(folder: Path, job: str, reason: str, tell: bool, officer: str | None) -> None:
    """Refuse JOB, or take its approval back: from the next order on nothing of it is worked on.

    \b
    Example:
      wardround site refuse /srv/wardround 3f9a51c2 --reason "too many rounds" --tell
    """
    _, steward = _open(folder)
    found = steward.find(job)
    steward.refuse(found.plan, officer or getpass.getuser(), reason, tell)
    click.echo(f"refused {found.plan.digest}; the reason {'goes along' if tell else 'stays here'}")


@click.command()
@FOLDER
@click.option("--undo", is_flag=True, help="Take part again; approvals are as they were.")
@OFFICER
def stop(folder: Path, undo: bool, officer: str | None) -> None:
    """End the part of the site in FOLDER in every job at once, whether or not the coordinator can be reached.

    A guard that is at work finishes its computation, and nothing of it leaves.

    \b
    Example:
      wardround site stop /srv/wardround
    """
    _, steward = _open(folder)
    if undo:
        click.echo("takes part again" if steward.undo_stop() else "it had not stopped")
        return
    steward.stop(officer or getpass.getuser())
    click.echo("stopped: every order is refused from now on; undo it with --undo")


def _open(folder: Path) -> tuple[Site, Steward]:
    from client.site import Site
    from client.steward import Steward

    site = Site.open(folder.resolve())
    return site, Steward(site)


def _list(steward: Steward, as_json: bool) -> None:
    rows = [_row(steward, digest, job) for digest, job in steward.jobs().items()]
    if as_json:
        print_json({"stopped": steward.stopped, "jobs": rows})
        return
    if steward.stopped:
        click.echo("STOPPED: this site takes part in nothing (wardround site stop --undo)")
    for row in rows:
        click.echo(
            f"{row['plan_sha256'][:12]}  {row['state']:<8}  came {row['arrived']}  "
            f"last day {row['expires'] or 'none'}  run {row['run_id']}"
        )
    if not rows:
        click.echo("no job was put to this site")


def _row(steward: Steward, digest: str, job: Job) -> dict[str, Any]:
    plan = job.plan
    return {
        "plan_sha256": digest, "state": steward.standing(plan), "arrived": job.arrived,
        "expires": plan.expires, "run_id": plan.run_id,
    }  # fmt: skip


def _show(site: Site, steward: Steward, job: Job, as_json: bool) -> None:
    from dataclasses import asdict

    from client import job_words
    from common.errors import ConsentRefused

    plan = job.plan
    last = steward.last_approved(but=plan.digest)
    new = [] if last is None else job_words.changed(last, plan)
    try:
        answer = steward.answer(plan)
    except ConsentRefused:
        answer = None
    if as_json:
        print_json({
            **_row(steward, plan.digest, job), "plan": job_words.comparable(plan),
            "leaving": [asdict(one) for one in job_words.leaving(site, plan)],
            "cost": job_words.cost(site, plan), "answer": None if answer is None else asdict(answer),
            "last_approved": None if last is None else last.digest,
            "changes": [{"key": key, "before": old, "now": now} for key, old, now in new],
        })  # fmt: skip
        return
    click.echo(f"job {plan.digest}\n  {steward.standing(plan)}, came {job.arrived}")
    if answer is not None:
        note = f" ({answer.note})" if answer.note else ""
        click.echo(f"  {answer.approval.answer} by {answer.approval.who} at {answer.approval.at}{note}")
    for line in job_words.lines(site, plan):
        click.echo(f"  {line}")
    if last is None:
        click.echo("no plan was approved before it")
        return
    click.echo(f"against {last.digest[:12]}, which was approved last:")
    for change in new:
        click.echo(f"  {job_words.change_line(*change)}")
