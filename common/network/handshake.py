"""One TLS handshake with a coordinator, to name what is wrong before a program that only retries starts."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime

from cryptography import x509

from common.errors import ArtefactError, FederationError
from common.network.certificates import Expiry
from common.network.documents import bracketed
from common.network.proxies import proxy_for

CLOCKS_APART_S = 120.0  # Flower refuses a signature that is more than five minutes old
# OpenSSL's numbers for what is wrong with a certificate (X509_V_ERR_*).
_NOT_YET, _OVER = 9, 10
_STRANGERS = (18, 19, 20, 21)
_OTHER_NAME = (62, 64)


@dataclass(frozen=True)
class Greeting:
    """What a coordinator showed of itself.

    Attributes:
        expiry: of its certificate. clock_s: how far its clock is before this machine's; None: it did not say.
    """

    expiry: Expiry
    clock_s: float | None

    @property
    def apart(self) -> bool:
        """Whether the clocks are so far apart that signed requests are refused, or soon will be."""
        return self.clock_s is not None and abs(self.clock_s) > CLOCKS_APART_S


def shake_hands(host: str, port: int, authority_pem: str, now: datetime, timeout_s: float = 10.0) -> Greeting:
    """Greet the server at ``host:port``, for which the authority must vouch.

    It goes where Flower's own programs go: through the proxy that HTTPS_PROXY names, unless NO_PROXY names
    the host; never for loopback.

    Raises:
        FederationError: nobody answers there, or it is no TLS server.
        ArtefactError: its certificate is another authority's, another host's, or over.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority_pem)
    where = f"{host}:{port}"
    try:
        with (
            _connected(host, port, timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            found = secure.getpeercert(binary_form=True)
            clock = _clock_of(secure, host)
    except ssl.SSLCertVerificationError as error:
        raise ArtefactError(_untrusted(where, error)) from error
    except ssl.SSLError as error:
        raise FederationError(
            f"{where} does not speak TLS as it should ({error.reason}): is the port the one in the kit?"
        ) from error
    except OSError as error:
        raise FederationError(_unreachable(host, port, error)) from error
    assert found is not None
    expiry = Expiry.of(f"the certificate of {where}", x509.load_der_x509_certificate(found), now)
    return Greeting(expiry, None if clock is None else (clock - now).total_seconds())


def _connected(host: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to ``host:port``, through the proxy if there is one."""
    proxy = proxy_for(host)
    if proxy is None:
        return socket.create_connection((host, port), timeout=timeout_s)
    through = f"the proxy {bracketed(proxy[0])}:{proxy[1]} (HTTPS_PROXY)"
    try:
        plain = socket.create_connection(proxy, timeout=timeout_s)
    except OSError as error:
        raise FederationError(f"{through} is not reached ({error.strerror or error}): correct it") from error
    try:
        target = f"{bracketed(host)}:{port}"
        plain.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        status = _head(plain).split(b"\r\n")[0].decode("ascii", "replace").split(" ", 2)
        if len(status) < 2 or status[1] != "200":
            said = " ".join(status[1:])[:80] or "nothing"
            raise FederationError(f"{through} does not let {target} pass ({said}): ask for it to be allowed")
    except BaseException:
        plain.close()
        raise
    return plain


def _clock_of(connection: socket.socket, host: str) -> datetime | None:
    """The server's clock, as every answer of an HTTP server shows it."""
    try:
        connection.sendall(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        for line in _head(connection).split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"date":
                return parsedate_to_datetime(value.decode("ascii").strip())
    except (OSError, ValueError):
        pass
    return None


def _head(connection: socket.socket) -> bytes:
    """What is before the first empty line of an answer; cut after 8 KiB."""
    said = b""
    while b"\r\n\r\n" not in said and len(said) < 8192 and (part := connection.recv(1)):
        said += part
    return said.partition(b"\r\n\r\n")[0]


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
