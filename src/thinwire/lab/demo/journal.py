"""Journals: one file of JSON lines for each life of each process, appended to by it and read by the director.

A process that is killed in the middle of a line leaves an unfinished last line; a reader takes only lines that end.
Files of different lives never mix, so nothing is ever written after such a stump.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

__all__ = ["Event", "Journal", "JournalReader"]

Event = dict[str, Any]
"""One record: ``t`` (seconds since the epoch), ``who``, ``life`` (1, 2, ...), ``what``, and the facts."""


class Journal:
    """Writes the records of one life of one process.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Journal(Path(folder), "worker-0", 1).write("applied", version=3)
    ...     [(event["who"], event["version"]) for event in JournalReader(Path(folder)).read()]
    [('worker-0', 3)]
    """

    def __init__(self, folder: Path, who: str, life: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{who}.{life}.jsonl").open("x", encoding="utf-8")
        self._common = {"who": who, "life": life}

    def write(self, what: str, **facts: Any) -> None:
        """Append one record; it is with the operating system when this returns, and survives a kill."""
        record = {"t": time.time(), **self._common, "what": what, **facts}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


class JournalReader:
    """Reads what has been added to all journals of a folder since it last looked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def read(self) -> list[Event]:
        """New records of all processes, in order of time."""
        events: list[Event] = []
        for path in sorted(self._folder.glob("*.jsonl")):
            start = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                fresh = file.read()
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._read[path] = start + len(whole)
            events += [json.loads(line) for line in whole.splitlines()]
        return sorted(events, key=lambda event: float(event["t"]))
