"""A hospital's own end of a consortium on the command line: ``site``."""

from __future__ import annotations

import os
from pathlib import Path

import click

MEBIBYTE = 1 << 20


@click.group()
def site() -> None:
    """One hospital: its keys and its node, its guard, its word on each job, and whose code runs there.

    \b
    Example:
      wardround site guard /srv/wardround --socket /run/wardround/guard.sock
    """


@site.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--socket", type=click.Path(path_type=Path), required=True,
    help="Where couriers reach the guard; its folder is the lock: who may enter it may ask.",
)  # fmt: skip
@click.option(
    "--max-mb", type=click.IntRange(1), default=256, show_default=True,
    help="A longer message is refused unread.",
)  # fmt: skip
def guard(folder: Path, socket: Path, max_mb: int) -> None:
    """Serve the guard of the site in FOLDER on a Unix socket, until Ctrl-C or SIGTERM.

    It alone opens the data, the policy, the ledger and the keys in FOLDER, and it runs the code of this
    installation whatever a run brings along. Start it before Flower's SuperNode, as a user of its own.

    \b
    Example:
      wardround site guard /srv/wardround --socket /run/wardround/guard.sock
    """
    from client.guard_process import guard_served, readable_by_others
    from client.site import Site
    from common.guard_link.service import Door, wait_for_signal
    from common.privacy.keys import SiteKeys

    with guard_served(folder.resolve(), Door(socket.resolve(), max_mb * MEBIBYTE)) as about:
        for path in readable_by_others(folder.resolve(), Site.open(folder.resolve())):
            click.echo(f"warning: every user of this machine can read {path}: chmod o-rwx it", err=True)
        click.echo(f"guard of {about.site} on {socket}, process {os.getpid()}, wardround {about.version}")
        click.echo(f"it signs its answers: public key {SiteKeys.open(folder.resolve()).public}")
        wait_for_signal()
    click.echo(f"guard of {about.site} ended")
