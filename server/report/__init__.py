"""The report of a run: ``report.json`` and the one page made from it alone."""

from __future__ import annotations

from pathlib import Path

from common.durable import write_atomic
from common.errors import ArtefactError
from server.report.schema import RunReport

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


def rebuild(run_dir: Path) -> Path:
    """Make ``run_dir/report.html`` from ``run_dir/report.json`` and nothing else; return its path.

    The same report gives the same page, byte for byte.

    Raises:
        ArtefactError: the report is missing, unreadable or holds faults, all of them listed; or the page
            cannot be written.
    """
    # jinja2 is loaded only when a page is made: the coordinator imports this package for the schema.
    from server.report.checks import faults
    from server.report.page import render

    source = run_dir / REPORT_JSON
    if not source.is_file():
        raise ArtefactError(
            f"{source} is missing: name the folder of a finished run (wardround report RUN_DIR)"
        )
    report = RunReport.load(source)
    if found := faults(report):
        raise ArtefactError(f"{source} holds {len(found)} fault(s); no page was made", faults=found)
    target = run_dir / REPORT_HTML
    write_atomic(target, render(report).encode())
    return target
