"""What each site trains of the factors, and which mixtures of that a rule serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from common.adapter import Adapter
from common.names import ALTERNATING_RULES, FIXED_A_RULES, MIXED_PRESET_RULES, MIXED_RANK_RULES
from common.tuning.presets import halves_fault


@dataclass(frozen=True)
class Share:
    """What one site trains of the factors.

    Attributes:
        layers: that carry factors at this site, sorted.
        trains_a: False: the site trains B alone, and A never comes back from it.
    """

    preset: str
    rank: int
    layers: tuple[str, ...]
    trains_a: bool = True

    @classmethod
    def of(cls, adapter: Adapter) -> Share:
        """The share of a site that is sent ``adapter``."""
        sent_up = adapter.trained().tensors
        layers = tuple(adapter.layers())
        trains_a = all(f"{layer}.lora_A" in sent_up for layer in layers)
        return cls(adapter.preset, adapter.rank, layers, trains_a)


def share_faults(rule: str, initial: Adapter, shares: Mapping[str, Share]) -> list[str]:
    """Why ``rule`` cannot serve sites of ``shares`` from ``initial``, a line each; empty: it can.

    A rule's name says what it takes: see ``MIXED_RANK_RULES`` and its neighbours in `common.recipe`.
    """
    if rule not in MIXED_RANK_RULES:
        faults = list(_unlike(rule, initial, shares))
    elif rule not in MIXED_PRESET_RULES:
        faults = [*_ranks_out_of_range(initial, shares), *_other_layers(rule, initial, shares)]
    else:
        faults = [*_ranks_out_of_range(initial, shares), *_layers_that_do_not_fit(initial, shares)]
    return [*faults, *_other_halves(rule, shares)]


def _unlike(rule: str, initial: Adapter, shares: Mapping[str, Share]) -> Iterator[str]:
    for site, share in sorted(shares.items()):
        if (share.rank, list(share.layers)) != (initial.rank, initial.layers()):
            yield (
                f"site {site!r} has {share.preset} of rank {share.rank}, the adapter {initial.preset} of "
                f"rank {initial.rank}: {rule} has no mean of other layers or ranks; "
                "use aggregation.rule=exact_split"
            )


def _ranks_out_of_range(initial: Adapter, shares: Mapping[str, Share]) -> Iterator[str]:
    for site, share in sorted(shares.items()):
        if share.layers and not 1 <= share.rank <= initial.rank:
            yield (
                f"site {site!r} has rank {share.rank}; it must lie in 1 to {initial.rank}, the highest of "
                "the run"
            )


def _other_layers(rule: str, initial: Adapter, shares: Mapping[str, Share]) -> Iterator[str]:
    for site, share in sorted(shares.items()):
        if list(share.layers) != initial.layers():
            yield (
                f"site {site!r} has {share.preset}, with other layers than {initial.preset}: {rule} takes "
                "several ranks, but the same layers; use aggregation.rule=exact_split"
            )


def _layers_that_do_not_fit(initial: Adapter, shares: Mapping[str, Share]) -> Iterator[str]:
    known = initial.layers()
    for site, share in sorted(shares.items()):
        if strange := sorted(set(share.layers) - set(known)):
            yield f"site {site!r} trains layers that the run does not have: {strange}"
        # Its weight would count twice: inside the fused layer, and as the part that was cut from it.
        if cut := [name for name in share.layers if any(name.startswith(f"{other}.") for other in known)]:
            yield f"site {site!r} trains parts of layers that others train whole: {cut}"


def _other_halves(rule: str, shares: Mapping[str, Share]) -> Iterator[str]:
    """Sites that train A where the rule wants it fixed, or keep it fixed where the rule wants it trained."""
    unfit = {True: FIXED_A_RULES, False: ALTERNATING_RULES}
    for site, share in sorted(shares.items()):
        if share.layers and rule in unfit[share.trains_a]:
            yield f"site {site!r} has {halves_fault(share.preset, rule)}"
