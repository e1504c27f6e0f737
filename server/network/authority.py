"""The consortium's certificate authority: it vouches for the coordinator's own servers, and for nobody else.

Hospitals have no certificate: a node is known by its key. So adding one never touches another's files.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.durable import write_atomic
from common.errors import ArtefactError
from common.network.identity import CURVE, fingerprint_of
from common.privacy.keys import write_secret

CA_KEY, CA_CERTIFICATE = "ca.key", "ca.crt"
LOOPBACK = ("localhost", "127.0.0.1")
CLOCKS_APART = timedelta(hours=1)  # a hospital's clock may be that much behind
_PEM = serialization.Encoding.PEM


def create_authority(folder: Path, host: str, days: int, now: datetime) -> None:
    """The authority's key, which only its owner can read, and its certificate for ``days``.

    Raises ``ArtefactError`` rather than replace a key.
    """
    if (folder / CA_KEY).exists():
        raise ArtefactError(f"{folder / CA_KEY} exists: a consortium's key is never replaced")
    key = ec.generate_private_key(CURVE())
    _write_key(folder / CA_KEY, key)
    renew_authority(folder, host, days, now)


def renew_authority(folder: Path, host: str, days: int, now: datetime) -> None:
    """A new certificate for the authority's same key and name: servers and kits in order stay so."""
    key = authority_key(folder)
    public, name = key.public_key(), _name(f"Wardround consortium at {host}"[:64])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    certificate = (
        _builder(name, public, now, now + timedelta(days=days))
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
        .sign(key, hashes.SHA384())
    )
    write_atomic(folder / CA_CERTIFICATE, certificate.public_bytes(_PEM))


def issue(folder: Path, stem: Path, names: Sequence[str], days: int, now: datetime) -> x509.Certificate:
    """``STEM.key`` and ``STEM.crt``: a server's new key and certificate for ``names``, for up to ``days``.

    It ends with the authority's own at the latest. Raises ``ArtefactError`` if the authority's is over.
    """
    authority, signer = read_certificate(folder / CA_CERTIFICATE), authority_key(folder)
    ends = min(now + timedelta(days=days), authority.not_valid_after_utc)
    if ends <= now:
        raise ArtefactError(f"{folder / CA_CERTIFICATE} is over: run wardround consortium renew --authority")
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_name(names[0][:64]), public, now, ends)
        .issuer_name(authority.subject)
        .add_extension(x509.SubjectAlternativeName([general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write_key(stem.with_suffix(".key"), key)
    write_atomic(stem.with_suffix(".crt"), certificate.public_bytes(_PEM))
    return certificate


def general_name(name: str) -> x509.GeneralName:
    """A host name or an address, as a certificate writes it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def authority_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """Raises ``ArtefactError`` if the authority's key is not there or is no elliptic-curve key."""
    path = folder / CA_KEY
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read ({error.strerror}): bring it back from where it is kept for this command"
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ArtefactError(f"{path} is no private key: restore it from its backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ArtefactError(f"{path} is not the authority's key: restore it from its backup")
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """Raises ``ArtefactError`` if ``path`` holds no certificate."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read ({error.strerror}): is this a consortium's folder? "
            "wardround consortium init makes one"
        ) from error
    except ValueError as error:
        raise ArtefactError(f"{path} is no certificate: run wardround consortium renew") from error


def authority_fingerprint(folder: Path) -> str:
    """By which a consortium is known."""
    key = read_certificate(folder / CA_CERTIFICATE).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return fingerprint_of(key)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_APART)
        .not_valid_after(ends)
    )


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    text = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_secret(path, text)
