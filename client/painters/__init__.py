"""Who makes the images of a transfer set: one function a painter, all called alike, by name in `PAINTERS`."""

from client.painters.base import Material, PainterKind, SyntheticSet
from client.painters.registry import PAINTERS, painter_of

__all__ = ["PAINTERS", "Material", "PainterKind", "SyntheticSet", "painter_of"]
