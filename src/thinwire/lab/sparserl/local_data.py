"""Data sets of real text: files under ``THINWIRE_DATA``, or the Hub by the library ``datasets``.

===============  ==============================================================  =======================================
name             files under ``THINWIRE_DATA``                                   on the Hub
===============  ==============================================================  =======================================
GSM8K            ``gsm8k/train.jsonl``, ``test.jsonl``                           ``openai/gsm8k``, ``main``
HumanEval        ``humaneval/HumanEval.jsonl.gz``                                ``openai/openai_humaneval``
Anthropic HH     ``hh-rlhf/KIND-base-test.jsonl.gz``                             ``Anthropic/hh-rlhf``
TruthfulQA       ``truthfulqa/generation.jsonl``                                 ``truthfulqa/truthful_qa``
ToxiGen          ``toxigen/annotated.jsonl``                                     ``toxigen/toxigen-data``
===============  ==============================================================  =======================================

The folder goes first; what it lacks is asked of the Hub, which needs the network once. Rows are mappings.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinwire.errors import MalformedError, MisuseError, RetryError

__all__ = ["read_rows", "rows_of"]

_BYTES_MAX = 256 << 20


def read_rows(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, gzipped or not, each with all of ``keys``.

    Raises:
        MisuseError: there is no such file.
        MalformedError: a line is no object with these keys; the file is cut off, empty, or unpacks to over 256 MiB.
    """
    if not path.is_file():
        raise MisuseError(f"there is no file {path}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_BYTES_MAX + 1)
    except (OSError, EOFError) as error:
        raise MalformedError(f"{path} cannot be read: {error}") from error
    if len(data) > _BYTES_MAX:
        raise MalformedError(f"{path} holds more than {_BYTES_MAX} bytes")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = json.loads(line)
            missing = [key for key in keys if key not in row]
        except (ValueError, TypeError, RecursionError) as error:
            raise MalformedError(f"{path}, line {number}: {error}") from error
        if missing or not isinstance(row, dict):
            raise MalformedError(f"{path}, line {number} is no object with {', '.join(keys)}")
        rows.append(row)
    if not rows:
        raise MalformedError(f"{path} is empty")
    return rows


def rows_of(file: str, keys: Sequence[str], hub: Sequence[str], *, split: str, **options: Any) -> list[dict[str, Any]]:
    """Rows of ``file`` under ``THINWIRE_DATA``, or else of the data set ``hub`` (name and configuration) on the Hub.

    Raises:
        MisuseError: ``datasets`` is needed and not installed, or the data set lacks one of the columns.
        RetryError: neither is there: what to do is said.
        MalformedError: as :func:`read_rows`.
    """
    root = os.environ.get("THINWIRE_DATA")
    if root and (Path(root) / file).is_file():
        return read_rows(Path(root) / file, keys)
    try:
        import datasets
    except ImportError as error:
        raise MisuseError(
            f"set THINWIRE_DATA to a folder with {file}, or pip install 'thinwire[train]' to take {hub[0]} from the Hub"
        ) from error
    try:
        found = datasets.load_dataset(*hub, split=split, **options)
    except Exception as error:  # the library raises many kinds: offline, moved, gated
        raise RetryError(
            f"{hub[0]} could not be loaded from the Hub ({type(error).__name__}: {str(error)[:160]}). Be online, or "
            f"put {file} into the folder that THINWIRE_DATA names"
        ) from error
    missing = [key for key in keys if key not in found.column_names]
    if missing:
        raise MisuseError(f"{hub[0]} has no column {missing[0]!r}; it has {', '.join(found.column_names)}")
    return [dict(row) for row in found]
