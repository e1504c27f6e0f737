"""A run between processes, through all that lies between hospitals, is the run that a simulation makes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.manifest_rows import read_manifest
from tests.e2e import walks
from tests.proxy import nginx_or_skip

SITES = ("east", "west")
LONGEST_S = 570.0


@dataclass(frozen=True)
class Network:
    """What ``consortium demo --compare`` printed, and the folder that it left."""

    said: dict[str, Any]
    folder: Path

    def receipts(self, site: str) -> list[dict[str, Any]]:
        lines = (self.folder / site / "receipts.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "run" / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    nginx_or_skip()
    folder = tmp_path_factory.mktemp("network") / "demo"
    command = [
        sys.executable, "-m", "wardround", "consortium", "demo", "--recipe", "smoke", "baselines=[]",
        "--out", str(folder), "--compare", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=walks.environment(), capture_output=True, text=True, timeout=LONGEST_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return Network(json.loads(done.stdout), folder)


@pytest.mark.slow
def test_the_adapter_is_that_of_the_simulation(network: Network) -> None:
    assert network.said["adapter_sha256"] == network.said["simulated"]


@pytest.mark.slow
def test_every_process_has_ended(network: Network) -> None:
    here = str(network.folder).encode()
    alive = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            alive += [path.parent.name] if here in path.read_bytes() else []
        except OSError:
            continue  # it ended while we looked
    assert alive == []


@pytest.mark.slow
def test_each_answer_has_its_receipt_and_each_receipt_its_answer(network: Network) -> None:
    for site in SITES:
        came = Counter(
            event["stage"] for event in network.events("message")
            if event["site"] == site and event["direction"] == "up"
        )  # fmt: skip
        booked = {receipt["stage"] for receipt in network.receipts(site)}
        assert set(came) == booked
        assert all(receipt["bytes"] > 0 for receipt in network.receipts(site))


@pytest.mark.slow
def test_nothing_of_a_patient_or_a_path_is_in_what_the_coordinator_keeps(network: Network) -> None:
    kept = [path for path in network.folder.glob("coordinator/**/*") if path.is_file()]
    kept += [path for path in (network.folder / "run").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) > 10_000
    for site in SITES:
        rows = read_manifest(network.folder / site / "data" / "manifest.csv").rows
        markers = {row.image.name.encode() for row in rows} | {str(network.folder / site).encode()}
        for path in kept:
            content = path.read_bytes()
            assert not [marker for marker in markers if marker in content], path.name
