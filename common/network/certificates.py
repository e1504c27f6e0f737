"""What a certificate says of itself: whether it is an authority's, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from common.network.identity import fingerprint_of

WARNING_DAYS = 30


def system_clock() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Expiry:
    """When ``what`` ends, seen at ``now``; all times in UTC."""

    what: str
    begins: datetime
    ends: datetime
    now: datetime

    @classmethod
    def of(cls, what: str, certificate: x509.Certificate, now: datetime) -> Expiry:
        return cls(what, certificate.not_valid_before_utc, certificate.not_valid_after_utc, now)

    @property
    def days(self) -> int:
        """Whole days left; negative once it has ended."""
        return (self.ends - self.now).days

    @property
    def over(self) -> bool:
        return self.now > self.ends

    @property
    def early(self) -> bool:
        return self.now < self.begins

    @property
    def near(self) -> bool:
        """Whether fewer than 30 days are left."""
        return self.days < WARNING_DAYS

    def __str__(self) -> str:
        day = f"{self.ends:%Y-%m-%d %H:%M} UTC"
        if self.over:
            return f"{self.what} ended on {day}"
        if self.early:
            return (
                f"{self.what} begins only on {self.begins:%Y-%m-%d %H:%M} UTC: look at this machine's clock"
            )
        return f"{self.what} ends on {day}, in {self.days} days"


def authority_faults(pem: str, fingerprint: str) -> list[str]:
    """What speaks against ``pem`` as the certificate of the authority with that key."""
    try:
        found = x509.load_pem_x509_certificates(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        return ["is no certificate"]
    if len(found) != 1:
        return [f"holds {len(found)} certificates, not one"]
    certificate, faults = found[0], []
    if "PRIVATE KEY" in pem:
        faults.append("holds a private key, which never travels")
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca:
            faults.append("is not an authority's")
        certificate.verify_directly_issued_by(certificate)
        if not isinstance(key := certificate.public_key(), ec.EllipticCurvePublicKey):
            faults.append("has no elliptic-curve key")
        elif fingerprint_of(key) != fingerprint:
            faults.append("is not that of the consortium that the kit names")
    except x509.ExtensionNotFound:
        faults.append("is not an authority's")
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        faults.append("is not signed by itself")
    return faults
