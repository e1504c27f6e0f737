"""Every error that Wardround raises on purpose, with its exit code.

::

    WardroundError
    ├── UsageError            2   the command was called wrongly
    ├── ConfigError          10   a recipe or a site file is wrong
    ├── DataError            11   images, masks or a manifest are wrong
    ├── ArtefactError        12   an adapter, a checkpoint or a state is bad or does not match
    │   └── DiskFault        12   a file cannot be written: the disk is full or read-only
    ├── PolicyRefusal        20   a site's policy says no
    │   ├── ConsentPending   20   nobody at the site has approved this very plan yet
    │   └── ConsentRefused   20   the site has refused it, has stopped, or its approval does not hold any more
    ├── BudgetExceeded       21   the privacy budget would be passed
    ├── VerificationFailed   22   a record does not hold
    ├── FederationError      30   too few sites, rejected updates
    │   └── GuardUnreachable 30   a site's guard does not run, or this user may not reach it
    └── DeadlinePassed       31   a wait ended without its answer

An exit code of 70 means a defect of ours and has no class here: it is whatever else was raised.

``border_code`` is all that may cross a site's border when one of these is raised inside it: it never
depends on data. The text stays at the site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

DEFECT_EXIT_CODE = 70
INTERRUPTED_EXIT_CODE = 130  # the shell's convention for Ctrl-C


class WardroundError(Exception):
    """An error with a cause that a user can act on.

    ``faults`` lists every fault found, one line each, when there is more than one.
    """

    exit_code: ClassVar[int] = DEFECT_EXIT_CODE
    border_code: ClassVar[str] = "SITE_FAILED"

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  - {fault}" for fault in self.faults)])


class UsageError(WardroundError):
    exit_code = 2


class ConfigError(WardroundError):
    exit_code = 10
    border_code = "SITE_CONFIG"


class DataError(WardroundError):
    # Whether a site's data has a fault is a fact about its data: outside, this looks like any refusal.
    exit_code = 11
    border_code = "REFUSED_LOCAL"


class ArtefactError(WardroundError):
    exit_code = 12
    border_code = "ARTEFACT_MISMATCH"


class DiskFault(ArtefactError):
    pass


class PolicyRefusal(WardroundError):
    """``code`` and ``field`` name the policy's rule; neither depends on data, so both may travel."""

    exit_code = 20
    border_code = "REFUSED_POLICY"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ConsentPending(PolicyRefusal):
    border_code = "PENDING"


class ConsentRefused(PolicyRefusal):
    border_code = "REFUSED_CONSENT"


class BudgetExceeded(WardroundError):
    exit_code = 21
    border_code = "REFUSED_BUDGET"


class VerificationFailed(WardroundError):
    exit_code = 22


class FederationError(WardroundError):
    exit_code = 30


class GuardUnreachable(FederationError):
    border_code = "GUARD_UNREACHABLE"


class DeadlinePassed(WardroundError):
    exit_code = 31
    border_code = "DEADLINE"
