"""One way out of a network namespace: connections made inside it are carried to one address outside.

A socket belongs to the namespace that it was made in, whoever holds it. So a listener is made inside, by
``LISTEN``, handed out, and served from outside; what runs inside reaches that one address and no other.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

HAND_OVER_S = 30.0
LOOK_S = 0.5
CONNECT_S = 10.0
MOST_CONNECTIONS = 16  # a courier's are two or three
CHUNK_BYTES = 1 << 16
_HOST = re.compile(r"[A-Za-z0-9.:-]+")
# Brings the namespace's loopback up, listens there and hands the listener out through standard input.
LISTEN = """
import fcntl, socket, struct, sys
host, port = sys.argv[1], int(sys.argv[2])
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, struct.pack("16sh", b"lo", 0x41))
family = socket.AF_INET6 if ":" in host else socket.AF_INET
listener = socket.create_server((host, port), family=family)
socket.send_fds(socket.socket(fileno=0), [b"listener"], [listener.fileno()])
"""


@dataclass(frozen=True)
class Destination:
    """``host`` and ``port`` outside; ``inside``, the loopback address at which it is met inside."""

    host: str
    port: int
    inside: str

    @classmethod
    def parse(cls, address: str) -> Destination:
        """``HOST:PORT`` or ``[IPV6]:PORT``. Raises ``ValueError`` if it is neither.

        Nor is a number that is not this machine's own: only a name can be given another place inside.
        """
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not _HOST.fullmatch(host) or not 0 < int(port) < 1 << 16:
            raise ValueError(address)
        try:
            number = ipaddress.ip_address(host)
        except ValueError:
            return cls(host, int(port), "127.0.0.1")
        if not number.is_loopback:
            raise ValueError(address)
        return cls(host, int(port), host)


def handshake() -> tuple[socket.socket, socket.socket]:
    """Two ends of one line: the first stays outside, the second is a process's standard input."""
    return socket.socketpair()


def say(hand: socket.socket, text: str) -> None:
    """``text``, and that there is no more, to whoever reads the other end; who may have ended already."""
    with suppress(OSError):
        hand.sendall(text.encode())
        hand.shutdown(socket.SHUT_WR)


def carry(hand: socket.socket, destination: Destination, alive: Callable[[], bool]) -> None:
    """Receive a listener through ``hand``, and carry its connections as long as ``alive`` says so.

    Returns at once; threads do the rest, and close what they hold.
    """
    threading.Thread(target=_serve, args=(hand, destination, alive), daemon=True).start()


def _serve(hand: socket.socket, destination: Destination, alive: Callable[[], bool]) -> None:
    listener = _received(hand)
    if listener is None:
        return
    free = threading.Semaphore(MOST_CONNECTIONS)
    with listener:
        listener.settimeout(LOOK_S)
        while alive():
            try:
                inner, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if free.acquire(blocking=False):
                threading.Thread(target=_join, args=(inner, destination, free), daemon=True).start()
            else:
                inner.close()


def _received(hand: socket.socket) -> socket.socket | None:
    with hand:
        hand.settimeout(HAND_OVER_S)
        try:
            _, handles, _, _ = socket.recv_fds(hand, 64, 1)
        except OSError:
            return None
    return socket.socket(fileno=handles[0]) if handles else None


def _join(inner: socket.socket, destination: Destination, free: threading.Semaphore) -> None:
    """Both directions of one connection, until both are over."""
    try:
        with inner, socket.create_connection((destination.host, destination.port), CONNECT_S) as outer:
            inner.settimeout(None)
            outer.settimeout(None)
            back = threading.Thread(target=_pump, args=(outer, inner), daemon=True)
            back.start()
            _pump(inner, outer)
            back.join()
    except OSError:
        pass  # nobody answers outside: the courier's connection just ends
    finally:
        free.release()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(CHUNK_BYTES):
            sink.sendall(data)
    for end, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with suppress(OSError):
            end.shutdown(how)
