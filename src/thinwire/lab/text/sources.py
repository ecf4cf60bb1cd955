"""Where texts come from.

======================  ===============================================================  ===========================
name                    what                                                             where it comes from
======================  ===============================================================  ===========================
``grammar``             sentences of a small grammar, 200,000 characters                 a program (:mod:`.grammar`)
``tinyshakespeare``     1.1 million characters of plays (Karpathy 2015)                  ``ROOT/text/``
``wikitext2``           2 million words of Wikipedia (Merity et al. 2016)                ``ROOT/text/``
``wikitext2-small``     its validation file to learn from, its test file to validate     ``ROOT/text/``
``PATH.txt``            any text in UTF-8                                                a file
``hf:NAME[:CONFIG]``    a column ``text``, splits ``train`` and ``validation``           Hugging Face, or a folder
======================  ===============================================================  ===========================

``ROOT`` is given, or the environment variable ``THINWIRE_DATA``. Of one file the last tenth is for validation. Nothing
is downloaded but by Hugging Face's library.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from thinwire.errors import MalformedError, MisuseError, first_line
from thinwire.lab.text.grammar import write_text

__all__ = ["Source", "read_source"]

_BYTES_MAX = 1 << 30
_VALID_SHARE = 0.1
_GRAMMAR = (200_000, 20_000)  # characters of training and validation
_FILES = {
    "tinyshakespeare": ("tinyshakespeare.txt",),
    "wikitext2": ("wikitext2-train.txt", "wikitext2-valid.txt"),
    "wikitext2-small": ("wikitext2-valid.txt", "wikitext2-test.txt"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A text to learn from and one to validate with. ``valid_nats`` is the information of the latter, of which no
    model can need fewer, where that is known."""

    train: str
    valid: str
    valid_nats: float | None = None


def read_source(name: str, root: str | None = None) -> Source:
    """The text called ``name``; ``root`` holds ``text/``.

    Raises:
        MisuseError: it is not there, or what reads it is not installed; the message says what to do.
        MalformedError: it is empty, no UTF-8, no text, or larger than 1 GiB.

    >>> source = read_source("grammar")
    >>> source.train[:36], len(source.train) >= 200_000
    ('two cats help the dog in the garden.', True)
    """
    if name == "grammar":
        (train, _), (valid, nats) = (write_text(size, seed) for seed, size in enumerate(_GRAMMAR))
        return Source(train, valid, nats)
    if name.startswith("hf:"):
        return _hugging_face(name.removeprefix("hf:"))
    if name.endswith(".txt"):
        return _split(_read(Path(name)))
    if name not in _FILES:
        raise MisuseError(
            f"there is no text {name!r}; give grammar, {', '.join(_FILES)}, the path of a .txt file or hf:NAME",
            data=name,
        )
    files = [_find(name, file, root) for file in _FILES[name]]
    texts = [_read(file) for file in files]
    return _split(texts[0]) if len(texts) == 1 else Source(texts[0], texts[1])


def _find(name: str, file: str, root: str | None) -> Path:
    base = root or os.environ.get("THINWIRE_DATA")
    if base and (Path(base) / "text" / file).is_file():
        return Path(base) / "text" / file
    where = f"there is no file {Path(base) / 'text' / file}" if base else "THINWIRE_DATA is not set"
    raise MisuseError(
        f"{name} is not here: {where}. Put {file} into a folder text/ and give the folder that holds it by "
        "THINWIRE_DATA or --data-root; or give the path of any .txt file, hf:NAME where Hugging Face can be reached, "
        "or --data grammar",
        data=name,
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_BYTES_MAX + 1)
    except OSError as error:
        raise MisuseError(f"{path} cannot be read: {error.strerror}; give a file of text", path=str(path)) from error
    if len(data) > _BYTES_MAX:
        raise MalformedError(f"{path} is larger than {_BYTES_MAX} bytes; give a part of it", path=str(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedError(f"{path} is no text in UTF-8: {error}", path=str(path)) from error
    if "\0" in text:
        raise MalformedError(f"{path} holds zero bytes; that is no text", path=str(path))
    if not text.strip():
        raise MalformedError(f"{path} is empty; give a file of text", path=str(path))
    return text.replace("\r\n", "\n")


def _split(text: str) -> Source:
    """The last tenth, from a line's beginning on if there is one near, is for validation."""
    cut = int(len(text) * (1 - _VALID_SHARE))
    line = text.find("\n", cut, cut + len(text) // 100)
    cut = cut if line < 0 else line + 1
    return Source(text[:cut], text[cut:])


def _hugging_face(name: str) -> Source:
    try:
        import datasets
    except ModuleNotFoundError:
        raise MisuseError(f"hf:{name} needs Hugging Face's datasets: pip install 'thinwire[train]'") from None
    path, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(path, config or None)
    except Exception as error:  # the library raises whatever its file systems do
        raise MisuseError(f"Hugging Face has no {name} here: {first_line(error)}", data=name) from error
    parts = []
    for split in ("train", "validation"):
        if split not in found or "text" not in found[split].column_names:
            raise MisuseError(
                f"hf:{name} has splits {', '.join(found)}; train and validation with a column text are needed",
                data=name,
            )
        parts.append(_joined(found[split]["text"], f"hf:{name}, {split}"))
    return Source(parts[0], parts[1])


def _joined(rows: Iterable[object], what: str) -> str:
    lines, size = [], 0
    for row in rows:
        if not isinstance(row, str):
            raise MalformedError(f"{what}: a row of the column text is a {type(row).__name__}, not a text")
        lines.append(row.rstrip("\n") + "\n")
        size += len(lines[-1])
        if size > _BYTES_MAX:
            raise MalformedError(f"{what} is larger than {_BYTES_MAX} characters; give a part of it")
    if not size:
        raise MalformedError(f"{what} is empty")
    return "".join(lines)
