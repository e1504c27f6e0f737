"""``wardround privacy policy draft``: the one of the policy's verbs that reads a run's plan."""

from __future__ import annotations

from pathlib import Path

import click

FILE = click.Path(path_type=Path)


@click.command("draft")
@click.argument("site_folder", type=FILE)
@click.option("--plan", type=FILE, help="The run's plan; by default SITE_FOLDER/plan.json, of the last run.")
@click.option("--officer", required=True, help="The officer's name.")
@click.option("--officer-key", type=FILE, required=True, help="The officer's public key.")
@click.option("--out", type=FILE, required=True, help="The draft, a YAML file.")
def policy_draft(site_folder: Path, plan: Path | None, officer: str, officer_key: Path, out: Path) -> None:
    """Write a draft that allows exactly one run at the site in SITE_FOLDER, to be read and signed.

    What is looser in it than usual is printed. The caps over everything and over a year are the usual ones,
    or those of the run if that needs more.

    \b
    Example:
      wardround privacy policy draft SITE --officer Ruiz --officer-key officer.key.pub --out policy.yaml
    """
    from datetime import UTC, datetime

    import yaml

    from client.policy_draft import PLAN, draft_for, read_plan
    from client.site import Site
    from common.durable import write_atomic
    from common.errors import ArtefactError
    from common.privacy.keys import read_public_key

    if out.exists():
        raise ArtefactError(f"{out} exists: choose another file")
    site = Site.open(site_folder)
    asked = read_plan(plan or site_folder / PLAN)
    draft, cautions = draft_for(site, asked, (officer, read_public_key(officer_key)), datetime.now(UTC))
    write_atomic(out, yaml.safe_dump(draft, sort_keys=False, allow_unicode=True).encode())
    for caution in cautions:
        click.echo(f"look twice: {caution}")
    click.echo(
        f"draft: {out}. Read it, then: wardround privacy policy sign {out} --key KEY --out SITE_FOLDER"
    )
