"""The courier: Flower's ClientApp. It sees no image: it decodes, asks the guard, and encodes.

Flower ships this code from whoever submits a run, so nothing here can protect a site; the guard does.
What it must not do is talk: Flower sends the text of an exception to the server word for word, so none
may leave a handler.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.faults import border_answer, keep_fault
from common import wire
from common.errors import UsageError
from common.plan import Stage
from common.wire import desk

app = ClientApp()


def guard_address(context: Context) -> str:
    """``guard`` of the node's own configuration, or in a simulation the folder with this node's number."""
    if address := context.node_config.get("guard"):
        return str(address)
    sites = os.environ.get("WARDROUND_SITES")
    if not sites:
        raise UsageError("no guard: give the node's configuration guard=ADDRESS, or set WARDROUND_SITES")
    folders = sorted(folder for folder in Path(sites).iterdir() if folder.is_dir())
    return f"in-process:{folders[int(context.node_config['partition-id'])]}"


def _serve(stage: Stage) -> None:
    """Register the handler of ``stage``'s messages."""
    kind, _, action = wire.ACTIONS[stage].partition(".")

    def handle(message: Message, context: Context) -> Message:
        address = ""
        try:
            address = guard_address(context)
            order = wire.decode_order(message.content)
            content = desk.ask(address, stage, order, message.content)
        except (Exception, SystemExit) as error:  # no text may leave; Ctrl-C still stops
            keep_fault(address, wire.ACTIONS[stage], error)
            content = wire.encode_refusal(*border_answer(error))
        return Message(content, reply_to=message)

    getattr(app, kind)(action)(handle)


for _stage in wire.ACTIONS:
    _serve(_stage)
