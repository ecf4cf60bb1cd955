"""Texts: what is read is what was written, damage is refused, and what is missing is told."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.text.data import load_text, windows
from thinwire.lab.text.grammar import write_text
from thinwire.lab.text.sources import read_source
from thinwire.lab.text.tokens import BytePairs, Characters

# --- tokens --------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


@given(text=texts)
def test_characters_are_decoded_to_what_was_encoded(text: str) -> None:
    tokenizer = Characters.of(text)
    tokens = tokenizer.encode(text)
    assert tokenizer.size == len(set(text))
    assert sorted(set(tokens.tolist())) == list(range(tokenizer.size))
    assert tokenizer.decode(tokens.tolist()) == text


@given(text=texts)
def test_byte_pairs_can_write_any_text_whatever_they_were_learnt_from(text: str) -> None:
    tokenizer = BytePairs.of("the cat sat on the mat\n" * 20, size=300)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens.tolist()) == text
    assert BytePairs(tokenizer.to_json()).encode(text).tolist() == tokens.tolist()
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.size <= 300


def test_byte_pairs_do_not_depend_on_the_process_or_its_threads() -> None:
    code = (
        "from thinwire.lab.text.data import load_text\nprint(load_text('grammar', tokens='bpe', vocabulary=400).digest)"
    )
    env = {**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == load_text("grammar", tokens="bpe", vocabulary=400).digest


def test_byte_pairs_make_the_text_shorter_and_keep_its_entropy() -> None:
    characters, pairs = load_text("grammar"), load_text("grammar", tokens="bpe", vocabulary=400)
    assert pairs.vocabulary <= 400
    assert len(pairs.tokens_train) < 0.4 * len(characters.tokens_train)
    assert pairs.decode(pairs.tokens_valid) == characters.decode(characters.tokens_valid)
    nats = [text.entropy * len(text.tokens_valid) for text in (characters, pairs) if text.entropy is not None]
    assert nats[0] == pytest.approx(nats[1])


def test_characters_that_are_unknown_or_too_many_are_refused() -> None:
    for strange in "x\U0001f600":
        with pytest.raises(MisuseError, match=f"character '{strange}' is not in the alphabet"):
            Characters("abc").encode("ab" + strange)
    for alphabet in ("abca", "".join(map(chr, range(1 << 14))) + "\U0001f600"):
        with pytest.raises(MisuseError, match="16384 different characters"):
            Characters(alphabet)


# --- the grammar ---------------------------------------------------------------------------------------------------


def test_the_grammar_writes_the_same_for_the_same_seed_and_agrees() -> None:
    text, nats = write_text(20_000, seed=1)
    assert (text, nats) == write_text(20_000, seed=1)
    assert text != write_text(20_000, seed=2)[0]
    for line in text.splitlines():
        words = line.rstrip('."').replace('"', "").split()
        assert words[0] in ("the", "every", "two", "some")
        assert line.endswith(('."', "."))
        assert line.count('"') in (0, 2)
        if words[0] in ("two", "some") and len(words) == 3:  # two cats wait
            assert words[1].endswith("s")
            assert not words[2].endswith("s")


def test_the_information_of_the_grammar_is_below_what_simple_models_need() -> None:
    """Letters alone and pairs of letters are true models of less: they must need more, on average."""
    text, nats = write_text(50_000, seed=3)
    tokens = Characters.of(text).encode(text).long()
    size = int(tokens.max()) + 1
    single = torch.bincount(tokens, minlength=size).double() / len(tokens)
    pairs = torch.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size).double() / (len(tokens) - 1)
    entropy = float(-(single[single > 0] * single[single > 0].log()).sum())
    joint = float(-(pairs[pairs > 0] * pairs[pairs > 0].log()).sum())
    assert 0.2 < nats / len(text) < joint - entropy < entropy


def test_a_line_has_one_derivation_and_comes_as_often_as_its_information_says() -> None:
    found = [write_text(1, seed) for seed in range(20_000)]
    counts, nats = Counter(text for text, _ in found), dict(found)
    assert all(information == pytest.approx(nats[text], rel=1e-12) for text, information in found)
    common = [text for text, count in counts.most_common(20) if count > 30]
    assert len(common) >= 5
    for text in common:
        expected = len(found) * math.exp(-nats[text])
        assert abs(counts[text] - expected) < 5 * expected**0.5


# --- sources -------------------------------------------------------------------------------------------------------


def test_texts_are_found_by_the_environment_or_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    play = "".join(f"line {k} of the play\n" for k in range(200))
    (tmp_path / "text" / "tinyshakespeare.txt").write_text(play)
    monkeypatch.setenv("THINWIRE_DATA", str(tmp_path))
    by_name = read_source("tinyshakespeare")
    assert by_name.train + by_name.valid == play
    assert 0.08 < len(by_name.valid) / len(play) < 0.11
    assert by_name.valid.startswith("line ")
    assert by_name == read_source(str(tmp_path / "text" / "tinyshakespeare.txt"))
    for part in ("valid", "test"):
        (tmp_path / "text" / f"wikitext2-{part}.txt").write_text(part * 9)
    small = read_source("wikitext2-small", str(tmp_path))
    assert (small.train, small.valid) == ("valid" * 9, "test" * 9)
    with pytest.raises(MisuseError, match=r"no file .*wikitext2-train.txt.*--data-root.*--data grammar"):
        load_text("wikitext2")
    monkeypatch.delenv("THINWIRE_DATA")
    with pytest.raises(MisuseError, match="THINWIRE_DATA is not set"):
        load_text("tinyshakespeare")
    with pytest.raises(MisuseError, match="give grammar, tinyshakespeare"):
        load_text("war-and-peace")
    with pytest.raises(MisuseError, match="give characters or bpe"):
        load_text("grammar", tokens="words")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xff\xfe\x00binary", "no text in UTF-8"),
        (b"\x7fELF\x00\x00\x00", "zero bytes"),
        (b"caf\xe9", "no text in UTF-8"),
    ],
    ids=["empty", "blank", "binary", "program", "latin1"],
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    with pytest.raises(MalformedError, match=words):
        load_text(str(path))


def test_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.txt", tmp_path / "folder.txt"):
        (tmp_path / "folder.txt").mkdir(exist_ok=True)
        with pytest.raises(MisuseError, match="cannot be read"):
            load_text(str(path))


def test_a_file_that_is_too_large_is_refused_without_being_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("x" * 101)
    monkeypatch.setattr("thinwire.lab.text.sources._BYTES_MAX", 100)
    with pytest.raises(MalformedError, match="larger than 100 bytes"):
        load_text(str(path))


def test_marks_and_ends_of_lines_of_other_systems_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    source = read_source(str(path))
    assert source.train + source.valid == "one\ntwo\n"


def test_hugging_face_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.txt").write_text("to learn\nfrom\n")
    with pytest.raises(MisuseError, match="train and validation with a column text are needed"):
        load_text(f"hf:{folder}")
    (folder / "validation.txt").write_text("to see\n")
    source = read_source(f"hf:{folder}")
    assert (source.train, source.valid) == ("to learn\nfrom\n", "to see\n")
    with pytest.raises(MisuseError, match="Hugging Face has no"):
        load_text(f"hf:{tmp_path / 'nothing'}")


# --- windows -------------------------------------------------------------------------------------------------------


@given(count=st.integers(0, 300), context=st.integers(1, 40))
def test_windows_make_each_token_a_target_once(count: int, context: int) -> None:
    tokens = torch.arange(count)
    if count <= context:
        with pytest.raises(MisuseError, match="holds no window"):
            windows(tokens, context)
        return
    pieces = windows(tokens, context)
    assert pieces.shape == ((count - 1) // context, context + 1)
    assert pieces[:, 1:].flatten().tolist() == list(range(1, 1 + len(pieces) * context))
    assert pieces.data_ptr() == tokens.data_ptr()  # no copy


def test_limits_cut_the_tokens_and_what_was_known_of_the_rest() -> None:
    text = load_text("grammar")
    short = text.first(100, 50)
    assert (len(short.tokens_train), len(short.tokens_valid), short.entropy) == (100, 50, None)
    assert text.first(100, None).entropy == text.entropy
    assert len({text.digest, short.digest, text.first(100, None).digest}) == 3


@pytest.mark.data
@pytest.mark.parametrize(("name", "size"), [("tinyshakespeare", 1_115_394), ("wikitext2-small", 2_378_130)])
def test_the_real_texts_are_whole(name: str, size: int) -> None:
    if "THINWIRE_DATA" not in os.environ:
        pytest.skip("THINWIRE_DATA is not set")
    source = read_source(name)
    assert len((source.train + source.valid).encode()) == size
