"""One message answered: decode, ask the guard, encode. The same at a courier's and at a guard's own door."""

from __future__ import annotations

from collections.abc import Callable

from common import guard_api, wire
from common.guard_api import GuardApi
from common.plan import Round, Stage
from common.wire.tensors import decode_adapter

Work = Callable[[GuardApi, Round, wire.Content], wire.Content]


def _student(guard: GuardApi, order: Round, content: wire.Content) -> wire.Content:
    request = wire.decode_student_request(content)
    note = guard.train_student(order, request.adapter, request.styles, request.generator, request.student)
    return wire.encode_numbers(note)


WORK: dict[Stage, Work] = {
    Stage.propose: lambda g, o, c: wire.encode_answer(g.propose(wire.decode_proposal(c), o)),
    Stage.adapt: lambda g, o, c: wire.encode_update(o, g.adapt(o, decode_adapter(c))),
    Stage.style: lambda g, o, c: wire.encode_numbers(g.style(o)),
    Stage.generator: lambda g, o, c: wire.encode_update(o, g.train_generator(o, decode_adapter(c))),
    Stage.shared_student: lambda g, o, c: wire.encode_update(o, g.train_shared_student(o, decode_adapter(c))),
    Stage.student: _student,
    Stage.evaluate: lambda g, o, c: wire.encode_numbers(g.evaluate(o, decode_adapter(c))),
}


def answer(guard: GuardApi, stage: Stage, order: Round, content: wire.Content) -> wire.Content:
    """What ``guard`` says to ``content``, whose order is ``order``; what the guard raises goes through."""
    return WORK[stage](guard, order, content)


def ask(address: str, stage: Stage, order: Round, content: wire.Content) -> wire.Content:
    """What the guard at ``address`` says to ``content``.

    ``unix:SOCKET`` is a guard in a process of its own, whose answers pass unread; of another kind see
    `common.guard_api.connect`.
    """
    kind, _, socket = address.partition(":")
    if kind == "unix" and socket:
        from common.guard_link import remote  # gRPC, which only a deployed courier needs

        return remote.ask(socket, stage, order, content)
    return answer(guard_api.connect(address), stage, order, content)
