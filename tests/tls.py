"""A TLS server on loopback, for the tests of who is trusted."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def tls_server(certificate: Path, key: Path, answer: bytes = b"") -> Iterator[int]:
    """Greets whoever trusts ``certificate``, and says ``answer``, until the block ends; its port."""
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
                        with context.wrap_socket(plain, server_side=True) as secure:
                            if answer and secure.recv(4096):
                                secure.sendall(answer)

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


@contextmanager
def connect_proxy(answer: bytes, target: int) -> Iterator[tuple[int, list[bytes]]]:
    """A proxy that says ``answer`` to each CONNECT, and where it is 200 joins it to ``target`` on loopback.

    Its port, and the requests that it was sent.
    """
    asked: list[bytes] = []
    over = threading.Event()

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(4096):
                sink.sendall(part)
            sink.shutdown(socket.SHUT_WR)

    def join(plain: socket.socket) -> None:
        with plain:
            asked.append(plain.recv(4096))
            plain.sendall(answer)
            if b" 200 " not in answer:
                return
            with socket.create_connection(("127.0.0.1", target)) as behind:
                back = threading.Thread(target=pass_on, args=(behind, plain))
                back.start()
                pass_on(plain, behind)
                back.join(timeout=10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)

        def serve() -> None:
            while not over.is_set():
                with suppress(TimeoutError):
                    join(listener.accept()[0])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1], asked
        finally:
            over.set()
            thread.join(timeout=10)
