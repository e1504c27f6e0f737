"""Dealing patients into train, validation and test where the manifest does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from client.patients import Split
from common.errors import DataError
from common.seeding import derive_rng

TEST_SHARE = 0.25
VAL_SHARE = 0.15


def split_sizes(labelled: int) -> tuple[int, int, int]:
    """(train, val, test) of ``labelled`` patients: about 60/15/25; from two on, train and test have one."""
    if labelled < 2:
        return labelled, 0, 0
    test = max(1, math.floor(TEST_SHARE * labelled + 0.5))
    val = min(math.floor(VAL_SHARE * labelled + 0.5), labelled - test - 1)
    return labelled - test - val, val, test


def assign_splits(labelled: Sequence[str], unlabelled: Sequence[str], seed: int) -> dict[str, Split]:
    """Deal patients by `split_sizes`; the unlabelled, on which nothing can be measured, go to train.

    Independent of the order of the patients. Raises `DataError` with fewer than two labelled patients.
    """
    if len(labelled) < 2:
        raise DataError(
            f"{len(labelled)} labelled patients cannot be split into train and test: label at least two, "
            "or give the manifest a split column."
        )
    order = derive_rng(seed, "split").permutation(sorted(labelled)).tolist()
    train, val, _ = split_sizes(len(order))
    names = [Split.train] * train + [Split.val] * val + [Split.test] * (len(order) - train - val)
    return {**dict.fromkeys(unlabelled, Split.train), **dict(zip(order, names, strict=True))}
