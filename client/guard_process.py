"""The guard as a process of the hospital's own: started before Flower, without it, and outliving its tasks.

What it runs is the site's own installation. The courier, whose code comes with the run, reaches it through a
socket and can send it messages; it cannot read its data, change its code, or make it answer an order twice.
Nor can it change an answer unseen: the guard signs each with the site's key.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from client.faults import border_answer, keep_fault
from client.guard import Guard
from client.orders import OrderBook
from client.site import Site
from common import wire
from common.code_digest import code_sha256
from common.errors import ArtefactError, ConfigError
from common.guard_link.guard_pb2 import Description
from common.guard_link.service import Door, served
from common.plan import Round, RunPlan, Stage
from common.privacy.keys import SIGNING_KEY, SiteKeys, read_private_key
from common.wire import desk
from common.wire.sealed import seal
from common.wire.signed import sign_reply


@contextmanager
def guard_served(folder: Path, door: Door) -> Iterator[Description]:
    """The guard of the site in ``folder`` listens on ``door`` until the block ends.

    A site without keys gets its own now: those that its ledger has, or will have.

    Raises:
        ConfigError: ``site.yaml`` is wrong, or nobody can listen there.
        ArtefactError: the book of orders or a key is damaged.
    """
    site = Site.open(folder)
    if not site.manifest.exists():
        raise ConfigError(f"{site.manifest} is missing: name the site's manifest in {folder / 'site.yaml'}")
    SiteKeys.open_or_create(folder)
    about = Description(site=site.name, version=version("wardround"), code_sha256=code_sha256())
    with served(door, answering(folder, site), about):
        yield about


def answering(folder: Path, site: Site) -> Callable[[Stage, wire.Content], wire.Content]:
    """Message -> answer, signed wherever it can be told which order it answers.

    Guarantee: a refusal holds a code and a field; the text stays in ``folder``.
    """
    guard, orders = Guard(site, own_process=True), OrderBook(folder)

    def answer(stage: Stage, content: wire.Content) -> wire.Content:
        order: Round | None = None
        try:
            order = wire.decode_order(content)
            if order.stage is not stage:
                raise ArtefactError("a message of one stage carries the order of another")
            orders.take(order)
            reply = desk.answer(guard, stage, order, content)
            if stage is not Stage.propose:
                reply = sealed(site.accepted_plan(order.plan_sha256), order, reply)
        except (Exception, SystemExit) as error:  # no text may leave
            keep_fault(f"in-process:{folder}", wire.ACTIONS[stage], error)
            reply = wire.encode_refusal(*border_answer(error))
        return reply if order is None else _signed(folder, site.name, order, reply)

    return answer


def sealed(plan: RunPlan, order: Round, reply: wire.Content) -> wire.Content:
    """``reply``, for the coordinator's eyes alone where ``plan`` names its key.

    Guarantee: of a plan with a key nothing but refusals and the answer to a proposal leaves readable.
    """
    return seal(reply, order, plan.coordinator_key) if plan.coordinator_key else reply


def _signed(folder: Path, site: str, order: Round, reply: wire.Content) -> wire.Content:
    """``reply`` under the site's key as it is now, for a ledger may go on with a new one."""
    try:
        return sign_reply(reply, site, order, read_private_key(folder / SIGNING_KEY))
    except (Exception, SystemExit) as error:
        keep_fault(f"in-process:{folder}", "signature", error)
        return wire.encode_refusal(*border_answer(error))  # unsigned, and nothing of the answer is in it


def readable_by_others(folder: Path, site: Site) -> list[Path]:
    """What of the site any user of this machine can read: the data's folder, the site's, keys and ledger."""
    watched = [site.manifest.parent, folder, *sorted(folder.glob("*.key")), *sorted(folder.glob("*.jsonl"))]
    shut = any(not stat.S_IMODE(parent.stat().st_mode) & 0o001 for parent in (folder, *folder.parents))
    if shut and site.manifest.is_relative_to(folder):
        return []  # nobody else gets as far as this folder
    return [path for path in watched if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o004]
