"""The sheet of the most alike pairs: one page with everything in it, for the site's own officer alone.

It shows patients' images. Nothing but this module's caller writes it, below the site's folder, and no
payload of any plan has room for it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from torch import Tensor

from client.transfer.gallery import png
from common.pages import STYLE
from common.pages.drawing import element

TITLE = "Synthetic images and the patients most like them"
WARNING = (
    "This page shows images of patients. It must not leave the hospital: do not send it, copy it to another "
    "machine or put it into a report."
)
HOW_TO_READ = (
    "Left the synthetic image, right the nearest image of a patient whom the generator was trained on, "
    "turned as it is nearest. Below 1 it is nearer than images of other patients here are. A copy shows "
    "the same structures in the same places; the same kind of tissue is none."
)
WIDTH = 160  # pixels, of a picture on the page


@dataclass(frozen=True)
class Pair:
    """``synthetic`` and ``real`` (3, S, S) in [0, 1].

    Attributes:
        nearness: their distance over that which is usual; smaller is worse.
        encoding: by which it was measured.
        copied: whether the image was taken out.
    """

    synthetic: Tensor
    real: Tensor
    nearness: float
    encoding: str
    copied: bool


def sheet(pairs: Sequence[Pair]) -> str:
    """The page; without a pair it says so."""
    body = [element("h1", TITLE), element("p", element("strong", WARNING)), element("p", HOW_TO_READ)]
    body += [_figure(number, pair) for number, pair in enumerate(pairs, start=1)]
    if not pairs:
        body.append(element("p", "There was no synthetic image."))
    style = element("style", Markup(STYLE.read_text(encoding="utf-8")))
    head = element("head", Markup('<meta charset="utf-8">'), element("title", TITLE), style)
    page = element("html", head, element("body", element("main", *body)), lang="en")
    return f"<!doctype html>\n{page}\n"


def _figure(number: int, pair: Pair) -> Markup:
    fate = "taken out" if pair.copied else "stays in the set"
    words = f"{number}. {pair.nearness:.2f} of the usual distance, by {pair.encoding}; {fate}"
    pictures = [
        _picture(pair.synthetic, f"synthetic image {number}"),
        _picture(pair.real, f"patient's image {number}"),
    ]
    return element("figure", *pictures, element("figcaption", words))


def _picture(image: Tensor, label: str) -> Markup:
    data = base64.b64encode(png(image)).decode()
    return element("img", src=f"data:image/png;base64,{data}", alt=label, width=str(WIDTH))
