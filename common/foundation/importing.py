"""Convert an official checkpoint into a teacher: its encoder as it is, and a fresh mask decoder on top.

A checkpoint whose keys or shapes are not exactly those of a known layout is refused with all of them named;
no weight is ever initialised in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import checkpoints
from common.backbones import build_backbone
from common.decoder import MaskDecoder
from common.errors import ArtefactError, UsageError
from common.foundation.catalogue import CATALOGUE, IMAGENET_MEAN, IMAGENET_STD, KnownTeacher, of_hub
from common.foundation.layouts import MODEL_TYPES, Layout, Shapes, encoder_config, layouts
from common.foundation.sources import Checkpoint, hub_id_of, open_checkpoint
from common.schema_check import choose_from
from common.seeding import derive_seed
from common.teacher import HEADS

DECODER_SEED = 0  # of every imported teacher's fresh decoder


@dataclass(frozen=True)
class ImportOptions:
    """What the user said beside source and destination; each attribute is an option of the command."""

    model: str | None = None
    name: str | None = None
    download: bool = False
    accept_licence: bool = False
    replace: bool = False


@dataclass(frozen=True)
class Identity:
    """What a checkpoint turned out to be.

    ``known`` is None for an architecture that the catalogue does not list; ``how`` says what it was told by.
    """

    known: KnownTeacher | None
    how: str
    family: str
    config: dict[str, Any]
    layout: Layout


def import_teacher(source: str, destination: Path, options: ImportOptions) -> dict[str, Any]:
    """Write ``NAME.safetensors`` and ``NAME.json`` into ``destination``; return the card.

    Guarantees: the encoder's tensors are the checkpoint's, bit for bit; the decoder is the same in every
    import of the same encoder; ``destination`` is untouched by a checkpoint that is refused; nothing is
    downloaded unasked.

    Raises:
        ArtefactError: the checkpoint is not there, not readable, or not exactly a known layout; every key
            that does not fit is named.
        UsageError: the model must be named, its licence accepted, or the name is taken.
    """
    if options.model is not None and options.model not in CATALOGUE:
        raise UsageError(
            f"there is no model {options.model!r}; {choose_from(options.model, list(CATALOGUE))}"
        )
    _check_licence(_named(source, options.model), options)  # before anything is fetched
    checkpoint = open_checkpoint(source, options.download)
    identity = identify(checkpoint, _named(source, options.model))
    _check_licence(identity.known, options, identity.family)
    name = _free_name(checkpoint, identity, destination, options)
    tensors = teacher_tensors(checkpoint, identity)
    return checkpoints.save(name, tensors, _card(checkpoint, identity, tensors), destination)


def _named(source: str, model: str | None) -> KnownTeacher | None:
    """The entry that the user named, as the model or by its hub repository."""
    if model is not None:
        return CATALOGUE[model]
    if source in CATALOGUE and hub_id_of(source):
        return CATALOGUE[source]
    return of_hub(hub_id_of(source) or "")


def _check_licence(known: KnownTeacher | None, options: ImportOptions, family: str = "") -> None:
    bound = known is not None and known.must_accept_licence
    if (bound or family == "dinov3") and not options.accept_licence:
        terms = f"https://huggingface.co/{(known or CATALOGUE['dinov3-vits16']).hub_id}"
        raise UsageError(f"DINOv3 has a licence of its own: read it ({terms}), then add --accept-licence")


# --- What is it? ------------------------------------------------------------------------------------


def identify(checkpoint: Checkpoint, named: KnownTeacher | None) -> Identity:
    """Which model a checkpoint holds and in which layout.

    Args:
        named: what the user said it is; None lets its config, or else its shapes, decide.

    Raises:
        ArtefactError: it is none, with every key that does not fit the nearest layout.
        UsageError: it may be several; the text lists them.
    """
    shapes = {key: tuple(value.shape) for key, value in checkpoint.tensors.items()}
    if checkpoint.config is None:
        entries = [named] if named else list(CATALOGUE.values())
        return _by_shapes(checkpoint.origin, shapes, entries, "name" if named else "shapes")
    family, config = _own_config(checkpoint)
    if named is not None:
        _same_architecture(checkpoint.origin, named, family, config)
        known, how = named, "name"
    elif checkpoint.hub_id:  # somebody's own model, whatever its architecture
        known, how = None, "config.json"
    else:
        known, how = _by_config(checkpoint, family, config), "config.json"
    candidates = layouts(family, config, checkpoint.config)
    layout = _fitting(checkpoint.origin, known.name if known else family, candidates, shapes)
    return Identity(known, how if known else "config.json, not in the catalogue", family, config, layout)


def _own_config(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """Family and encoder config that config.json states."""
    assert checkpoint.config is not None
    model_type = str(checkpoint.config.get("model_type"))
    if model_type not in MODEL_TYPES:
        raise ArtefactError(
            f"{checkpoint.origin} is of type {model_type!r}, which no teacher is made from; "
            f"{choose_from(model_type, list(MODEL_TYPES))}"
        )
    family, below = MODEL_TYPES[model_type]
    given = checkpoint.config.get(below) if below else checkpoint.config
    if not isinstance(given, Mapping):
        raise ArtefactError(f"config.json of {checkpoint.origin} has no {below}; fetch it again")
    return family, encoder_config(family, given)


def _same_architecture(origin: str, named: KnownTeacher, family: str, config: dict[str, Any]) -> None:
    if family != named.family:
        raise ArtefactError(f"{origin} is a {family} encoder, and {named.name} a {named.family} one")
    expected = encoder_config(family, named.config)
    faults = [
        f"{key}: {config[key]} in config.json, {expected[key]} in {named.name}"
        for key in expected
        if config[key] != expected[key]
    ]
    if faults:
        raise ArtefactError(
            f"{origin} is not {named.name}: their encoders differ; name the right model", faults
        )


def _by_config(checkpoint: Checkpoint, family: str, config: dict[str, Any]) -> KnownTeacher | None:
    """The one entry of this architecture that takes images as the checkpoint's processor gives them."""
    entries = [
        entry
        for entry in CATALOGUE.values()
        if entry.family == family and encoder_config(family, entry.config) == config
    ]
    if len(entries) > 1:
        raise _ambiguous(checkpoint.origin, entries)
    stated = _stated_preprocessing(checkpoint)
    return next((entry for entry in entries if stated in (None, (entry.mean, entry.std))), None)


def _by_shapes(origin: str, shapes: Shapes, entries: list[KnownTeacher], how: str) -> Identity:
    near: list[tuple[int, Identity]] = []
    for entry in entries:
        config = encoder_config(entry.family, entry.config)
        near += [
            (len(layout.faults(shapes)), Identity(entry, how, entry.family, config, layout))
            for layout in layouts(entry.family, config)
        ]
    exact = [identity for faults, identity in near if not faults]
    if len(exact) > 1:
        raise _ambiguous(origin, [identity.known for identity in exact if identity.known])
    nearest = exact[0] if exact else min(near, key=lambda pair: pair[0])[1]
    assert nearest.known is not None
    _fitting(origin, nearest.known.name, [nearest.layout], shapes)
    return nearest


def _ambiguous(origin: str, entries: list[KnownTeacher]) -> UsageError:
    choices = [f"--model {entry.name}" for entry in entries]
    return UsageError(
        f"{origin} has the keys and shapes of several models, which take differently prepared images; say "
        "which it is",
        choices,
    )


def _fitting(origin: str, model: str, candidates: list[Layout], shapes: Shapes) -> Layout:
    """The layout that ``shapes`` fit exactly, or an error with the faults against the nearest."""
    nearest = min(candidates, key=lambda layout: len(layout.faults(shapes)))
    if faults := nearest.faults(shapes):
        raise ArtefactError(
            f"{origin} is not a whole checkpoint of {model} ({nearest.name}): {len(faults)} keys do not fit. "
            "Fetch it again, or name the right --model",
            faults,
        )
    return nearest


# --- What becomes of it -----------------------------------------------------------------------------


def teacher_tensors(checkpoint: Checkpoint, identity: Identity) -> dict[str, Tensor]:
    """A whole `Teacher.state_dict`: the checkpoint's encoder and a decoder.

    The encoder's are the checkpoint's own, not copies; the decoder's are fresh and depend on the encoder's
    architecture alone.

    Raises ``ArtefactError`` for weights that are no finite floating-point numbers.
    """
    names = identity.layout.encoder
    found = {key: checkpoint.tensors[key] for key in names}
    faults = [f"{key} is of {value.dtype}" for key, value in found.items() if not value.is_floating_point()]
    faults += [
        f"{key} has values that are no finite numbers"
        for key, value in found.items()
        if value.is_floating_point() and not math.isfinite(float(value.double().sum()))
    ]
    if faults:
        raise ArtefactError(f"{checkpoint.origin} holds weights that cannot be used; fetch it again", faults)
    with torch.device("meta"):
        backbone = build_backbone(identity.family, identity.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(DECODER_SEED, "teacher", "decoder"))
        decoder = MaskDecoder(backbone.channels, backbone.tap_channels, len(HEADS))
    encoder = {names[key]: value for key, value in found.items()}
    return encoder | {f"decoder.{key}": value for key, value in decoder.state_dict().items()}


def _free_name(checkpoint: Checkpoint, identity: Identity, destination: Path, options: ImportOptions) -> str:
    """The teacher's name: the user's, the catalogue's, or that of the repository or folder."""
    plain = checkpoint.hub_id.rpartition("/")[2] if checkpoint.hub_id else checkpoint.origin
    name = options.name or (identity.known.name if identity.known else plain)
    if not checkpoints.NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a teacher: use letters, digits, '.', '_' and '-' (--as NAME)")
    if name in checkpoints.names():
        raise UsageError(f"{name} is a model that ships with Wardround; give another name with --as NAME")
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"{destination} is a file; name a folder")
    taken = [path for path in destination.glob(f"{name}.*") if path.stem == name]
    if taken and not options.replace:
        raise UsageError(f"{taken[0]} is there already; add --replace, or another name with --as NAME")
    return name


def _stated_preprocessing(checkpoint: Checkpoint) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of preprocessor_config.json; None where it states none."""
    given = checkpoint.processor or {}
    if given.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    values = [given.get(key) for key in ("image_mean", "image_std")]
    if not all(isinstance(value, list) and len(value) == 3 for value in values):
        return None
    mean, std = (tuple(float(number) for number in value or ()) for value in values)
    return mean, std


def _card(checkpoint: Checkpoint, identity: Identity, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    known, layout = identity.known, identity.layout
    size = identity.config.get("image_size", 1024)  # SAM 2's config has none that matters
    # transformers draws SAM's weights from a normal of 1e-10: one built without its checkpoint would be dead.
    config = {**identity.config, "initializer_range": 0.02}
    if known is not None:
        mean, std = list(known.mean), list(known.std)
    else:
        mean, std = map(list, _stated_preprocessing(checkpoint) or (IMAGENET_MEAN, IMAGENET_STD))
    return {
        "kind": "teacher",
        "params": sum(value.numel() for value in tensors.values()),
        "image_size": size[0] if isinstance(size, list) else size,
        "encoder": {"family": identity.family, "config": config},
        "preprocessing": {"mean": mean, "std": std, "channel_order": "RGB", "range": [0, 1]},
        "multi_scale": True,
        "heads": list(HEADS),
        "decoder_seed": DECODER_SEED,  # it is untrained
        "trained_on": known.trained_on if known else "not stated; see the source",
        "licence": known.licence if known else "not stated; see the source",
        "source": checkpoint.origin,
        "source_sha256": dict(checkpoint.files),
        "source_layout": layout.name,
        "identified_by": identity.how,
        "keys": {"mapped": len(layout.encoder), "left_out": len(checkpoint.tensors) - len(layout.encoder)},
        "intended_use": "a starting point for training, its decoder untrained; not a medical device",
    }
