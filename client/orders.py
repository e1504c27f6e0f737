"""The orders that a guard in a process of its own has taken: none is taken twice, over restarts too."""

from __future__ import annotations

import json
import os
from pathlib import Path

from common.canonical import canonical_json
from common.durable import disk_fault
from common.errors import ArtefactError, PolicyRefusal
from common.plan import Round

ORDERS = "orders.jsonl"


class OrderBook:
    """``orders.jsonl`` in a site's folder.

    Guarantee: an order is on the disk before it is worked on, so before anything of its answer is released.
    A server that wants an answer again sends a new order, which is booked, and in a private run paid, as one.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ``ArtefactError`` if the file is damaged: what was taken cannot be told then."""
        self._path = folder / ORDERS
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            self._taken = {str(json.loads(line)["nonce"]) for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{self._path} is damaged: restore it from a backup") from error

    def take(self, order: Round) -> None:
        """Raises ``PolicyRefusal`` (field ``order``) for one that was taken before, or has no nonce.

        And ``DiskFault`` if the disk does not take it: the order may then come again.
        """
        if not order.nonce or order.nonce in self._taken:
            raise PolicyRefusal("this order was taken before, by this guard or one before it", field="order")
        entry = {
            "nonce": order.nonce, "plan": order.plan_sha256, "stage": str(order.stage), "index": order.index
        }  # fmt: skip
        self._append((canonical_json(entry) + "\n").encode())
        self._taken.add(order.nonce)

    def _append(self, line: bytes) -> None:
        """On the disk when this returns; where the disk does not take it whole, as if it had not been tried.

        Raises ``DiskFault``.
        """
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self._path.exists():
                os.truncate(self._path, before)  # half a line would read as a damaged book
            raise disk_fault(self._path.parent, error, len(line)) from error
