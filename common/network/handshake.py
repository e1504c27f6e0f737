"""One TLS handshake with a coordinator, to name what is wrong before a program that only retries starts."""

from __future__ import annotations

import socket
import ssl
from datetime import datetime

from cryptography import x509

from common.errors import ArtefactError, FederationError
from common.network.certificates import Expiry

# OpenSSL's numbers for what is wrong with a certificate (X509_V_ERR_*).
_NOT_YET, _OVER = 9, 10
_STRANGERS = (18, 19, 20, 21)
_OTHER_NAME = (62, 64)


def shake_hands(host: str, port: int, authority_pem: str, now: datetime, timeout_s: float = 10.0) -> Expiry:
    """When the certificate of the server at ``host:port`` ends, once the authority vouches for it.

    Raises:
        FederationError: nobody answers there, or it is no TLS server.
        ArtefactError: its certificate is another authority's, another host's, or over.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority_pem)
    where = f"{host}:{port}"
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            found = secure.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        raise ArtefactError(_untrusted(where, error)) from error
    except ssl.SSLError as error:
        raise FederationError(
            f"{where} does not speak TLS as it should ({error.reason}): is the port the one in the kit?"
        ) from error
    except OSError as error:
        raise FederationError(_unreachable(host, port, error)) from error
    assert found is not None
    return Expiry.of(f"the certificate of {where}", x509.load_der_x509_certificate(found), now)


def _untrusted(where: str, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code == _OVER:
        return (
            f"the certificate of {where} has expired: the coordinator runs wardround consortium renew FOLDER "
            "and starts wardround consortium serve again"
        )
    if error.verify_code == _NOT_YET:
        return (
            f"the certificate of {where} is not valid yet: look at this machine's clock and the coordinator's"
        )
    if error.verify_code in _STRANGERS:
        return (
            f"the certificate of {where} is not of this kit's authority: somebody else answers there (a "
            "proxy that opens TLS?), or the kit is another consortium's; compare fingerprints"
        )
    if error.verify_code in _OTHER_NAME:
        return f"the certificate of {where} is for another host: the coordinator made it with another --host"
    return f"the certificate of {where} is refused: {error.verify_message}"


def _unreachable(host: str, port: int, error: OSError) -> str:
    where = f"{host}:{port}"
    if isinstance(error, socket.gaierror):
        return (
            f"{host} has no address here ({error.strerror}): ask for the name, or look at this machine's DNS"
        )
    if isinstance(error, ConnectionRefusedError):
        return f"nobody listens on {where}: does wardround consortium serve run, or does a firewall refuse?"
    if isinstance(error, TimeoutError):
        return f"{where} does not answer: let this machine's firewall pass TCP to port {port} of {host}"
    return f"{where} cannot be reached ({error.strerror or type(error).__name__})"
