"""The painters by name: those that a scope paints with, and the rivals that it is held against."""

from __future__ import annotations

from client.painters.amplitude import amplitude
from client.painters.augment import augment
from client.painters.base import PainterKind
from client.painters.histogram import histogram
from client.painters.procedural import paint
from client.painters.random_colour import random_colour
from client.painters.recolour import recolour
from common.recipe import GeneratorScope

PAINTERS: dict[str, PainterKind] = {
    "recolour": PainterKind(
        recolour, True, "style", "labelled crops of this site, their regions in the colours of every site"
    ),
    "paint": PainterKind(paint, False, "style", "procedural shapes in the colours and grain of every site"),
    "histogram": PainterKind(
        histogram,
        True,
        "style",
        "labelled crops of this site, by luminance rank in the colours of every site",
    ),
    "amplitude": PainterKind(
        amplitude, True, "spectrum", "labelled crops of this site with other sites' low-frequency amplitudes"
    ),
    "augment": PainterKind(
        augment, True, "", "labelled crops of this site, deformed and disturbed; nothing of other sites"
    ),
    "random_colour": PainterKind(
        random_colour, True, "", "labelled crops of this site in two random colours; nothing of other sites"
    ),
}


def painter_of(scope: GeneratorScope, asked: str | None = None) -> str | None:
    """The painter without a network that ``scope`` paints with, or the one ``asked`` for in its place.

    None: the diffusion network paints, or nobody.
    """
    return asked or (str(scope) if str(scope) in PAINTERS else None)
