"""The courier's end: messages to the guard's process, and its answers as they are."""

from __future__ import annotations

import grpc

from common import wire
from common.errors import ArtefactError, DeadlinePassed, GuardUnreachable, WardroundError
from common.guard_link.frames import frames_of, message_of
from common.guard_link.guard_pb2_grpc import GuardStub
from common.plan import Round, Stage

MOST_ANSWER_BYTES = 1 << 31
SLACK_S = 60.0  # for the way there and back, beyond what the order allows for the work


def ask(socket: str, stage: Stage, order: Round, content: wire.Content) -> wire.Content:
    """What the guard that listens on ``socket`` (a path) says to ``content``: an answer, or its refusal.

    One connection a message: a courier lives for one. The answer is passed on unread, for it may be signed.

    Raises `GuardUnreachable`, ``DeadlinePassed``, or ``ArtefactError`` where one of the two takes what the
    other sent for no message.
    """
    request = frames_of(wire.pack_content(content), str(stage))
    try:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            answer = GuardStub(channel).Ask(request, timeout=order.deadline_s + SLACK_S)
            _, packed = message_of(answer, MOST_ANSWER_BYTES)
    except grpc.RpcError as error:
        raise _translated(error, socket) from error
    return wire.unpack_content(packed)


def _translated(error: grpc.RpcError, socket: str) -> WardroundError:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return GuardUnreachable(
            f"no guard answers on {socket}: start it (wardround site guard FOLDER --socket {socket}), and "
            "let this process's user be in the socket's group"
        )
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlinePassed("the guard did not answer in the order's time")
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return ArtefactError("the guard takes this for no message, or for too long a one (--max-mb)")
    return ArtefactError(f"the guard's answer broke off ({error.code().name})")
