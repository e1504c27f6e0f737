"""What a hospital is told of a coordinator before its node is started, over real handshakes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from client.network.node import look
from common.code_digest import code_sha256
from common.errors import ArtefactError, FederationError
from common.network.certificates import system_clock
from common.network.documents import SCHEMA, Kit
from common.network.handshake import Greeting, shake_hands
from common.network.proxies import proxy_for
from server.network.authority import authority_fingerprint
from server.network.consortium import SERVER, Consortium, Settings
from tests.tls import connect_proxy, free_port, tls_server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def made(folder: Path, now: datetime, host: str, days: int = 90) -> Consortium:
    return Consortium.create(folder, Settings(host=host), days, 825, now)


def greeted(consortium: Consortium, authority: Consortium, host: str = "localhost") -> Greeting:
    stem = consortium.folder / SERVER
    with tls_server(stem.with_suffix(".crt"), stem.with_suffix(".key")) as port:
        return shake_hands(host, port, authority.ca_pem, system_clock())


def test_a_server_in_order_is_greeted_and_says_when_its_certificate_ends(tmp_path: Path) -> None:
    consortium = made(tmp_path / "c", system_clock(), "localhost")
    greeting = greeted(consortium, consortium)
    assert greeting.expiry.days in (89, 90)
    assert greeting.clock_s is None  # it said nothing
    assert not greeting.apart


def test_another_authoritys_server_is_told_from_an_expired_one_and_from_another_host(tmp_path: Path) -> None:
    now = system_clock()
    ours, theirs = made(tmp_path / "ours", now, "localhost"), made(tmp_path / "theirs", now, "localhost")
    with pytest.raises(ArtefactError, match="not of this kit's authority"):
        greeted(theirs, ours)
    with pytest.raises(ArtefactError, match="for another host"):
        greeted(ours, ours, "127.0.0.1")
    over = made(tmp_path / "over", now - timedelta(days=100), "localhost")
    with pytest.raises(ArtefactError, match="has expired") as caught:
        greeted(over, over)
    assert "wardround consortium renew" in str(caught.value)


def test_nobody_there_is_told_from_no_tls_and_from_no_such_host(tmp_path: Path) -> None:
    consortium = made(tmp_path / "c", system_clock(), "localhost")
    port = free_port()
    with pytest.raises(FederationError, match=f"nobody listens on localhost:{port}"):
        shake_hands("localhost", port, consortium.ca_pem, system_clock())
    with pytest.raises(FederationError, match="has no address"):
        shake_hands("nowhere.invalid", port, consortium.ca_pem, system_clock())


@pytest.mark.parametrize(("off", "told"), [(0, False), (-600, True), (600, True)])
def test_clocks_that_are_apart_are_told_before_the_site_is_turned_away(
    tmp_path: Path, off: int, told: bool
) -> None:
    now = system_clock()
    consortium = made(tmp_path / "c", now, "localhost")
    stem = consortium.folder / SERVER
    date = format_datetime(now + timedelta(seconds=off), usegmt=False)
    answer = f"HTTP/1.1 404 Not Found\r\nDate: {date}\r\n\r\n".encode()
    with tls_server(stem.with_suffix(".crt"), stem.with_suffix(".key"), answer) as port:
        kit = Kit(
            SCHEMA, authority_fingerprint(consortium.folder), "localhost", port, consortium.ca_pem,
            code_sha256(), "harbour", "0" * 64,
        )  # fmt: skip
        warnings = look(kit, now)
    assert ["s apart: at 300 s this site is turned away" in warning for warning in warnings] == [True] * told


def test_certificates_that_end_soon_are_told(tmp_path: Path) -> None:
    now = system_clock()
    consortium = Consortium.create(tmp_path / "c", Settings(host="localhost"), 20, 20, now)
    stem = consortium.folder / SERVER
    with tls_server(stem.with_suffix(".crt"), stem.with_suffix(".key")) as port:
        kit = Kit(SCHEMA, "", "localhost", port, consortium.ca_pem, "", "harbour", "")
        warnings = look(kit, now)
    assert len(warnings) == 2
    assert all("tell the coordinator" in warning for warning in warnings)


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[tuple[Consortium, int]]:
    """A coordinator whose name has no address here, and its port on loopback."""
    consortium = made(tmp_path / "c", system_clock(), "fed.invalid")
    stem = consortium.folder / SERVER
    with tls_server(stem.with_suffix(".crt"), stem.with_suffix(".key")) as port:
        yield consortium, port


def test_a_proxy_of_the_hospital_is_used_as_flower_uses_it(
    behind: tuple[Consortium, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    consortium, port = behind
    with connect_proxy(b"HTTP/1.1 200 Connection established\r\n\r\n", port) as (proxy, asked):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy}")
        greeting = shake_hands("fed.invalid", 8443, consortium.ca_pem, system_clock())
    assert greeting.expiry.days in (89, 90)
    assert asked[0].startswith(b"CONNECT fed.invalid:8443 HTTP/1.1\r\n")


def test_a_proxy_that_refuses_or_is_not_there_is_named(
    behind: tuple[Consortium, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    consortium, port = behind
    with connect_proxy(b"HTTP/1.1 403 Forbidden\r\n\r\n", port) as (proxy, _):
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{proxy}")
        with pytest.raises(FederationError, match=r"does not let fed\.invalid:8443 pass \(403 Forbidden\)"):
            shake_hands("fed.invalid", 8443, consortium.ca_pem, system_clock())
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(FederationError, match="HTTPS_PROXY"):
        shake_hands("fed.invalid", 8443, consortium.ca_pem, system_clock())


def test_no_proxy_is_asked_for_this_machine_or_for_what_no_proxy_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert proxy_for("fed.example.org") is None
    monkeypatch.setenv("https_proxy", "http://proxy.example.org:3128")
    assert proxy_for("fed.example.org") == ("proxy.example.org", 3128)
    assert proxy_for("localhost") is proxy_for("127.0.0.1") is None
    monkeypatch.setenv("NO_PROXY", ".example.org")
    assert proxy_for("fed.example.org") is None
    assert proxy_for("localhost") is None
