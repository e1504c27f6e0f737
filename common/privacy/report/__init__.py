"""The officer's report on one run at one site: ``privacy.json`` and the one page made from it alone."""

from __future__ import annotations

from pathlib import Path

from common.durable import write_atomic
from common.errors import ArtefactError, VerificationFailed
from common.privacy.report.facts import document_of, from_json, to_json
from common.privacy.report.record import Inquiry, read_record

PRIVACY_JSON = "privacy.json"
PRIVACY_HTML = "privacy.html"


def write_page(folder: Path, inquiry: Inquiry) -> Path:
    """Make ``privacy.json`` and ``privacy.html`` in a site's ``folder``; return the page's path.

    Raises:
        VerificationFailed: the ledger or the receipts are damaged.
        ArtefactError: the folder knows no such run, or a file of it is damaged.
    """
    document = document_of(read_record(folder, inquiry))
    write_atomic(folder / PRIVACY_JSON, to_json(document).encode())
    return rebuild(folder)


def rebuild(folder: Path) -> Path:
    """Make the page from ``privacy.json`` and nothing else; the same document gives the same bytes."""
    target = folder / PRIVACY_HTML
    write_atomic(target, _rendered(folder))
    return target


def check_page(folder: Path) -> None:
    """Raises ``VerificationFailed`` unless the page is, byte for byte, what ``privacy.json`` gives."""
    page = folder / PRIVACY_HTML
    if not page.is_file():
        raise ArtefactError(f"{page} is missing: make it with `wardround privacy page`")
    if page.read_bytes() != _rendered(folder):
        raise VerificationFailed(f"{page} is not what {PRIVACY_JSON} gives: make it again, and compare")


def _rendered(folder: Path) -> bytes:
    # jinja2 is loaded only when a page is made.
    from common.privacy.report.page import render

    return render(from_json(folder / PRIVACY_JSON)).encode()
