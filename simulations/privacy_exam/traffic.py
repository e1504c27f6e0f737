"""Item 16: a private run's messages are public values, what the mechanism made, and nothing else.

Two ways that do not rest on each other: every message is taken apart, and each of its parts must be a value
that anybody could have told or a tensor that the mechanism returned; and the bytes are searched for what the
sites know, in the encodings in which numbers and texts usually travel.
"""

from __future__ import annotations

import base64
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, isfinite
from pathlib import Path

import torch
from torch import Tensor

from client.account import MECHANISM
from client.patients import Split, of_split
from client.private_adaptation import learning_rate
from client.site import Site
from client.students import build_student, start_of
from common import wire
from common.adapter import Adapter, AdapterUpdate
from common.guard_api import Metric, PlanAnswer, SiteCounts, SiteMetrics, StudentNote
from common.plan import Stage
from common.precision import pack
from common.privacy.heads import SignedHead
from simulations.loopback import FIRST_NODE_ID
from simulations.privacy_exam.hospital import order, private_recipe
from simulations.privacy_exam.verdict import Verdict
from simulations.privacy_exam.watching import PERSON, Watched, crowd, watched_run

DECLARED = 40
SEED = 815_302_947
DIGITS = 5  # a number with fewer is no marker
LONG = 8  # bytes that do not come about by chance among the values of a tensor


@dataclass(frozen=True)
class Marker:
    """``pattern`` would give ``kind`` away; ``upwards``: it may be in what the server sends."""

    kind: str
    pattern: bytes
    upwards: bool = False


def item_16(rounds: int, patients: int) -> Verdict:
    """A private run of two sites with ``patients`` training patients each, of which they declare others."""
    recipe = crowd(private_recipe(f"privacy.steps={rounds}", f"run.seed={SEED}"), patients, DECLARED)
    with tempfile.TemporaryDirectory() as name:
        watched = watched_run(recipe, Path(name))
        markers = list(markers_of(watched))
        hits = found_in(watched.grid.up, watched.grid.down, markers)
        strange = strange_parts(watched)
        leaks = leaky_messages(watched, markers)
        found = sum(kind in found_in([leak], [], markers) for kind, leak in leaks)
        size = sum(map(len, watched.grid.up + watched.grid.down))
    figure = (
        f"{sum(hits.values())} hits of {len(markers)} markers in {size / 1e6:.1f} MB"
        f"{' (' + ', '.join(hits) + ')' if hits else ''}; {strange} of {len(watched.grid.up)} answers hold "
        f"more than public values and noised steps; of {len(leaks)} leaks that were made {found} found"
    )
    passed = not hits and strange == 0 and found == len(leaks)
    return Verdict("16", "bytes of a private run's messages", figure, "0; 0; all", passed)


# --- the parts ----------------------------------------------------------------------------------------


def strange_parts(watched: Watched) -> int:
    """How many of the sites' answers hold anything that is not listed here."""
    strange, steps = 0, iter(watched.inside.made)
    for down, up in zip(watched.grid.down, watched.grid.up, strict=True):
        message, content = wire.unpack_message(down), wire.unpack_message(up).content
        site = watched.sites[message.metadata.dst_node_id - FIRST_NODE_ID].name
        request, stage = message.content, wire.decode_order(message.content).stage
        if stage is Stage.adapt:
            strange += not _is_step(watched, request, content, next(steps))
        elif stage is Stage.propose:
            plan = watched.plan
            own = plan.variants[0]
            public = PlanAnswer(site, True, plan.digest, preset=own.preset, rank=own.rank)
            answer = wire.decode_answer(content)
            strange += set(content) != {"body"} or replace(answer, ledger_head=None) != public
            strange += not _is_head(answer.ledger_head)
        else:
            strange += stage is not Stage.student or not _is_public_note(watched, site, content)
    return strange + len(list(steps))


def _is_step(watched: Watched, request: wire.Content, content: wire.Content, made: dict[str, Tensor]) -> bool:
    """Whether an update is the mechanism's step times the public rate, and beside it what the order said."""
    asked, sent, keys = wire.decode_order(request), wire.decode_adapter(request), set(content)
    nonce, update = wire.decode_update(content)
    rate = learning_rate(watched.plan, asked.index)
    step = replace(sent, tensors={name: -rate * tensor for name, tensor in made.items()})
    wanted = pack(step, watched.plan.aggregation.wire_dtype).tensors
    return (
        keys == {"body", "adapter", "adapter.head"}
        and nonce == asked.nonce
        and _is_head(update.ledger_head)
        and (update.weight, update.started_from, update.mechanism) == (DECLARED, sent.digest, MECHANISM)
        and all(loss != loss for loss in update.losses)
        and update.adapter.tensors.keys() == wanted.keys()
        and all(torch.equal(tensor, wanted[name]) for name, tensor in update.adapter.tensors.items())
    )


def _is_public_note(watched: Watched, site: str, content: wire.Content) -> bool:
    """Whether a note holds the student's architecture, two times of a blank image, and zeros."""
    name, data = watched.plan.student.name, watched.plan.data
    params = sum(part.numel() for part in build_student(name, data, False, 0).parameters())
    start = start_of(name, watched.plan.student.start)
    public = StudentNote(site, name, params, "", 0.0, 0.0, 0, 0, 0, start=start)
    sent = wire.decode_note(content)
    note = replace(sent, latency_ms=0.0, teacher_latency_ms=0.0, ledger_head=None)
    return set(content) == {"body"} and note == public and _is_head(sent.ledger_head)


def _is_head(head: SignedHead | None) -> bool:
    """Whether it is a count of entries, the hash of one, which has 128 random bits in it, and a signature."""
    return head is not None and head.holds


# --- the bytes ----------------------------------------------------------------------------------------


def found_in(up: list[bytes], down: list[bytes], markers: list[Marker]) -> dict[str, int]:
    """Kind -> hits. Short patterns are looked for outside tensors, whose every value is accounted for."""
    whole, beside = up + down, [_without_tensors(message) for message in up]
    hits: dict[str, int] = {}
    for marker in markers:
        places = beside if len(marker.pattern) < LONG else up if marker.upwards else whole
        if any(marker.pattern in place for place in places):
            hits[marker.kind] = hits.get(marker.kind, 0) + 1
    return hits


def _without_tensors(message: bytes) -> bytes:
    content = wire.unpack_message(message).content
    for array in content["adapter"].values() if "adapter" in content else ():
        message = message.replace(array.data, b"")
    return message


def markers_of(watched: Watched) -> Iterator[Marker]:
    """What no message may hold."""
    inside = watched.inside
    numbers = {"loss": inside.losses, "Dice": inside.dice, "norm": inside.norms}
    for kind, values in numbers.items():
        for value in sorted({value for value in values if _long(value)}):
            yield from (Marker(kind, pattern) for pattern in number_patterns(value))
    for row in inside.rows:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            raw = row.to(dtype).view(torch.uint8).numpy().tobytes()
            yield from (Marker("optimiser, sum or noise", pattern) for pattern in binary_patterns(raw))
    for key in inside.keys:
        yield from (Marker("key", pattern) for pattern in binary_patterns(key))
    for site in watched.sites:
        texts = [PERSON, str(site.folder), "manifest.csv", "images/", "masks/", "p000-0"]
        yield from (Marker("id or path", pattern) for text in texts for pattern in text_patterns(text))
        seeds = [watched.plan.seed, *(site.draw_seed(watched.plan, *path) for path in SEEDED)]
        yield from (Marker("seed", pattern, True) for seed in seeds for pattern in integer_patterns(seed))
        yield from (Marker("N", b'"%s":%d' % (key, count)) for key, count in counts_of(watched, site))


SEEDED = (("split",), ("student",), ("crops",), ("bootstrap",), ("adapt", 0))


def counts_of(watched: Watched, site: Site) -> list[tuple[bytes, int]]:
    """How many patients and images, under the names by which counts would travel."""
    everyone = watched.patients(site)
    images = sum(len(patient.samples) for patient in everyone)
    train = len(of_split(everyone, Split.train))
    return [(b"train", train), (b"weight", train), (b"patients", len(everyone)), (b"images", images)]


def _long(value: float) -> bool:
    return isfinite(value) and len(f"{value:.9e}".partition("e")[0].replace(".", "").strip("-0")) >= DIGITS


def number_patterns(value: float) -> Iterator[bytes]:
    """In decimals, rounded or cut, and as float32 and float64 in both byte orders, raw, hex and base64."""
    yield from {f"{value:.6g}".encode(), f"{value:.9e}"[:8].encode(), repr(value).encode()}
    for form in "<f", ">f", "<d", ">d":
        yield from binary_patterns(struct.pack(form, value))


def integer_patterns(value: int) -> Iterator[bytes]:
    yield str(value).encode()
    for ends in ("little", "big"):
        yield from binary_patterns(value.to_bytes(8, ends))


def text_patterns(text: str) -> Iterator[bytes]:
    yield text.encode("utf-16-le")
    yield from binary_patterns(text.encode())


def binary_patterns(raw: bytes) -> Iterator[bytes]:
    """As it is, in hex, in base64 alone and inside of something longer, wherever a group begins."""
    yield raw
    yield from (raw.hex().encode(), raw.hex().upper().encode(), base64.b64encode(raw))
    for before in range(3):
        first, last = ceil(4 * before / 3), (before + len(raw)) * 4 // 3
        if last - first > 5:
            yield base64.b64encode(bytes(before) + raw)[first:last]


# --- what the search must find -------------------------------------------------------------------------


def leaky_messages(watched: Watched, markers: list[Marker]) -> list[tuple[str, bytes]]:
    """Kind, and an answer in the wire's own words that gives it away."""
    site, plan, inside = watched.sites[0], watched.plan, watched.inside
    loss, dice = (next(value for value in values if _long(value)) for values in (inside.losses, inside.dice))
    asked = order(plan, Stage.adapt)
    bare = Adapter({"head": torch.ones(1)}, "ab", 0, "decoder")
    train, _, patients, images = (count for _, count in counts_of(watched, site))
    metric = Metric("teacher", "dice", "cell", dice, (dice, dice), patients)
    told = SiteMetrics(site.name, SiteCounts(patients, images, train, 1, 3), [metric])
    note = StudentNote(str(site.folder), "unet", 1, "", 0.0, 0.0, 0, 0, 0)
    texts = {marker.kind: marker.pattern for marker in markers if marker.pattern.isalnum()}
    hidden = ("key", "seed", "norm", "optimiser, sum or noise")
    contents = {
        "loss": wire.encode_update(asked, AdapterUpdate(bare, 3.0, "ab", losses=(loss, loss))),
        "N": wire.encode_update(asked, AdapterUpdate(bare, train, "ab")),
        "Dice": wire.encode_numbers(told),
        "id or path": wire.encode_numbers(note),
        **{kind: wire.encode_numbers(replace(note, site="x", name=texts[kind].decode())) for kind in hidden},
    }
    request = wire.unpack_message(watched.grid.up[0])
    leaks = []
    for kind, content in contents.items():
        request.content = content
        leaks.append((kind, wire.pack_message(request)))
    return leaks
