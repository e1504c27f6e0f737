"""The verbs of ``wardround privacy ledger``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.console import print_json

if TYPE_CHECKING:
    from common.privacy.ledger import Ledger

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
FILE = click.Path(path_type=Path)


def open_ledger(folder: Path) -> Ledger:
    """The ledger in ``folder``, with the policy's caps where a policy lies beside it."""
    from common.privacy.budget import Caps
    from common.privacy.ledger import Ledger
    from common.privacy.policy import POLICY, read_policy

    beside = folder / POLICY
    return Ledger.open(folder, read_policy(beside).caps if beside.exists() else Caps(1e-5))


@click.group("ledger")
def ledger_group() -> None:
    """A site's ledger: what was released about its patients, across runs and projects.

    \b
    Example:
      wardround privacy ledger show site
    """


@ledger_group.command("new")
@click.argument("folder", type=FILE)
@click.option("--site", required=True, help="The site's name.")
def ledger_new(folder: Path, site: str) -> None:
    """Start the ledger of a site in FOLDER, with its keys.

    \b
    Example:
      wardround privacy ledger new site --site harbour
    """
    from common.privacy.budget import Caps
    from common.privacy.ledger import Ledger

    ledger = Ledger.create(folder, site, Caps(1e-5))
    click.echo(
        f"{folder}: head {ledger.head.hash}. Back up ledger.key and patients.key apart from each other."
    )


@ledger_group.command("show")
@click.argument("folder", type=FILE)
@AS_JSON
def ledger_show(folder: Path, as_json: bool) -> None:
    """Check the ledger in FOLDER and show its entries, the head, and how many patients spent how much.

    \b
    Example:
      wardround privacy ledger show site
    """
    from common.privacy.budget import booked_epsilon, spent_epsilon

    ledger = open_ledger(folder)
    groups = [
        (c.patients, ledger.histories.events(n)) for n, c in ledger.histories.classes.items() if c.patients
    ]
    spent = sorted(
        [count, booked_epsilon(spent_epsilon(events, ledger.caps.delta))] for count, events in groups
    )
    if as_json:
        entries = [json.loads(entry.line()) for entry in ledger.entries]
        print_json(
            {"head": vars(ledger.head), "delta": ledger.caps.delta, "patients": spent, "entries": entries}
        )
        return
    for entry in ledger.entries:
        after = entry.epsilon_after.get(f"{ledger.caps.delta:g}")
        figure = "no guarantee" if after is None else f"{after:.3f}"
        click.echo(
            f"{entry.seq:5d} {entry.ts[:19]} {entry.type:<12} {entry.run_id:<20} {entry.stage:<10} {figure}"
        )
    for count, value in spent:
        click.echo(f"{count} patients: epsilon {'no guarantee' if value is None else f'{value:.3f}'}")
    click.echo(f"head {ledger.head.seq} {ledger.head.hash}")


@ledger_group.command("checkpoint")
@click.argument("folder", type=FILE)
@click.option("--key", type=FILE, required=True, help="The officer's private key.")
@click.option("--out", type=FILE, required=True, help="Where the officer keeps the signed head.")
def ledger_checkpoint(folder: Path, key: Path, out: Path) -> None:
    """Countersign the ledger's head: keep --out elsewhere, it shows a later cut or rollback.

    \b
    Example:
      wardround privacy ledger checkpoint site --key officer.key --out checkpoint.json
    """
    from common.durable import write_atomic
    from common.privacy.checkpoint import signed_checkpoint
    from common.privacy.entries import Context, EntryType
    from common.privacy.keys import public_key, read_private_key

    officer, ledger = read_private_key(key), open_ledger(folder)
    ledger.record(EntryType.checkpoint, Context(), {"officer": public_key(officer)})
    site = str(ledger.entries[0].detail["site"])
    write_atomic(out, signed_checkpoint(site, ledger.head, officer).encode())
    click.echo(f"{out}: head {ledger.head.seq} {ledger.head.hash}")


@ledger_group.command("merge")
@click.argument("folder", type=FILE)
@click.option("--kept", prompt="The id that stays", hide_input=True, help="Asked for if not given.")
@click.option("--other", prompt="The id that is the same person", hide_input=True, help="Asked for too.")
def ledger_merge(folder: Path, kept: str, other: str) -> None:
    """Two patient ids are one person: from now on the person has spent what both had.

    \b
    Example:
      wardround privacy ledger merge site
    """
    ledger = open_ledger(folder)
    ledger.merge(kept, other)
    click.echo(f"merged; head {ledger.head.seq} {ledger.head.hash}")


@ledger_group.command("roll")
@click.argument("folder", type=FILE)
def ledger_roll(folder: Path) -> None:
    """Go on with a new signing key, which the old one announces.

    \b
    Example:
      wardround privacy ledger roll site
    """
    ledger = open_ledger(folder)
    ledger.roll_key()
    click.echo(f"rolled; head {ledger.head.seq} {ledger.head.hash}")


@ledger_group.command("bundle")
@click.argument("folder", type=FILE)
@click.argument("out", type=FILE)
def ledger_bundle(folder: Path, out: Path) -> None:
    """Pack the records in FOLDER into the zip OUT for a verifier: no key, no patient.

    \b
    Example:
      wardround privacy ledger bundle site site.zip
    """
    from common.privacy.bundle import write_bundle

    click.echo(f"{out}: {', '.join(write_bundle(folder, out))}")
