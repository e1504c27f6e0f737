"""The consortium's certificates, held against another reader of X.509 than the one that runs."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from common.errors import ArtefactError, ConfigError
from common.network.certificates import Expiry, authority_faults
from server.network.authority import CA_CERTIFICATE, CA_KEY, authority_fingerprint, issue, read_certificate
from server.network.consortium import LOOPBACK_STEM, SERVER, Consortium, Settings

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
HOST = "fed.example.org"


def made(folder: Path, now: datetime = NOW, host: str = HOST, days: int = 90) -> Consortium:
    return Consortium.create(folder, Settings(host=host), days, 825, now)


def check(consortium: Consortium, authority: Path, stem: Path, name: x509.GeneralName, now: datetime) -> None:
    """Raises ``VerificationError`` unless the certificate holds for ``name`` at ``now``."""
    store = Store([read_certificate(authority / CA_CERTIFICATE)])
    verifier = PolicyBuilder().store(store).time(now).build_server_verifier(name)
    verifier.verify(read_certificate(consortium.folder / stem.with_suffix(".crt")), [])


def test_the_servers_certificates_hold_for_their_names_alone(tmp_path: Path) -> None:
    consortium = made(tmp_path / "c")
    check(consortium, consortium.folder, SERVER, x509.DNSName(HOST), NOW)
    check(consortium, consortium.folder, LOOPBACK_STEM, x509.DNSName("localhost"), NOW)
    check(consortium, consortium.folder, LOOPBACK_STEM, x509.IPAddress(ip_address("127.0.0.1")), NOW)
    with pytest.raises(VerificationError):
        check(consortium, consortium.folder, SERVER, x509.DNSName("localhost"), NOW)
    with pytest.raises(VerificationError):
        check(consortium, consortium.folder, LOOPBACK_STEM, x509.DNSName(HOST), NOW)


def test_a_host_may_be_an_address(tmp_path: Path) -> None:
    consortium = made(tmp_path / "c", host="192.0.2.7")
    check(consortium, consortium.folder, SERVER, x509.IPAddress(ip_address("192.0.2.7")), NOW)


def test_another_authority_does_not_vouch_for_them(tmp_path: Path) -> None:
    ours, theirs = made(tmp_path / "ours"), made(tmp_path / "theirs")
    with pytest.raises(VerificationError):
        check(ours, theirs.folder, SERVER, x509.DNSName(HOST), NOW)


@pytest.mark.parametrize("away", [timedelta(days=90, minutes=1), timedelta(hours=-2)])
def test_they_hold_in_their_time_alone(tmp_path: Path, away: timedelta) -> None:
    consortium = made(tmp_path / "c")
    with pytest.raises(VerificationError):
        check(consortium, consortium.folder, SERVER, x509.DNSName(HOST), NOW + away)


def test_private_keys_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        consortium = made(tmp_path / "c")
    finally:
        os.umask(before)
    keys = sorted(consortium.folder.rglob("*.key"))
    assert [key.name for key in keys] == [CA_KEY, "loopback.key", "server.key"]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE(consortium.folder.stat().st_mode) == 0o700


def test_a_consortium_is_never_overwritten(tmp_path: Path) -> None:
    consortium = made(tmp_path / "c")
    before = {path: path.read_bytes() for path in consortium.folder.rglob("*") if path.is_file()}
    with pytest.raises(ArtefactError, match="never overwritten"):
        made(tmp_path / "c", host="other.example.org")
    (consortium.folder / "consortium.json").unlink()
    with pytest.raises(ArtefactError, match="never replaced"):
        made(tmp_path / "c", host="other.example.org")
    del before[consortium.folder / "consortium.json"]
    assert before == {path: path.read_bytes() for path in consortium.folder.rglob("*") if path.is_file()}


def test_renewing_keeps_the_authority_and_replaces_the_servers(tmp_path: Path) -> None:
    consortium = made(tmp_path / "c")
    authority, later = (consortium.folder / CA_CERTIFICATE).read_bytes(), NOW + timedelta(days=89)
    fingerprint = authority_fingerprint(consortium.folder)
    consortium.renew(90, None, later)
    check(consortium, consortium.folder, SERVER, x509.DNSName(HOST), NOW + timedelta(days=178))
    assert (consortium.folder / CA_CERTIFICATE).read_bytes() == authority
    assert authority_fingerprint(consortium.folder) == fingerprint


def test_renewing_the_authority_keeps_its_key_and_what_was_in_order(tmp_path: Path) -> None:
    consortium = made(tmp_path / "c")
    old = tmp_path / "old"
    old.mkdir()
    (old / CA_CERTIFICATE).write_bytes((consortium.folder / CA_CERTIFICATE).read_bytes())
    fingerprint = authority_fingerprint(consortium.folder)
    consortium.renew(90, 825, NOW + timedelta(days=60))
    assert authority_fingerprint(consortium.folder) == fingerprint
    for authority in (old, consortium.folder):  # a hospital with the old kit, and one with a new one
        check(consortium, authority, SERVER, x509.DNSName(HOST), NOW + timedelta(days=100))


def test_a_server_outlives_its_authority_in_no_case(tmp_path: Path) -> None:
    consortium = Consortium.create(tmp_path / "c", Settings(host=HOST), 825, 10, NOW)
    servers, _, authority = consortium.expiries(NOW)
    assert servers.ends == authority.ends == NOW + timedelta(days=10)
    with pytest.raises(ArtefactError, match="renew --authority"):
        issue(consortium.folder, tmp_path / "late", [HOST], 90, NOW + timedelta(days=11))


def test_expiry_is_warned_of_below_thirty_days_and_refused_after(tmp_path: Path) -> None:
    consortium = made(tmp_path / "c")
    assert consortium.check_in_force(NOW + timedelta(days=59)) == []
    near = consortium.check_in_force(NOW + timedelta(days=61))
    assert [expiry.days for expiry in near] == [29, 29]
    with pytest.raises(ArtefactError) as caught:
        consortium.check_in_force(NOW + timedelta(days=91))
    assert caught.value.exit_code == 12
    assert len(caught.value.faults) == 2
    assert f"wardround consortium renew {consortium.folder}" in str(caught.value)
    with pytest.raises(ArtefactError, match="renew --authority"):
        consortium.check_in_force(NOW + timedelta(days=826))


def test_a_kits_certificate_is_the_named_authoritys_and_holds_no_key(tmp_path: Path) -> None:
    consortium, other = made(tmp_path / "c"), made(tmp_path / "other")
    fingerprint = authority_fingerprint(consortium.folder)
    assert authority_faults(consortium.ca_pem, fingerprint) == []
    assert authority_faults(other.ca_pem, fingerprint) == ["is not that of the consortium that the kit names"]
    server = (consortium.folder / "tls/server.crt").read_text()
    assert "is not an authority's" in authority_faults(server, fingerprint)
    both = consortium.ca_pem + (consortium.folder / CA_KEY).read_text()
    assert "holds a private key, which never travels" in authority_faults(both, fingerprint)
    assert authority_faults("nonsense", fingerprint) == ["is no certificate"]
    assert authority_faults(consortium.ca_pem * 2, fingerprint) == ["holds 2 certificates, not one"]


def test_every_fault_of_the_settings_is_told_at_once(tmp_path: Path) -> None:
    wrong = Settings(host="https://fed", port=0, listen="here", superlink_port=0, body_mb=1)
    with pytest.raises(ConfigError) as caught:
        Consortium.create(tmp_path / "c", wrong, 90, 825, NOW)
    keys = [fault.split(":")[0] for fault in caught.value.faults]
    assert sorted(set(keys)) == ["body_mb", "host", "listen", "port", "superlink_port"]
    assert not (tmp_path / "c").exists()
    consortium = made(tmp_path / "c")
    path = consortium.folder / "consortium.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "body_mb": 1, "prot": 8443}))
    with pytest.raises(ConfigError) as caught:
        Consortium.open(consortium.folder)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["prot", "body_mb"]


def test_an_expiry_says_when_and_how_long() -> None:
    begins = datetime(2026, 1, 1, tzinfo=UTC)
    expiry = Expiry("it", begins, begins + timedelta(days=40), begins + timedelta(days=15))
    assert (expiry.days, expiry.near, expiry.over, expiry.early) == (25, True, False, False)
    assert str(expiry) == "it ends on 2026-02-10 00:00 UTC, in 25 days"
