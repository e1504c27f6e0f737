"""The courier's end: a `GuardApi` whose every verb is a message to the guard's process."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from common import wire
from common.adapter import Adapter, AdapterUpdate
from common.errors import ArtefactError, DeadlinePassed, GuardUnreachable, PolicyRefusal, WardroundError
from common.guard_api import PlanAnswer, SiteMetrics, StudentNote
from common.guard_link.frames import frames_of, message_of
from common.guard_link.guard_pb2_grpc import GuardStub
from common.plan import Round, RunPlan, Stage
from common.style import StyleSummary

MOST_ANSWER_BYTES = 1 << 31
SLACK_S = 60.0  # for the way there and back, beyond what the order allows for the work


class GuardRefusal(PolicyRefusal):
    """The guard's own no, with its code and field and nothing else."""

    def __init__(self, code: str, field: str) -> None:
        super().__init__(f"the guard refused: {code}{f', {field}' if field else ''}", field)
        self.border_code = code  # type: ignore[misc]  # each refusal has its own


@dataclass(frozen=True)
class RemoteGuard:
    """The guard that listens on ``socket`` (a path). One connection a verb: a courier lives for one message.

    Every verb raises `GuardRefusal`, `GuardUnreachable`, ``DeadlinePassed``, or ``ArtefactError`` where one
    of the two takes what the other sent for no message.
    """

    socket: str

    def propose(self, plan: RunPlan, order: Round) -> PlanAnswer:
        return wire.decode_answer(self._ask(order, wire.encode_proposal(order, plan)))

    def adapt(self, order: Round, adapter: Adapter) -> AdapterUpdate:
        return wire.decode_update(self._ask(order, wire.encode_request(order, adapter)))[1]

    def style(self, order: Round) -> StyleSummary:
        return wire.decode_style(self._ask(order, wire.encode_request(order)))

    def train_generator(self, order: Round, adapter: Adapter) -> AdapterUpdate:
        return wire.decode_update(self._ask(order, wire.encode_request(order, adapter)))[1]

    def train_shared_student(self, order: Round, student: Adapter) -> AdapterUpdate:
        return wire.decode_update(self._ask(order, wire.encode_request(order, student)))[1]

    def train_student(
        self,
        order: Round,
        adapter: Adapter,
        styles: dict[str, StyleSummary],
        generator: Adapter | None,
        student: Adapter | None = None,
    ) -> StudentNote:
        request = wire.StudentRequest(adapter, styles, generator, student)
        return wire.decode_note(self._ask(order, wire.encode_student_request(order, request)))

    def evaluate(self, order: Round, adapter: Adapter) -> SiteMetrics:
        return wire.decode_metrics(self._ask(order, wire.encode_request(order, adapter)))

    def _ask(self, order: Round, content: wire.Content) -> wire.Content:
        request = frames_of(wire.pack_content(content), str(Stage(order.stage)))
        try:
            with grpc.insecure_channel(f"unix:{self.socket}") as channel:
                answer = GuardStub(channel).Ask(request, timeout=order.deadline_s + SLACK_S)
                _, packed = message_of(answer, MOST_ANSWER_BYTES)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        reply = wire.unpack_content(packed)
        if refused := wire.decode_refusal(reply):
            raise GuardRefusal(refused.code, refused.field)
        return reply

    def _translated(self, error: grpc.RpcError) -> WardroundError:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return GuardUnreachable(
                f"no guard answers on {self.socket}: start it (wardround site guard FOLDER --socket "
                f"{self.socket}), and let this process's user be in the socket's group"
            )
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlinePassed("the guard did not answer in the order's time")
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return ArtefactError("the guard takes this for no message, or for too long a one (--max-mb)")
        return ArtefactError(f"the guard's answer broke off ({error.code().name})")
