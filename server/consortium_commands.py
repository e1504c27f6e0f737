"""The coordinator of a consortium on the command line: ``consortium``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console import print_json

if TYPE_CHECKING:
    from server.network.consortium import Consortium

FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
DAYS = click.option(
    "--days",
    type=click.IntRange(1, 825),
    default=90,
    show_default=True,
    help="How long servers' certificates last.",
)
CA_DAYS = click.option(
    "--ca-days", type=click.IntRange(1, 3650), default=825, show_default=True,
    help="How long the authority's certificate lasts; kits hold it.",
)  # fmt: skip


def _clock() -> datetime:
    from common.network.certificates import system_clock

    return system_clock()


def _open(folder: Path) -> Consortium:
    from server.network.consortium import Consortium

    return Consortium.open(folder.resolve())


@click.group()
def consortium() -> None:
    """The coordinator: its authority, its members, and what hospitals reach.

    \b
    Example:
      wardround consortium init /srv/consortium --host fed.example.org
    """


@consortium.command()
@FOLDER
@click.option("--host", required=True, help="The name or address by which hospitals reach this coordinator.")
@click.option("--port", type=click.IntRange(1, 65535), default=8443, show_default=True)
@click.option("--listen", default="0.0.0.0", show_default=True, help="The address that nginx listens on.")
@click.option(
    "--superlink-port", type=click.IntRange(1, 65535), default=18443, show_default=True,
    help="On loopback: the SuperLink's, which nobody outside reaches.",
)  # fmt: skip
@click.option(
    "--body-mb",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="A longer request is refused unread.",
)
@DAYS
@CA_DAYS
def init(folder: Path, days: int, ca_days: int, **options: Any) -> None:
    """Make a consortium in FOLDER: its authority, its servers' certificates and its settings.

    \b
    Example:
      wardround consortium init /srv/consortium --host fed.example.org --port 8443
    """
    from common.network.identity import spoken
    from server.network.authority import authority_fingerprint
    from server.network.consortium import Consortium, Settings

    made = Consortium.create(folder.resolve(), Settings(**options), days, ca_days, _clock())
    click.echo(f"consortium {spoken(authority_fingerprint(made.folder))}")
    for expiry in made.expiries(_clock()):
        click.echo(str(expiry))
    click.echo(f"{folder / 'ca.key'} is needed by init and renew alone: keep it elsewhere in between.")
    click.echo(f"Next: wardround consortium serve {folder}, and consortium add for each hospital's join.json")


@consortium.command()
@FOLDER
@DAYS
@click.option("--authority", is_flag=True, help="Renew the authority's certificate too, for its same key.")
@CA_DAYS
def renew(folder: Path, days: int, authority: bool, ca_days: int) -> None:
    """Renew the servers' certificates of the consortium in FOLDER, under the same authority.

    Start `consortium serve` again afterwards. Members' kits stay as they are; with --authority they stay
    good until the old certificate ends, and `consortium kit` writes new ones.

    \b
    Example:
      wardround consortium renew /srv/consortium
    """
    opened = _open(folder)
    opened.renew(days, ca_days if authority else None, _clock())
    for expiry in opened.expiries(_clock()):
        click.echo(str(expiry))
    click.echo(f"Start it again: wardround consortium serve {folder}")


@consortium.command()
@FOLDER
@click.argument("request", type=click.Path(path_type=Path))
@click.option("--fingerprint", help="As the hospital reads it over the telephone; asked for if not given.")
def add(folder: Path, request: Path, fingerprint: str | None) -> None:
    """Make the hospital that sent REQUEST (join.json) a member of the consortium in FOLDER; write its kit.

    \b
    Example:
      wardround consortium add /srv/consortium harbour-join.json
    """
    from common.network.documents import read_request
    from common.network.identity import spoken
    from server.network.membership import add_member, check_fingerprint
    from server.network.registry import Registry

    opened, wanted = _open(folder), read_request(request)
    Registry(opened.folder).check(wanted)
    if fingerprint is None:
        click.echo(f"{wanted.name} sent {spoken(wanted.fingerprint)}")
        fingerprint = click.prompt("The fingerprint that the hospital reads to you")
    check_fingerprint(wanted, fingerprint)
    kit, known = add_member(opened, wanted, _clock())
    click.echo(
        f"{wanted.name} is {'registered' if known else 'queued until wardround consortium serve runs'}"
    )
    click.echo(f"Send it {kit}; nothing in it is secret.")


@consortium.command()
@FOLDER
@click.argument("site")
def kit(folder: Path, site: str) -> None:
    """Write the kit of the member SITE again: its name, or its fingerprint.

    \b
    Example:
      wardround consortium kit /srv/consortium harbour
    """
    from common.network.documents import write_document
    from server.network.membership import KITS, kit_for
    from server.network.registry import Registry

    opened = _open(folder)
    member = Registry(opened.folder).find(site)
    path = opened.folder / KITS / f"kit-{member.name}.json"
    write_document(path, kit_for(opened, member))
    click.echo(f"Send {member.name} {path}; nothing in it is secret.")


@consortium.command()
@FOLDER
@click.argument("site")
def remove(folder: Path, site: str) -> None:
    """End the membership of SITE, its name or its fingerprint: its node is refused from now on, for good.

    \b
    Example:
      wardround consortium remove /srv/consortium harbour
    """
    from server.network.membership import remove_member

    gone, known = remove_member(_open(folder), site, _clock())
    when = "is refused from now on" if known else "will be refused once wardround consortium serve runs"
    click.echo(f"{gone.name} is a member no more: its node {when}")


@consortium.command()
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def members(folder: Path, as_json: bool) -> None:
    """Show the members of the consortium in FOLDER, who is connected, and when certificates end.

    Exits with 12 if one is over, and says what renews it.

    \b
    Example:
      wardround consortium members /srv/consortium
    """
    from common.network.identity import spoken
    from server.network.membership import roll_of

    opened = _open(folder)
    roll, expiries = roll_of(opened), opened.expiries(_clock())
    if as_json:
        certificates = [
            {"what": expiry.what, "ends": expiry.ends.isoformat(), "days": expiry.days} for expiry in expiries
        ]
        print_json({"served": roll.served, "members": roll.to_json(), "certificates": certificates})
    else:
        for member, there in roll.rows:
            seen = {None: "unknown: nothing is served", True: "online", False: "not connected"}[there]
            click.echo(f"{member.name:<24} {member.state:<11} {seen if member.belongs else ''}".rstrip())
            click.echo(f"  {spoken(member.fingerprint)}")
        for expiry in expiries:
            click.echo(str(expiry))
    for expiry in opened.check_in_force(_clock()):
        click.echo(f"warning: {expiry}: wardround consortium renew {folder}", err=True)


@consortium.command()
@FOLDER
def serve(folder: Path) -> None:
    """Serve the consortium in FOLDER until Ctrl-C or SIGTERM: the SuperLink, and nginx in front of it.

    The SuperLink listens on loopback alone; outside there is an exact list of what a member's node calls.

    \b
    Example:
      wardround consortium serve /srv/consortium
    """
    from common.signals import told_to_end
    from server.network.service import attend, served

    opened = _open(folder)
    with told_to_end() as told, served(opened, click.echo, _clock()) as programs:
        settings = opened.settings
        click.echo(f"serving {settings.host}:{settings.port}; the SuperLink is at {opened.loopback_address}")
        attend(opened, programs, told.wait, click.echo)
    click.echo("ended")
