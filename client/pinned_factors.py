"""The factors A of a private run: named by digest before it begins, and the same in every round.

Under noise a site trains B alone. The guarantee holds for whatever A the server sends; that A is public, and
that no server trades it for another in the middle of a run, holds because the plan names its digest, the
site's policy lists it (``payload.a_matrix_sha256``), and each round is held against it.
"""

from __future__ import annotations

from common.adapter import Adapter
from common.errors import PolicyRefusal
from common.plan import Variant
from common.precision import unpack
from common.tuning.halves import Half

FIELD = "payload.a_matrix_sha256"


def check_named(variant: Variant) -> None:
    """A private plan trains no A, and names the A beside the B that it trains.

    Raises ``PolicyRefusal`` with the field ``payload.a_matrix_sha256``.
    """
    ends = {tensor.name.rpartition(".")[2] for one in variant.payloads for tensor in one.tensors}
    if Half.a in ends:
        raise PolicyRefusal("noise on both factors would be multiplied: train B alone (preset dp)", FIELD)
    if Half.b in ends and not variant.a_sha256:
        raise PolicyRefusal("the plan does not name the factors A that it starts from", FIELD)


def check_sent(variant: Variant, sent: Adapter) -> None:
    """What is sent holds exactly the A that the plan names, whichever dtype it travels in.

    Raises:
        PolicyRefusal: with the field ``payload.a_matrix_sha256``.
        ArtefactError: it cannot be unpacked.
    """
    if unpack(sent).a_sha256 != variant.a_sha256:
        raise PolicyRefusal("the factors A are not those that the plan names: the run ends here", FIELD)
