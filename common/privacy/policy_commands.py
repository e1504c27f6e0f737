"""The verbs of ``wardround privacy policy``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from common.console import print_json
from common.privacy.ledger_commands import AS_JSON, FILE, open_ledger


@click.group("policy")
def policy_group() -> None:
    """A site's policy: what it allows, signed by its officer.

    \b
    Example:
      wardround privacy policy new harbour --officer "M. Ruiz" --officer-key officer.key.pub --out policy.yaml
    """


@policy_group.command("new")
@click.argument("site")
@click.option("--officer", required=True, help="The officer's name.")
@click.option("--officer-key", type=FILE, required=True, help="The officer's public key.")
@click.option("--out", type=FILE, required=True, help="The draft, a YAML file.")
def policy_new(site: str, officer: str, officer_key: Path, out: Path) -> None:
    """Write a draft that allows nothing to leave SITE, to be opened up where it should.

    Its payload rules list the tensors of a private run; its stages may not run before the draft says so.

    \b
    Example:
      wardround privacy policy new harbour --officer "M. Ruiz" --officer-key officer.key.pub --out policy.yaml
    """
    from datetime import UTC, datetime

    import yaml

    from common.durable import write_atomic
    from common.errors import ArtefactError
    from common.privacy.keys import read_public_key
    from common.privacy.policy import template

    if out.exists():
        raise ArtefactError(f"{out} exists: choose another file")
    plain = template(site, officer, read_public_key(officer_key), datetime.now(UTC))
    write_atomic(out, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())
    click.echo(
        f"draft: {out}. Edit it, then: wardround privacy policy sign {out} --key KEY --out SITE_FOLDER"
    )


@policy_group.command("sign")
@click.argument("draft", type=FILE)
@click.option("--key", type=FILE, required=True, help="The officer's private key.")
@click.option("--out", type=FILE, required=True, help="The site's folder.")
def policy_sign(draft: Path, key: Path, out: Path) -> None:
    """Sign DRAFT (YAML or JSON): policy.json and policy.json.sig in --out.

    \b
    Example:
      wardround privacy policy sign policy.yaml --key officer.key --out site
    """
    from common.privacy.keys import read_private_key
    from common.privacy.policy import read_policy, sign_policy

    policy = read_policy(draft)
    path = sign_policy(policy, out, read_private_key(key))
    click.echo(f"{path}: version {policy.version}, digest {policy.digest}")


@policy_group.command("show")
@click.argument("file", type=FILE)
@AS_JSON
def policy_show(file: Path, as_json: bool) -> None:
    """Show every field of the policy in FILE, defaults included.

    \b
    Example:
      wardround privacy policy show site/policy.json
    """
    import yaml

    from common.privacy.policy import read_policy

    plain = json.loads(read_policy(file).text())
    if as_json:
        print_json(plain)
    else:
        click.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), nl=False)


@policy_group.command("check")
@click.argument("file", type=FILE)
@click.option("--officer-key", type=FILE, required=True, help="The officer's public key.")
@click.option("--ledger", type=FILE, help="The site's folder: a policy older than its ledger's is refused.")
@AS_JSON
def policy_check(file: Path, officer_key: Path, ledger: Path | None, as_json: bool) -> None:
    """Check that the officer signed FILE and that it is in force now; exits with 20 if not.

    \b
    Example:
      wardround privacy policy check site/policy.json --officer-key officer.key.pub --ledger site
    """
    from datetime import UTC, datetime

    from common.privacy.keys import read_public_key
    from common.privacy.policy import load_signed
    from common.privacy.terms import check_in_force

    policy = load_signed(file, read_public_key(officer_key))
    entries = open_ledger(ledger).entries if ledger is not None else []
    check_in_force(policy, datetime.now(UTC), entries)
    found = {
        "policy_id": policy.policy_id,
        "version": policy.version,
        "sha256": policy.digest,
        "expires": policy.expires,
    }
    if as_json:
        print_json(found)
    else:
        click.echo(
            f"{policy.policy_id} version {policy.version} is signed and in force until {policy.expires}"
        )
