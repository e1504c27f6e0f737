"""A submitted job is handed to the consortium's SuperLink, as `flwr run` would, and waited for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.canonical import sha256_of
from common.errors import INTERRUPTED_EXIT_CODE, ArtefactError, ConfigError
from common.release import build_bundle
from server import ending
from server.invited import Invited
from server.network.consortium import Consortium
from server.network.control import control_of
from server.network.registry import Registry
from server.network.service import superlink_answers
from server.submission import Submission

LOOK_S = 1.0


def roster_of(consortium: Consortium) -> dict[str, Invited]:
    """Whom a job of this consortium can be put to: those who belong to it now."""
    members = [member for member in Registry(consortium.folder).members() if member.belongs]
    return {one.name: Invited(one.name, one.fingerprint, one.ledger_key) for one in members}


def work(consortium: Consortium, run_dir: Path, mode: str, stopped: Callable[[float], bool]) -> None:
    """Have the SuperLink work on the job in ``run_dir`` in ``mode`` (ask or run), to its end.

    ``stopped(seconds)`` waits that long at most; once it is true the run is stopped at the SuperLink.

    Raises:
        ConfigError: there is no job, or nothing is served. ArtefactError: it is a job for another bundle.
        RunEnded: what the run itself ended with, with its exit code; 130 where it was stopped.
    """
    job = Submission.load(run_dir)
    if job is None:
        raise ConfigError(f"no job was submitted in {run_dir}: wardround consortium submit makes one")
    if not superlink_answers(consortium):
        raise ConfigError(f"nothing is served: wardround consortium serve {consortium.folder}")
    bundle = build_bundle()
    wanted, ours = job.plan.bundle_sha256, sha256_of(bundle)
    if ours != wanted:
        raise ArtefactError(
            f"the job in {run_dir} is for the bundle {wanted[:16]}, and this installation's is {ours[:16]}: "
            "use the release that submitted it, or submit it anew"
        )
    ending.forget(run_dir)
    with control_of(consortium) as control:
        number = control.start_run(bundle, {"run-dir": str(run_dir), "mode": mode})
        while not control.run_is_over(number):
            if stopped(LOOK_S):
                control.stop_run(number)
                again = f"wardround consortium run {consortium.folder} {run_dir}"
                raise ending.RunEnded(f"stopped; {again} goes on from the last round", INTERRUPTED_EXIT_CODE)
    ending.raise_for(run_dir, consortium.folder / "superlink" / "output.log")
