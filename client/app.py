"""The courier: Flower's ClientApp. It sees no image: it decodes, asks the guard, and encodes.

Flower ships this code from whoever submits a run, so nothing here can protect a site; the guard does.
What it must not do is talk: Flower sends the text of an exception to the server word for word, so none
may leave a handler.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.faults import border_answer, keep_fault
from common import guard_api, wire
from common.errors import UsageError
from common.guard_api import GuardApi
from common.plan import Round, Stage

app = ClientApp()

Work = Callable[[GuardApi, Round, wire.Content], wire.Content]


def guard_address(context: Context) -> str:
    """``guard`` of the node's own configuration, or in a simulation the folder with this node's number."""
    if address := context.node_config.get("guard"):
        return str(address)
    sites = os.environ.get("WARDROUND_SITES")
    if not sites:
        raise UsageError("no guard: give the node's configuration guard=ADDRESS, or set WARDROUND_SITES")
    folders = sorted(folder for folder in Path(sites).iterdir() if folder.is_dir())
    return f"in-process:{folders[int(context.node_config['partition-id'])]}"


def _serve(stage: Stage, work: Work) -> None:
    """Register ``work`` as the handler of ``stage``'s messages."""
    kind, _, action = wire.ACTIONS[stage].partition(".")

    def handle(message: Message, context: Context) -> Message:
        address = ""
        try:
            address = guard_address(context)
            order = wire.decode_order(message.content)
            content = work(guard_api.connect(address), order, message.content)
        except (Exception, SystemExit) as error:  # no text may leave; Ctrl-C still stops
            keep_fault(address, wire.ACTIONS[stage], error)
            content = wire.encode_refusal(*border_answer(error))
        return Message(content, reply_to=message)

    getattr(app, kind)(action)(handle)


def _student(guard: GuardApi, order: Round, content: wire.Content) -> wire.Content:
    request = wire.decode_student_request(content)
    note = guard.train_student(order, request.adapter, request.styles, request.generator, request.student)
    return wire.encode_numbers(note)


_serve(Stage.propose, lambda g, o, c: wire.encode_answer(g.propose(wire.decode_proposal(c), o)))
_serve(Stage.adapt, lambda g, o, c: wire.encode_update(o, g.adapt(o, wire.decode_adapter(c))))
_serve(Stage.style, lambda g, o, c: wire.encode_numbers(g.style(o)))
_serve(Stage.generator, lambda g, o, c: wire.encode_update(o, g.train_generator(o, wire.decode_adapter(c))))
_serve(
    Stage.shared_student,
    lambda g, o, c: wire.encode_update(o, g.train_shared_student(o, wire.decode_adapter(c))),
)
_serve(Stage.student, _student)
_serve(Stage.evaluate, lambda g, o, c: wire.encode_numbers(g.evaluate(o, wire.decode_adapter(c))))
