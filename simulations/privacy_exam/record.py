"""Items 17, 24 and 36: changed bytes, policies that must be refused, the verifier on a bare machine."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.canonical import canonical_json
from common.errors import ArtefactError, PolicyRefusal
from common.privacy.bundle import read_bundle, write_bundle
from common.privacy.entries import Context, EntryType
from common.privacy.keys import key_id, public_key, sign
from common.privacy.ledger import Ledger
from common.privacy.policy import load_signed, sign_policy, signature_path
from common.privacy.terms import check_in_force, policy_record
from common.privacy.verify import Evidence, verify
from simulations.privacy_exam.site import make_site, policy_for
from simulations.privacy_exam.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]
# Torch cannot be imported, and no connection can be opened.
BARE = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "opacus", "flwr", "ray"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
def deny(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        raise RuntimeError("the network was asked for")
sys.addaudithook(deny)
from wardround import main
main(sys.argv[1:], prog_name="wardround")
"""


def item_17(count: int, seed: int = 0) -> Verdict:
    """One flipped bit at random places of every file of a bundle, as a folder's files and as a zip."""
    rng, officer = random.Random(seed), Ed25519PrivateKey.generate()
    with tempfile.TemporaryDirectory() as name:
        folder, packed = Path(name) / "site", Path(name) / "site.zip"
        make_site(folder, officer)
        write_bundle(folder, packed)
        files, whole = read_bundle(folder), packed.read_bytes()
        evidence = Evidence(public_key(officer))
        untouched = verify(files, evidence).holds and verify(read_bundle(packed), evidence).holds
        missed = []
        for _ in range(count):
            target = rng.choice([*sorted(files), "zip"])
            data = whole if target == "zip" else files[target]
            place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
            changed = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
            if _holds(target, changed, files, packed, evidence):
                missed.append(f"{target}:{place}")
    figure = f"{count - len(missed)} of {count} found{'; missed ' + ', '.join(missed) if missed else ''}"
    return Verdict("17", "one bit flipped in a bundle", figure, "all", untouched and not missed)


def _holds(target: str, changed: bytes, files: dict[str, bytes], packed: Path, evidence: Evidence) -> bool:
    if target != "zip":
        return verify(files | {target: changed}, evidence).holds
    packed.write_bytes(changed)
    try:
        return verify(read_bundle(packed), evidence).holds
    except ArtefactError:
        return False


def item_24() -> Verdict:
    """Each policy that must not be in force, by the field that says so."""
    officer, stranger = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    now = datetime.now(UTC) + timedelta(seconds=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = policy_for(officer, version=2)
        path = sign_policy(policy, folder, officer)
        ledger = Ledger.create(folder, "harbour", policy.caps)
        ledger.record(EntryType.policy, Context(), policy_record(policy))
        weaker = policy_for(officer, version=1, max_epsilon_total=100.0)
        foreign = sign_policy(policy_for(stranger), folder / "b", stranger)
        cases: dict[str, tuple[str, Callable[[], object]]] = {
            "expired": ("expires", lambda: check_in_force(policy, now + timedelta(days=400))),
            "wrong key": ("officer", lambda: load_signed(foreign, public_key(officer))),
            "unknown key": ("policy", lambda: _with_unknown_field(path, officer)),
            "changed": ("signature", lambda: _changed(path, officer)),
            "weaker version": ("version", lambda: check_in_force(weaker, now, ledger.entries)),
            "clock": ("clock", lambda: check_in_force(policy, now - timedelta(days=1), ledger.entries)),
        }  # fmt: skip
        load_signed(path, public_key(officer))
        check_in_force(policy, now, ledger.entries)
        found = {case: _field_refused(attempt) == field for case, (field, attempt) in cases.items()}
    figure = f"{sum(found.values())} of {len(found)} refused: {', '.join(found)}"
    return Verdict("24", "policies that must not be in force", figure, "all", all(found.values()))


def _field_refused(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except PolicyRefusal as refusal:
        return refusal.field
    return None


def _with_unknown_field(path: Path, officer: Ed25519PrivateKey) -> object:
    text = canonical_json({**json.loads(path.read_text()), "also_allow": "everything"})
    goal = path.with_name("unknown.json")
    goal.write_text(text)
    signature = {"key_id": key_id(public_key(officer)), "signature": sign(officer, text)}
    signature_path(goal).write_text(canonical_json(signature))
    return load_signed(goal, public_key(officer))


def _changed(path: Path, officer: Ed25519PrivateKey) -> object:
    goal = path.with_name("changed.json")
    goal.write_text(path.read_text().replace('"max_epsilon_total":8.0', '"max_epsilon_total":9.0'))
    signature_path(goal).write_bytes(signature_path(path).read_bytes())
    return load_signed(goal, public_key(officer))


def item_36() -> Verdict:
    """The command in processes of their own, without torch and network: twice, then on a changed bundle."""
    officer = Ed25519PrivateKey.generate()
    with tempfile.TemporaryDirectory() as name:
        folder, packed, key = Path(name) / "site", Path(name) / "site.zip", Path(name) / "officer.pub"
        head = make_site(folder, officer).head.hash
        key.write_text(public_key(officer))
        write_bundle(folder, packed)
        options = ["--officer-key", str(key), "--ledger-head", head, "--json"]
        start, used = time.monotonic(), _children_cpu_s()
        first = _bare("--bundle", str(packed), *options)
        wall, seconds = time.monotonic() - start, _children_cpu_s() - used
        second, unpacked = _bare("--bundle", str(packed), *options), _bare("--bundle", str(folder), *options)
        packed.write_bytes(packed.read_bytes().replace(b"dp_sgd", b"dp_sgp", 1))
        tampered = _bare("--bundle", str(packed), *options)
    same = first.stdout == second.stdout == unpacked.stdout and json.loads(first.stdout)["holds"]
    codes = [run.returncode for run in (first, second, unpacked, tampered)]
    output = "identical" if same else "DIFFERS"
    figure = f"{seconds:.1f} s of CPU ({wall:.0f} s here); exit codes {codes}; output {output}"
    passed = seconds < 60 and same and codes == [0, 0, 0, 22]
    return Verdict("36", "verify without torch and network", figure, "60 s of CPU; 0, 0, 0, 22", passed)


def _children_cpu_s() -> float:
    """Of a busy machine, wall time says nothing."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _bare(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BARE, "privacy", "verify", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
