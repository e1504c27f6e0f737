"""A message in frames of at most a mebibyte: what it is and how long it is, then its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from common.errors import ArtefactError
from common.guard_link.guard_pb2 import Frame, Head

FRAME_BYTES = 1 << 20


def frames_of(message: bytes, stage: str = "") -> Iterator[Frame]:
    yield Frame(head=Head(stage=stage, bytes=len(message)))
    view = memoryview(message)
    for start in range(0, len(message), FRAME_BYTES):
        yield Frame(data=bytes(view[start : start + FRAME_BYTES]))


def message_of(frames: Iterable[Frame], max_bytes: int) -> tuple[str, bytes]:
    """The stage and the bytes that ``frames`` are.

    Raises ``ArtefactError`` for what is longer than ``max_bytes``, before it is read, and for what is not as
    long as its head says.
    """
    source = iter(frames)
    first = next(source, None)
    if first is None or first.WhichOneof("part") != "head":
        raise ArtefactError("a message does not begin with its head")
    if first.head.bytes > max_bytes:
        raise ArtefactError(f"a message of {first.head.bytes} bytes, where {max_bytes} are allowed")
    read = bytearray()
    for frame in source:
        if frame.WhichOneof("part") != "data" or len(read) + len(frame.data) > first.head.bytes:
            raise ArtefactError("a message is not as its head says")
        read += frame.data
    if len(read) != first.head.bytes:
        raise ArtefactError(f"a message of {first.head.bytes} bytes ended after {len(read)}")
    return first.head.stage, bytes(read)
