"""Which tensors a patch in a store changes, from its header and table alone: no stream is fetched, none decoded."""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.errors import DamagedObjectError, MalformedError
from thinwire.stores.protocol import GetRange
from thinwire.sync.retrying import retrying
from thinwire.wire.container import PREFIX_BYTES, header_length, parse_header
from thinwire.wire.manifest import DeltaRef, Manifest
from thinwire.wire.patch import Row, parse_rows, table_entry

__all__ = ["Table", "read_table"]

_FIRST_BYTES = 1 << 16  # most patches of a small model lie in here whole, and the headers of nearly all others


@dataclass(frozen=True, slots=True)
class Table:
    """A patch's level, and by tensor (changed cells, cells). Read in part, so not proved by the object's digest."""

    level: str
    tensors: dict[str, tuple[int, int]]

    @property
    def changed(self) -> int:
        """Changed cells of all tensors."""
        return sum(changed for changed, _ in self.tensors.values())


def read_table(store: GetRange, manifest: Manifest, delta: DeltaRef, *, retry_s: float) -> Table:
    """The table of one of the manifest's patches, in one to three requests.

    Raises:
        ObjectNotFoundError, DamagedObjectError: it is not there, or shorter than its manifest says.
        RefuseError: it is no patch, or not one from and to the states that the manifest names.
        RetryError: the store does not answer.
    """
    size = delta.object.size

    def get(start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        got = retrying(lambda: store.get_range(delta.object.key, start, stop - start), limit_s=retry_s)
        if len(got) != stop - start:
            raise DamagedObjectError(f"{len(got)} bytes came where {stop - start} were asked for")
        return got

    head = get(0, min(_FIRST_BYTES, size))
    length = header_length(head[:PREFIX_BYTES], size)
    if PREFIX_BYTES + length > len(head):
        head += get(len(head), PREFIX_BYTES + length)
    header = parse_header(head[PREFIX_BYTES : PREFIX_BYTES + length], size)
    entry = table_entry(header)
    start, stop = header.data_start + entry.start, header.data_start + entry.stop
    packed = head[start:stop] if stop <= len(head) else get(start, stop)
    states = header.metadata.get("parent"), header.metadata.get("result")
    if states != (delta.base_state, manifest.state):
        raise MalformedError("the patch leads from or to another state than its manifest says")
    rows = parse_rows(packed)
    tensors = {row.name: (_changed(row), row.cells) for row in rows}
    return Table(header.metadata.get("level", ""), tensors)


def _changed(row: Row) -> int:
    return {"sparse": row.changed, "raw": row.cells, "moved": 0}[row.kind]
