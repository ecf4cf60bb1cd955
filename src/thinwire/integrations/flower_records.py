"""Flower's records and messages as thinwire's models and bytes. The first file of the integration to import Flower."""

from __future__ import annotations

from thinwire.errors import MalformedError, MisuseError, ThinwireError, WrongBaseError
from thinwire.federated.model import ModelState

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
    from flwr.app.message.message import make_message
    from flwr.common.constant import ErrorCode
    from flwr.common.serde import message_to_proto
except ImportError as error:  # pragma: no cover - the tests have it
    raise MisuseError("SparseSync runs on Flower; install it with: pip install 'thinwire[federated]'") from error

__all__ = [
    "KEY",
    "STYPE",
    "Array",
    "ArrayRecord",
    "ConfigRecord",
    "Message",
    "RecordDict",
    "array_name",
    "category",
    "data_of",
    "error_reply",
    "in_place_of",
    "means_lost",
    "message_bytes",
    "model_of",
    "orders_record",
    "packed",
    "payload_bytes",
    "record_of",
    "refused",
]

STYPE = "thinwire.frames.v1"
"""``Array.stype`` of our payload: Flower carries the bytes and never looks into them."""

KEY = "thinwire"
_LOST = "thinwire/lost: "
_REFUSED = "thinwire/refused: "


def model_of(record: ArrayRecord) -> ModelState:
    """The arrays as a model.

    Raises:
        MisuseError: an array that is no NumPy array, such as one that another layer has packed.
    """
    try:
        return ModelState.of({name: array.numpy() for name, array in record.items()})
    except (TypeError, ValueError) as error:
        raise MisuseError(f"an ArrayRecord does not hold NumPy arrays: {error}") from error


def record_of(state: ModelState) -> ArrayRecord:
    """The model as arrays, bit for bit."""
    named = zip(state.layout.rows, state.tensors, strict=True)
    return ArrayRecord({name: Array(tensor.numpy()) for (name, _, _), tensor in named})


def packed(data: bytes) -> ArrayRecord:
    """A payload as an ArrayRecord of one Array, with our own ``stype``."""
    return ArrayRecord({KEY: Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})


def data_of(record: ArrayRecord) -> bytes:
    """The payload of such a record.

    Raises:
        MalformedError: it is none.
    """
    array = record.get(KEY)
    if len(record) != 1 or array is None or array.stype != STYPE:
        raise MalformedError("an ArrayRecord holds no update; does the ClientApp run SparseSyncMod?")
    return array.data


def array_name(content: RecordDict) -> str:
    """The name of the one ArrayRecord.

    Raises:
        MalformedError: there are none, or several.
    """
    names = list(content.array_records)
    if len(names) != 1:
        raise MalformedError(f"{len(names)} ArrayRecords in a message; SparseSync carries exactly one")
    return str(names[0])


def category(message: Message) -> str:
    """``train``, ``evaluate`` or ``query``."""
    return message.metadata.message_type.split(".", 1)[0]


def error_reply(message: Message, error: ThinwireError) -> Message:
    """What a client answers where it cannot go on; the server learns whether an anchor would help."""
    prefix = _LOST if isinstance(error, WrongBaseError) else _REFUSED
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, f"{prefix}{error}"), reply_to=message)


def means_lost(message: Message) -> bool:
    """Whether a client has said that it does not hold the model that the server believes it to."""
    return message.has_error() and (message.error.reason or "").startswith(_LOST)


def refused(message: Message, reason: str) -> Message:
    """A reply turned into a failure, for the strategy to count."""
    return make_message(message.metadata, error=Error(ErrorCode.MOD_FAILED_PRECONDITION, _REFUSED + reason))


def in_place_of(message: Message, content: RecordDict) -> Message:
    """A message with another's metadata."""
    return make_message(message.metadata, content=content)


def message_bytes(message: Message) -> int:
    """Bytes of the message as Flower serialises it."""
    return int(message_to_proto(message).ByteSize())


def payload_bytes(message: Message) -> int:
    """Bytes in it that are ours."""
    if not message.has_content():
        return 0
    arrays = (a for record in message.content.array_records.values() for a in record.values())
    return sum(len(array.data) for array in arrays if array.stype == STYPE)


def orders_record(data: bytes) -> ConfigRecord:
    """What the client is told, as a record beside the user's own."""
    return ConfigRecord({"o": data})
