"""The site's list of bundles: what is on it runs, from the next task on, and nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from client.network.approved import APPROVED, ApprovedBundles, bundle_sha256
from common.errors import ConfigError, UsageError
from wardround import main

A, B = "a" * 64, "b" * 64


def test_without_a_list_nothing_may_run(tmp_path: Path) -> None:
    approved = ApprovedBundles(tmp_path)
    assert approved.read() == []
    assert not approved.allow(A)
    assert not approved.allow(None)


def test_what_another_process_writes_holds_at_once(tmp_path: Path) -> None:
    executor, steward = ApprovedBundles(tmp_path), ApprovedBundles(tmp_path)
    assert steward.approve(A, "  by the\n board ")
    assert not steward.approve(A, "again")
    assert steward.approve(B)
    assert executor.allow(A)
    assert executor.read()[0].note == "by the board"
    assert steward.revoke(A)
    assert not steward.revoke(A)
    assert not executor.allow(A)
    assert executor.allow(B)
    assert not executor.allow(B[:63])
    assert not executor.allow(None)


def test_a_list_that_cannot_be_trusted_approves_nothing_and_says_all_that_is_wrong(tmp_path: Path) -> None:
    approved = ApprovedBundles(tmp_path)
    approved.approve(A)
    path = tmp_path / APPROVED
    path.write_text(path.read_text() + "nonsense\n" + A.upper() + "\n")
    path.chmod(0o666)
    with pytest.raises(ConfigError) as wrong:
        approved.allow(A)
    assert len(wrong.value.faults) == 3
    assert "chmod go-w" in wrong.value.faults[0]
    with pytest.raises(ConfigError):
        approved.approve(B)


def test_others_never_may_write_the_list(tmp_path: Path) -> None:
    approved = ApprovedBundles(tmp_path)
    approved.approve(A)
    (tmp_path / APPROVED).chmod(0o600)
    approved.approve(B)
    assert (tmp_path / APPROVED).stat().st_mode & 0o777 == 0o600


def test_a_bundle_is_named_by_its_digest_or_its_file(tmp_path: Path) -> None:
    file = tmp_path / "release.fab"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pyproject.toml", "")
    assert bundle_sha256(str(file)) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert bundle_sha256(A.upper()) == A
    (tmp_path / "text.fab").write_text("no bundle")
    for wrong in (A[:-1], str(tmp_path / "text.fab"), str(tmp_path / "missing.fab"), str(tmp_path)):
        with pytest.raises(UsageError, match="SHA-256"):
            bundle_sha256(wrong)


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["site", "bundle", *map(str, arguments)])


def test_the_commands_approve_list_and_revoke(tmp_path: Path) -> None:
    assert cli("list", tmp_path).output == "none: every run is refused here\n"
    assert cli("approve", tmp_path, A, "--note", "the board").output == f"{A} is approved\n"
    assert cli("approve", tmp_path, A).output == f"{A} was approved before\n"
    assert f"{A}  2" in cli("list", tmp_path).output
    (listed,) = json.loads(cli("list", tmp_path, "--json").output)
    assert (listed["sha256"], listed["note"]) == (A, "the board")
    assert cli("revoke", tmp_path, B).exit_code == 2
    assert cli("revoke", tmp_path, A).exit_code == 0
    assert cli("approve", tmp_path, "nonsense").exit_code == 2
    assert not ApprovedBundles(tmp_path).allow(A)


def test_a_release_is_built_and_its_digest_is_what_is_approved(tmp_path: Path) -> None:
    first, second = tmp_path / "one.fab", tmp_path / "two.fab"
    said = [cli("build", path).output.split()[0] for path in (first, second)]
    assert said[0] == said[1] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert first.read_bytes() == second.read_bytes()
    names = zipfile.ZipFile(io.BytesIO(first.read_bytes())).namelist()
    assert "client/app.py" in names
    assert not [name for name in names if name.startswith("configs") or name == "client/guard.py"]
    cli("approve", tmp_path, first)
    assert ApprovedBundles(tmp_path).allow(said[0])
