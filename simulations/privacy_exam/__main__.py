"""``python -m simulations.privacy_exam [ITEM ...]``: the exam at its full count, as a table."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click
import torch

from simulations.privacy_exam import (
    accounting,
    audit,
    copies,
    guard,
    ledger,
    mechanism,
    record,
    refusals,
    rounds,
    traffic,
)
from simulations.privacy_exam.verdict import Verdict

ITEMS: dict[str, Callable[[], Verdict]] = {
    "1": lambda: accounting.item_1(200),
    "2": lambda: accounting.item_2(200),
    "3": accounting.item_3,
    "4": lambda: ledger.item_4(20),
    "5": lambda: accounting.item_5(10, 1e-3),
    "6": accounting.item_6,
    "7": accounting.item_7,
    "8": accounting.item_8,
    "9": accounting.item_9,
    "10": lambda: mechanism.item_10(1_000_000),
    "11": lambda: mechanism.item_11(20, 1_000_000),
    "12": lambda: mechanism.item_12(200),
    "13": lambda: mechanism.item_13(10_000),
    "14": lambda: mechanism.item_14(1_000_000),
    "15": lambda: guard.item_15(5),
    "16": lambda: traffic.item_16(5, 13),
    "17": lambda: record.item_17(2000),
    "18": lambda: ledger.item_18(20),
    "19": lambda: ledger.item_19(200),
    "20": lambda: ledger.item_20(100),
    "21": refusals.item_21,
    "22": lambda: ledger.item_22(4.0),
    "23": ledger.item_23,
    "24": record.item_24,
    "25": lambda: guard.item_25(5),
    "26": lambda: refusals.item_26(200),
    "27": lambda: audit.item_27(500),
    "28": lambda: audit.item_28(1000),
    "29": lambda: audit.item_29(20),
    "30": lambda: copies.item_30(copies.Counts()),
    "31": lambda: audit.item_31(200),
    "35": rounds.item_35,
    "36": record.item_36,
}


@click.command()
@click.argument("items", nargs=-1, type=click.Choice(list(ITEMS)))
def main(items: tuple[str, ...]) -> None:
    """Run ITEMS, or all; exits with 1 if one falls short."""
    torch.set_num_threads(1)
    click.echo("| item | asked | figure | limit | |\n|---|---|---|---|---|")
    verdicts = []
    for item in items or ITEMS:
        verdicts.append(ITEMS[item]())
        click.echo(verdicts[-1].row())
    sys.exit(not all(verdict.passed for verdict in verdicts))


if __name__ == "__main__":
    main()
