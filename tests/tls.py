"""A TLS server on loopback, for the tests of who is trusted."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def tls_server(certificate: Path, key: Path) -> Iterator[int]:
    """Greets whoever trusts ``certificate``, until the block ends; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        over = threading.Event()

        def greet() -> None:
            while not over.is_set():
                with suppress(OSError):  # a refused handshake, or nobody yet
                    plain, _ = listener.accept()
                    with plain:
                        plain.settimeout(5)
                        context.wrap_socket(plain, server_side=True).close()

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            thread.join(timeout=10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
