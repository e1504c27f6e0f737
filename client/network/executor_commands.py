"""Other people's code at a hospital, on the command line: ``site executor`` and ``site bundle``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import click

from common.console import print_json

FOLDER = click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
HOUR_S = 3600


@click.command()
@FOLDER
@click.option(
    "--node", required=True, help="The SuperNode's runtime API, HOST:PORT (flower-supernode --port)."
)
@click.option(
    "--socket", type=click.Path(path_type=Path), required=True,
    help="Of the guard: its folder is all of this site that a courier sees.",
)  # fmt: skip
@click.option(
    "--courier-user", help="As whom couriers run; by default nobody, with the group of the socket's folder."
)
@click.option(
    "--secret-file", type=click.Path(path_type=Path),
    help="What the SuperNode knows this executor by; by default FOLDER/executor.secret, made if missing.",
)  # fmt: skip
@click.option(
    "--root-certificates", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="By which a SuperNode with TLS is verified (PEM).",
)  # fmt: skip
@click.option("--no-sandbox", is_flag=True, help="Couriers run as this user, unconfined: for demonstrations.")
@click.option(
    "--max-hours", type=click.FloatRange(0, min_open=True), default=24.0, show_default=True,
    help="A task that takes longer is ended.",
)  # fmt: skip
def executor(folder: Path, node: str, max_hours: float, **given: Any) -> None:
    """Start couriers for the SuperNode of the site in FOLDER, of approved bundles alone.

    A task whose bundle is not in FOLDER/approved-bundles.txt is answered with an error, and none of its code
    runs. A courier runs in a sandbox made for its task, as a user who may not read this site's data. Start it
    as root, beside: flower-supernode --isolation process --superexec-auth-secret-file FOLDER/executor.secret

    \b
    Example:
      wardround site executor /srv/wardround --node 127.0.0.1:9094 --socket /run/wardround/guard.sock
    """
    from client.network.executing import Settings, execute

    execute(Settings(folder.resolve(), node, longest_s=max_hours * HOUR_S, **given), click.echo)


@click.group()
def bundle() -> None:
    """The bundles whose code may run at this site.

    \b
    Example:
      wardround site bundle approve /srv/wardround release.fab --note "reviewed by the board"
    """


@bundle.command()
@FOLDER
@click.argument("bundle")
@click.option("--note", default="", help="Why, or by whom; it stays here.")
def approve(folder: Path, bundle: str, note: str) -> None:
    """Let BUNDLE run at the site in FOLDER, from its next task on: its SHA-256, or its file.

    \b
    Example:
      wardround site bundle approve /srv/wardround release.fab --note "reviewed by the board"
    """
    from client.network.approved import ApprovedBundles, bundle_sha256

    sha256 = bundle_sha256(bundle)
    news = ApprovedBundles(folder).approve(sha256, note)
    click.echo(f"{sha256} {'is approved' if news else 'was approved before'}")


@bundle.command()
@FOLDER
@click.argument("bundle")
def revoke(folder: Path, bundle: str) -> None:
    """Let BUNDLE run no more at the site in FOLDER, from its next task on.

    \b
    Example:
      wardround site bundle revoke /srv/wardround release.fab
    """
    from client.network.approved import ApprovedBundles, bundle_sha256
    from common.errors import UsageError

    sha256 = bundle_sha256(bundle)
    if not ApprovedBundles(folder).revoke(sha256):
        raise UsageError(f"{sha256} was not approved: see wardround site bundle list {folder}")
    click.echo(f"{sha256} is revoked; what runs of it now goes on to the end of its task")


@bundle.command("list")
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_command(folder: Path, as_json: bool) -> None:
    """List the bundles that may run at the site in FOLDER.

    \b
    Example:
      wardround site bundle list /srv/wardround
    """
    from client.network.approved import ApprovedBundles

    approvals = ApprovedBundles(folder).read()
    if as_json:
        print_json([vars(approval) for approval in approvals])
        return
    for approval in approvals:
        click.echo(f"{approval.sha256}  {approval.since}  {approval.note}".rstrip())
    if not approvals:
        click.echo("none: every run is refused here")


@bundle.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def build(out: Path) -> None:
    """Build the bundle of this source release into OUT, and print its SHA-256.

    Whoever builds it from the same source gets the same bytes: compare, then approve.

    \b
    Example:
      wardround site bundle build release.fab
    """
    from common.durable import write_atomic
    from common.release import build_bundle

    content = build_bundle()
    write_atomic(out, content)
    click.echo(f"{hashlib.sha256(content).hexdigest()}  {out}{os.linesep}{len(content)} bytes".rstrip())
