"""How large a message is, and whether it is too large, without a copy of its arrays."""

from __future__ import annotations

from collections.abc import Sized

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import error_to_proto, metadata_to_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import Array as ProtoArray


def message_bytes(message: Message) -> int:
    """Size of the serialized message, bytes; counted without making it, which would copy every array."""
    error = error_to_proto(message.error) if message.has_error() else None
    size: int = ProtoMessage(metadata=metadata_to_proto(message.metadata), error=error).ByteSize()
    return size + (_delimited(_content_bytes(message.content)) if message.has_content() else 0)


def is_larger(content: RecordDict, max_bytes: int) -> bool:
    """Whether the values in ``content`` alone are more than ``max_bytes``; looks at lengths only."""
    return sum(_value_bytes(value) for record in content.values() for value in record.values()) > max_bytes


def _value_bytes(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    return len(value) * (1 if isinstance(value, (str, bytes)) else 8) if isinstance(value, Sized) else 8


def _content_bytes(content: RecordDict) -> int:
    size = 0
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = sum(
                _delimited(_text_bytes(name) + _array_bytes(array)) for name, array in record.items()
            )
            size += _delimited(_text_bytes(key) + _delimited(arrays))
        else:
            size += recorddict_to_proto(RecordDict({key: record})).ByteSize()
    return size


def _array_bytes(array: Array) -> int:
    about: int = ProtoArray(dtype=array.dtype, shape=array.shape, stype=array.stype).ByteSize()
    return _delimited(about + (_delimited(len(array.data)) if array.data else 0))


def _text_bytes(text: str) -> int:
    return _delimited(len(text.encode())) if text else 0


def _delimited(length: int) -> int:
    """Bytes of a field of ``length`` bytes with its tag (one byte below number 16) and its varint length."""
    return 1 + max(1, -(-length.bit_length() // 7)) + length
