"""How a hospital joins a consortium and connects to it: ``site init``, ``site join`` and ``site node``."""

from __future__ import annotations

from pathlib import Path

import click

FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))


@click.command("init")
@FOLDER
@click.option("--name", required=True, help="The site's name: lower-case letters, digits and '-'.")
@click.option("--data", "manifest", type=click.Path(path_type=Path), help="The manifest of its images.")
def site_init(folder: Path, name: str, manifest: Path | None) -> None:
    """Make a hospital's keys in FOLDER, at the hospital, and the request to join that it sends.

    What is there already is kept. The request, FOLDER/join.json, holds public keys alone: send it to the
    coordinator, and read the fingerprint to them over the telephone.

    \b
    Example:
      wardround site init /srv/wardround --name harbour --data /data/manifest.csv
    """
    from client.network.joining import REQUEST, prepare_site
    from common.network.identity import spoken
    from common.privacy.keys import key_id

    prepared = prepare_site(folder, name, manifest)
    click.echo(f"made in {folder}: {', '.join(prepared.made) or 'nothing, all was there'}")
    if "ledger.key" in prepared.made:
        click.echo("Back up ledger.key and patients.key apart from each other; neither leaves this hospital.")
    click.echo(f"fingerprint {spoken(prepared.request.fingerprint)}")
    click.echo(f"ledger key  {key_id(prepared.request.ledger_key)}")
    click.echo(f"Send {folder / REQUEST} to the coordinator, and read them the fingerprint.")


@click.command("join")
@FOLDER
@click.argument("kit", type=click.Path(path_type=Path))
def site_join(folder: Path, kit: Path) -> None:
    """Keep the coordinator's KIT for the site in FOLDER, and show what to compare with them.

    \b
    Example:
      wardround site join /srv/wardround kit-harbour.json
    """
    from client.network.joining import take_kit
    from common.code_digest import code_sha256
    from common.network.certificates import system_clock
    from common.network.identity import spoken

    taken, expiry = take_kit(folder, kit, system_clock())
    click.echo(f"{taken.site} joins the consortium at {taken.address}")
    click.echo(f"consortium {spoken(taken.consortium)}")
    click.echo(f"release    {taken.release}")
    click.echo("Compare both with the coordinator over the telephone before you start the node.")
    if taken.release != code_sha256():
        click.echo("warning: this installation is another release than the consortium's", err=True)
    click.echo(f"{'warning: ' if expiry.near else ''}{expiry}", err=expiry.near)


@click.command("node")
@FOLDER
@click.option(
    "--socket", type=click.Path(path_type=Path), required=True,
    help="Where couriers reach this site's guard (wardround site guard).",
)  # fmt: skip
@click.option(
    "--port", type=click.IntRange(1, 65535), default=9094, show_default=True,
    help="On loopback, for this node's own processes; another one for a second node on a machine.",
)  # fmt: skip
@click.option(
    "--no-executor", is_flag=True,
    help="Let this node start couriers itself, of whatever bundle comes: for tests of the connection.",
)  # fmt: skip
def site_node(folder: Path, socket: Path, port: int, no_executor: bool) -> None:
    """Connect the site in FOLDER to its consortium, until Ctrl-C or SIGTERM.

    This is Flower's SuperNode, started from the kit. It connects outwards alone, to the one address there,
    and leaves couriers to the site's executor (wardround site executor --node 127.0.0.1:PORT).
    Exits with 12 for what is wrong with a certificate, and with 30 if the coordinator is not reached or does
    not take this site's key.

    \b
    Example:
      wardround site node /srv/wardround --socket /run/wardround/guard.sock
    """
    from client.network.executing import secret_file
    from client.network.node import NodePlan, run_node
    from common.network.certificates import system_clock
    from common.signals import told_to_end

    secret = None if no_executor else secret_file(folder.resolve())
    plan = NodePlan.of(folder.resolve(), socket.resolve(), port, secret)
    click.echo(f"node of {plan.kit.site} for {plan.kit.address}")
    with told_to_end() as told:
        run_node(plan, told.wait, click.echo, system_clock())
    click.echo(f"node of {plan.kit.site} ended")
