"""The command line: mounts the verbs that each folder offers, and turns errors into exit codes.

Each folder's ``commands.py`` imports what it needs inside its functions, so that ``--help`` loads no
torch and answers at once.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from client.audit_commands import audit
from client.commands import data
from client.job_commands import approve, jobs, refuse, stop
from client.joining_commands import site_init, site_join, site_node
from client.network.executor_commands import bundle, executor
from client.policy_commands import policy_draft
from client.preparation.commands import prepare, sets
from client.site_commands import site
from client.student_commands import student
from client.synthetic_commands import synthetic
from common import progress
from common.commands import doctor, teacher
from common.errors import DEFECT_EXIT_CODE, INTERRUPTED_EXIT_CODE, WardroundError
from common.interrupts import resume_hint
from common.privacy.commands import privacy
from common.privacy.policy_commands import policy_group
from server.commands import report
from server.consortium_commands import consortium
from server.submission_commands import ask, run, status, submit
from simulations.commands import demo, recipes, simulate, validate
from simulations.network_commands import network_demo

# A hospital's machine calls nobody on its own, and idle threads do not spin beside a working one.
# Whoever set one of these has decided otherwise.
QUIET_DEFAULTS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
}


class CommandLine(click.Group):
    """A group whose exit code equals the outcome, whatever is raised below it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click knows these: usage is 2
        except WardroundError as error:
            self._leave(ctx, f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            self._leave(ctx, f"Interrupted. {resume_hint()}", INTERRUPTED_EXIT_CODE)
        except Exception as error:
            saved = save_defect_report(error)
            text = (
                f"error: a defect of Wardround ({type(error).__name__}: its report was saved as {saved}).\n"
                "The report may contain paths of this machine: read it before you send it to anyone."
            )
            self._leave(ctx, text, DEFECT_EXIT_CODE)

    @staticmethod
    def _leave(ctx: click.Context, text: str, code: int) -> NoReturn:
        progress.end()  # a bar that still runs would draw over the message
        click.echo(text, err=True)
        ctx.exit(code)


def save_defect_report(error: BaseException) -> Path:
    """Write the traceback and the versions to a file in the temporary folder; return its path."""
    from common.doctor import installed_versions

    handle, name = tempfile.mkstemp(prefix="wardround-defect-", suffix=".txt")
    lines = [
        "A defect of Wardround. This file may contain paths of this machine: read it before you send it.",
        f"command: {shlex.join(['wardround', *sys.argv[1:]])}",
        f"python {platform.python_version()} on {platform.platform()}",
        *(f"{package} {version}" for package, version in installed_versions().items()),
        "",
        *traceback.format_exception(error),
    ]
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("\n".join(lines))
    return Path(name)


@click.group(
    cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="wardround")
def main() -> None:
    """Wardround: hospitals teach one shared teacher, and each goes home with a small student.

    Images never travel; every byte that does is on a receipt.

    \b
    Example:
      wardround demo
    """
    for name, value in QUIET_DEFAULTS.items():
        os.environ.setdefault(name, value)


COMMANDS = (
    demo, simulate, recipes, validate, report, data, teacher, student, synthetic, privacy, site, consortium,
    doctor,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)
data.add_command(prepare)
data.add_command(sets)
privacy.add_command(audit)
policy_group.add_command(policy_draft)
for command in (site_init, site_join, site_node, executor, bundle, jobs, approve, refuse, stop):
    site.add_command(command)
for command in (submit, ask, run, status, network_demo):
    consortium.add_command(command)

if __name__ == "__main__":
    main(prog_name="wardround")
