"""A site's word on one job: an approval or a refusal of a plan, signed with the site's own key.

The coordinator keeps it and sends nothing to a site whose approval of this very plan it does not hold; the
site's guard works on nothing without it. Neither takes the other's word for it: both check the signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json
from common.plan import RunPlan, day_of
from common.privacy.keys import public_key, sign, signature_holds

SCHEMA = 1
LONGEST_NAME = 100  # characters of `Approval.who`
LONGEST_REASON = 200

NOT_THIS_PLAN = "it is about another plan"
NOT_THIS_SITE = "it is another site's"
NOT_SIGNED = "it is not signed by the site's key"
ENDED = "it has expired"


class Verdict(StrEnum):
    approved = "approved"
    refused = "refused"


@dataclass(frozen=True)
class Approval:
    """What a site's data steward says to one plan.

    Attributes:
        rounds: of the teacher, as far as the site goes along.
        expires: the last day (UTC, YYYY-MM-DD) that it holds for; empty: as long as the plan.
        who: gave the answer, as the site puts it.
        at: when, ISO 8601.
        reason: of a refusal, if the site tells it; empty otherwise.
        key: the site's public key, 64 hex digits. sig: Ed25519 over `text`, 128 hex digits.
    """

    schema: int
    site: str
    plan_sha256: str
    answer: Verdict
    rounds: int
    expires: str
    who: str
    at: str
    reason: str
    key: str
    sig: str

    @classmethod
    def of(cls, site: str, plan: RunPlan, answer: Verdict, who: str, at: datetime) -> Approval:
        """An unsigned one, for as long as ``plan`` goes."""
        moment = at.isoformat(timespec="seconds")
        return cls(SCHEMA, site, plan.digest, answer, plan.rounds, plan.expires, who, moment, "", "", "")

    def signed(self, key: Ed25519PrivateKey) -> Approval:
        named = replace(self, key=public_key(key))
        return replace(named, sig=sign(key, named.text))

    @property
    def text(self) -> str:
        """What is signed: nothing else that a site's key signs has such a text."""
        body = asdict(self)
        del body["sig"]
        return canonical_json({"approval": body})

    def word_faults(self, site: str, key: str, plan_sha256: str) -> Iterator[str]:
        """Why this is not the word of ``site``, whose public key is ``key``, on that plan."""
        if self.schema != SCHEMA or not self.plain:
            yield "it is of no form that this release knows"
        if self.site != site:
            yield NOT_THIS_SITE
        if self.plan_sha256 != plan_sha256:
            yield NOT_THIS_PLAN
        if self.key != key or not signature_holds(key, self.text, self.sig):
            yield NOT_SIGNED

    @property
    def plain(self) -> bool:
        """Whether its texts are of the length and the letters that one line has."""
        texts = ((self.who, LONGEST_NAME), (self.reason, LONGEST_REASON), (self.at, 40))
        return all(is_line(text, longest) for text, longest in texts)

    def ended(self, today: date) -> bool:
        """Whether ``today`` (UTC) is past its last day; what is no date has always ended."""
        return bool(self.expires) and (day_of(self.expires) or date.min) < today


def is_line(text: str, longest: int) -> bool:
    """Whether ``text`` is one line that any terminal shows as it is, of at most ``longest`` characters."""
    return len(text) <= longest and text.isprintable()
