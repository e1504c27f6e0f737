"""The verbs of a simulated consortium: ``demo``, ``simulate``, ``recipes``, ``validate``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common import interrupts, progress
from common.console import print_json
from common.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from common.recipe import Recipe
    from server.report.schema import BenefitCell

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
OUT = click.option(
    "--out", type=click.Path(path_type=Path), default=None,
    help="The run's folder; by default runs/RECIPE-SEED-TIME.",
)  # fmt: skip
QUIET = click.option(
    "--quiet", is_flag=True, expose_value=False, help="Show no progress.",
    callback=lambda _context, _parameter, quiet: progress.configure(quiet),
)  # fmt: skip


@click.command()
@OUT
@QUIET
@AS_JSON
def demo(out: Path | None, as_json: bool) -> None:
    """Run three simulated hospitals on this machine, from images to students and a report.

    The same as: wardround simulate demo

    \b
    Example:
      wardround demo --out runs/demo
    """
    _run("demo", [], out, resume=False, as_json=as_json)


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@OUT
@click.option("--engine", type=click.Choice(["loopback", "ray"]), help="The same as run.engine=...")
@click.option("--resume", is_flag=True, help="Go on with the interrupted run in --out.")
@QUIET
@AS_JSON
def simulate(
    recipe: str, overrides: tuple[str, ...], out: Path | None, engine: str | None, resume: bool, as_json: bool
) -> None:
    """Run the consortium of RECIPE (a name or a YAML file) on this machine.

    Any setting of the recipe can be replaced: KEY=VALUE.

    \b
    Examples:
      wardround simulate demo run.seed=1 --out runs/demo-1
      wardround simulate retina data.root=../shared/data sites.chase.student=unet-xs
      wardround simulate demo --out runs/demo-1 --resume
    """
    settings = [*overrides, *([f"run.engine={engine}"] if engine else [])]
    _run(recipe, settings, out, resume, as_json)


def _run(name: str, overrides: Sequence[str], out: Path | None, resume: bool, as_json: bool) -> None:
    from common.config import load_recipe

    recipe = load_recipe(name, overrides)
    run_dir = run_folder(recipe, out, resume)
    if resume:
        check_same_recipe(recipe, run_dir)
    # Only now: it loads torch, and every fault above is told without it.
    from simulations.simulate import simulate as run_recipe

    interrupts.set_resume(
        run_dir, ["wardround", "simulate", name, *overrides, "--out", str(run_dir), "--resume"]
    )
    run_dir = run_recipe(recipe, run_dir, resume)
    interrupts.clear_resume()
    progress.end()
    _print_result(run_dir, as_json)


def run_folder(recipe: Recipe, out: Path | None, resume: bool) -> Path:
    """The folder to run in. Raises ``UsageError`` if it is taken, or if there is no run in it to resume."""
    if resume:
        if out is None:
            raise UsageError("--resume: which run? Name its folder with --out")
        if not (out / "config.yaml").is_file():
            raise UsageError(
                f"--resume: {out} holds no run (no config.yaml); name another --out, or leave out --resume"
            )
        return out
    if out is None:
        moment = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        out = Path("runs") / f"{recipe.name}-{recipe.run.seed}-{moment}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: add --resume to go on with that run, or name another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be made ({error.strerror}): name another --out") from error
    return out


def check_same_recipe(recipe: Recipe, run_dir: Path) -> None:
    """Raises ``ConfigError``, naming every difference, unless the run in ``run_dir`` is of this recipe."""
    from common.config import differences, load_run_config

    changed = differences(load_run_config(run_dir / "config.yaml"), recipe)
    if changed:
        faults = [f"{key}: the run has {before!r}, this command {now!r}" for key, before, now in changed]
        raise ConfigError(
            f"{run_dir} is a run of another recipe: give its own settings, or another --out", faults
        )


def _print_result(run_dir: Path, as_json: bool) -> None:
    from server.report.schema import RunReport

    report = RunReport.load(run_dir / "report.json")
    means = mean_dice(report.benefit)
    page = run_dir / "report.html"
    if as_json:
        print_json({"run": str(run_dir), "report": str(page), "mean_dice": means})
        return
    click.echo(f"{'mean Dice':<22} {'own site':>9} {'all sites':>10}")
    for model, row in means.items():
        click.echo(f"{model:<22} {_number(row['own']):>9} {_number(row['all']):>10}")
    click.echo(f"report: {page}")


def mean_dice(benefit: Sequence[BenefitCell]) -> dict[str, dict[str, float | None]]:
    """Model -> tested_on (own, all) -> mean Dice over sites and classes; None where nothing was released."""
    models = list(dict.fromkeys(cell.model for cell in benefit))
    first = [model for model in ("student", "teacher") if model in models]
    ordered = first + [model for model in models if model not in first]
    return {model: {where: _mean(benefit, model, where) for where in ("own", "all")} for model in ordered}


def _mean(benefit: Sequence[BenefitCell], model: str, tested_on: str) -> float | None:
    values = [
        cell.value
        for cell in benefit
        if (cell.model, cell.tested_on, cell.metric) == (model, tested_on, "dice") and cell.value is not None
    ]
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@click.command()
@AS_JSON
def recipes(as_json: bool) -> None:
    """List the recipes in configs/.

    \b
    Example:
      wardround recipes
    """
    from common.config import list_recipes

    found = list_recipes()
    if as_json:
        print_json([{"name": name, "description": description} for name, description in found])
        return
    width = max(len(name) for name, _ in found)
    for name, description in found:
        click.echo(f"{name:<{width}}  {description}")


@click.command()
@click.argument("names", nargs=-1, metavar="[RECIPE]... [KEY=VALUE]...")
@AS_JSON
def validate(names: tuple[str, ...], as_json: bool) -> None:
    """Check recipes (all, if none is named) and list every fault at once.

    A recipe on real images is checked without them, and says so, if no data.root is given.
    Exits with 10 if there is a fault.

    \b
    Examples:
      wardround validate
      wardround validate retina data.root=../shared/data
    """
    from common.config import check_recipe, list_recipes

    overrides = [name for name in names if "=" in name]
    chosen = [name for name in names if "=" not in name] or [name for name, _ in list_recipes()]
    checks = {name: check_recipe(name, overrides) for name in chosen}
    if as_json:
        print_json({name: {"faults": check.faults, "notes": check.notes} for name, check in checks.items()})
    else:
        for name, check in checks.items():
            state = f"{len(check.faults)} fault(s)" if check.faults else "in order"
            click.echo("; ".join([f"{name}: {state}", *check.notes]))
    faults = [fault if fault.startswith("there is no") else f"{name}: {fault}"
              for name, check in checks.items() for fault in check.faults]  # fmt: skip
    if faults:
        raise ConfigError(f"{len(faults)} fault(s) in {len(checks)} recipe(s)", faults)
