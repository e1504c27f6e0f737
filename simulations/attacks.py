"""Attacks on a run, to see what its defences bear: here poisoned updates.

    python -m simulations.attacks RECIPE [--site NAME] [--attack scale,flip,noise,outweigh] [--factor 100,...]
        [--robust none,auto,...] [--seeds 0,1,2] [--json FILE] [key=value ...]

The attacked site trains honestly; its courier changes each step of the teacher after the site's guard has
released it, and sends it as its own:

========  ======================================================================================
scale     the step times ``--factor``; a negative one turns it round
flip      the step times -1
noise     random numbers, as long as the honest step in each tensor
outweigh  the step times -1, with the largest weight that the server admits
========  ======================================================================================

A cell is the real walk up to the last of the teacher's rounds, as in `simulations.benchmark.aggregation`,
and its teacher is tested on every site's test patients. Beside the attacks on each estimator stands the same
run without one: there every site is honest, and its rounds show whether a small one is silenced.

FILE is rewritten after every cell, and what it holds already is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.app import app as client_app
from common import wire
from common.adapter import Adapter, AdapterUpdate
from common.errors import UsageError, WardroundError
from common.names import ROBUST_ESTIMATORS
from common.plan import Stage
from common.precision import pack, unpack
from common.recipe import GeneratorScope, Recipe
from common.schema_check import choose_from
from common.seeding import derive_seed
from common.teacher import teacher_for
from server.report.acceptance import acceptance
from simulations.benchmark.aggregation import CellFile, compare, tested, walked
from simulations.benchmark.pool import Pool
from simulations.loopback import Courier
from simulations.results import spread

POISONS = ("scale", "flip", "noise", "outweigh")


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        robust: the recipe's estimator.
        attack: of `POISONS`; empty: none.
        factor: of ``scale``; otherwise 1.
        site: that is attacked; empty: the last by name. Without an attack, empty.
    """

    robust: str
    attack: str = ""
    factor: float = 1.0
    site: str = ""

    def __str__(self) -> str:
        return f"{self.label}, robust {self.robust}"

    @property
    def label(self) -> str:
        return f"scale x {self.factor:g}" if self.attack == "scale" else self.attack or "no attack"

    @property
    def clean(self) -> Row:
        return Row(self.robust)


@dataclass(frozen=True)
class Cell:
    """What one row gave with one seed.

    Attributes:
        site: that was attacked, or would have been without a name.
        dice: of the global adapter, by `Pool.dice`'s keys.
        patients: site -> how many it was tested on.
        used: site -> share of the rounds in which its answer went into the result.
        rejected: site -> why its answer did not, a reason a round; sites that were always used are left out.
        cpu_s: processor seconds of the rounds, without the test.
    """

    row: Row
    seed: int
    site: str
    dice: dict[str, float]
    patients: dict[str, int]
    used: dict[str, float]
    rejected: dict[str, list[str]]
    cpu_s: float

    def dice_without(self, site: str) -> float:
        """Mean Dice over the test patients of all sites but one."""
        others = {name: count for name, count in self.patients.items() if name != site}
        total = sum(count * self.dice[f"site {name}"] for name, count in others.items())
        return total / sum(others.values())


def rows_of(attacks: Sequence[str], factors: Sequence[float], robust: Sequence[str], site: str) -> list[Row]:
    """The rows that are asked for: of each estimator, the run without an attack first.

    Raises ``UsageError`` for an attack or an estimator that there is not.
    """
    for option, names, known in (("attack", attacks, POISONS), ("robust", robust, ROBUST_ESTIMATORS)):
        for name in names:
            if name not in known:
                raise UsageError(f"--{option}: there is no {name!r}; {choose_from(name, known)}")
    poisons = [(name, factor) for name in attacks for factor in (factors if name == "scale" else [1.0])]
    found = [row for name in robust for row in (Row(name), *(Row(name, *poison, site) for poison in poisons))]
    return list(dict.fromkeys(found))


def poisoned(update: AdapterUpdate, row: Row, max_weight: float, seed: int) -> AdapterUpdate:
    """``update``, whose steps are float32, as ``row``'s attacker sends it.

    Args:
        max_weight: the largest that the server admits.
        seed: of the random numbers.
    """
    steps = update.adapter.tensors
    if row.attack == "noise":
        generator = torch.Generator().manual_seed(seed)
        random = {name: torch.randn(step.shape, generator=generator) for name, step in sorted(steps.items())}
        changed = {name: noise * (steps[name].norm() / noise.norm()) for name, noise in random.items()}
    else:
        times = row.factor if row.attack == "scale" else -1.0
        changed = {name: times * step for name, step in steps.items()}
    weight = max_weight if row.attack == "outweigh" else update.weight
    return replace(update, adapter=replace(update.adapter, tensors=changed), weight=weight)


def poisoning_courier(row: Row, recipe: Recipe, number: int) -> Courier:
    """The real courier of every site; that of site ``number``, by name, poisons what its guard released."""
    site = sorted(one.name for one in recipe.sites)[number]

    def carry(message: wire.Message, context: Any) -> wire.Message:
        reply: wire.Message = client_app(message, context)
        here = context.node_config["partition-id"] == number
        training = message.metadata.message_type == wire.ACTIONS[Stage.adapt]
        if here and training and wire.decode_refusal(reply.content) is None:
            order = wire.decode_order(message.content)
            _, update = wire.decode_update(reply.content)
            seed = derive_seed(recipe.run.seed, site, "poison", order.index)
            honest = replace(update, adapter=unpack(update.adapter))
            sent = poisoned(honest, row, recipe.policy.max_weight, seed)
            packed = pack(sent.adapter, recipe.aggregation.wire_dtype)
            reply.content = wire.encode_update(order, replace(sent, adapter=packed))
        return reply

    return carry if row.attack else client_app


def measure(pool: Pool, row: Row, folder: Path) -> Cell:
    """One cell; ``folder`` is empty, and takes the run and its sites.

    Raises:
        UsageError: there is no site of the row's name.
        ConfigError: the rule does not serve the row's estimator.
        FederationError: fewer than ``run.min_sites`` were left in a round.
    """
    recipe = replace(
        pool.recipe,
        aggregation=replace(pool.recipe.aggregation, robust=row.robust),
        generator=replace(pool.recipe.generator, scope=GeneratorScope.none),
    )
    names = sorted(site.name for site in recipe.sites)
    site = row.site or names[-1]
    if site not in names:
        raise UsageError(f"--site: there is no {site!r}; {choose_from(site, names)}")
    started = time.process_time()
    walk = walked(recipe, folder, poisoning_courier(row, recipe, names.index(site)))
    seconds = time.process_time() - started
    adapter: Adapter = walk.rules[Stage.adapt].global_adapter()
    rounds = [record for record in walk.outcome.rounds if record.stage == Stage.adapt]
    rejected: dict[str, list[str]] = {}
    for record in rounds:
        for one in record.rejected:
            rejected.setdefault(one.site, []).append(one.reason)
    return Cell(
        row,
        recipe.run.seed,
        site,
        tested(pool, teacher_for(adapter, walk.plan), adapter),
        {name: len(patients) for name, patients in pool.tests.items()},
        {one.site: one.share for one in acceptance(rounds)},
        rejected,
        seconds,
    )


def table(cells: Sequence[Cell]) -> str:
    """Markdown, a row each: means over the seeds, and behind a Dice every seed's own value.

    What the attacked site's own patients lose is apart: where it alone has images of their kind, they lose
    it with whatever defence, for nobody else can teach it.
    """
    site = next((cell.site for cell in cells if cell.row.attack), cells[0].site)
    head = [
        "attack", "estimator", "Dice, all sites (seeds)", "over no attack",
        f"over no attack, without {site}'s patients", f"rounds that used {site}", "least of the others",
        "rejected (rounds)", "CPU s",
    ]  # fmt: skip
    by_row: dict[Row, dict[int, Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, {})[cell.seed] = cell
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, mine in by_row.items():
        pairs = [(one, by_row[row.clean][seed]) for seed, one in mine.items()] if row.attack else []
        found = list(mine.values())
        columns = [
            row.label,
            row.robust,
            spread(one.dice["all"] for one in found),
            spread(one.dice["all"] - clean.dice["all"] for one, clean in pairs),
            spread(one.dice_without(site) - clean.dice_without(site) for one, clean in pairs),
            *_uses(found, site),
            _rejections(found),
            f"{np.mean([one.cpu_s for one in found]):.0f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _uses(cells: Sequence[Cell], site: str) -> tuple[str, str]:
    """In which share of the rounds ``site`` was used, and the least used of the others."""
    used = {name: float(np.mean([cell.used[name] for cell in cells])) for name in cells[0].used}
    own = used.pop(site)
    least = min(used, key=used.__getitem__)
    return f"{own:.0%}", f"{used[least]:.0%}" + (f" ({least})" if used[least] < 1 else "")


def _rejections(cells: Sequence[Cell]) -> str:
    """Site, reason and in how many rounds of all seeds."""
    counts: Counter[tuple[str, str]] = Counter()
    for cell in cells:
        counts.update((site, reason) for site, reasons in cell.rejected.items() for reason in reasons)
    return "; ".join(f"{site}: {reason} ({n})" for (site, reason), n in sorted(counts.items())) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--site", default="", help="that is attacked; without it the last by name")
    parser.add_argument("--attack", default=",".join(POISONS), help="names; none with ''")
    parser.add_argument("--factor", default="100", help="of scale; several with commas")
    parser.add_argument("--robust", default="none,auto", help="estimators (aggregation.robust)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every cell here")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    attacks = [name for name in given.attack.split(",") if name]
    try:
        factors = [float(factor) for factor in given.factor.split(",")]
        rows = rows_of(attacks, factors, given.robust.split(","), given.site)
        kept = CellFile(given.json, given.recipe, given.overrides, Cell)
        cells = compare([int(seed) for seed in given.seeds.split(",")], rows, kept, measure)
    except WardroundError as error:
        parser.exit(error.exit_code, f"{error}\n")
    sys.stdout.write(table(cells) + "\n")


if __name__ == "__main__":
    main()
