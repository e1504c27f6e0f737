"""``consortium demo``: a whole network of hospitals on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from common.console import print_json


@click.command("demo")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--recipe", default="demo", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="New or empty, and kept; by default gone afterwards."
)
@click.option("--compare", is_flag=True, help="Simulate the same recipe too, and compare the adapters.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def network_demo(
    overrides: tuple[str, ...], recipe: str, out: Path | None, compare: bool, as_json: bool
) -> None:
    """Run a consortium on this machine: nginx, SuperLink, and for each hospital a node, an executor, a guard.

    Every part is a process of its own, in a folder of its own; they speak over TLS, and all have ended when
    this has. With --compare it exits with 22 if a simulation of the same recipe gives another adapter.

    \b
    Example:
      wardround consortium demo --compare
    """
    from common.config import load_recipe
    from common.errors import UsageError, VerificationFailed
    from common.signals import told_to_end
    from simulations.network_demo import folder_of, run_network

    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: name another --out")
    loaded = load_recipe(recipe, overrides)
    with folder_of(out) as folder, told_to_end() as told:
        outcome = run_network(loaded, folder, lambda line: click.echo(line, err=as_json), told.wait)
        simulated = _simulated(loaded, folder) if compare else None
    if as_json:
        left = [asdict(one) for one in outcome.left]
        print_json({"adapter_sha256": outcome.adapter_sha256, "simulated": simulated, "left": left})
    else:
        click.echo("what left each hospital, from its receipts:")
        for one in outcome.left:
            click.echo(f"  {one.site:<14} {one.stage:<10} {one.payloads:>3} payloads {one.bytes:>10,} bytes")
        click.echo(f"adapter {outcome.adapter_sha256}")
    if simulated not in (None, outcome.adapter_sha256):
        raise VerificationFailed(f"the simulation's adapter is another one: {simulated}")
    if simulated is not None and not as_json:
        click.echo("the simulation's adapter is the same")


def _simulated(recipe: object, folder: Path) -> str:
    import json

    from common.recipe import Recipe
    from simulations.simulate import simulate

    assert isinstance(recipe, Recipe)
    run_dir = simulate(recipe, folder / "simulated", resume=False)
    return str(json.loads((run_dir / "teacher" / "card.json").read_text())["adapter_sha256"])
