"""Options: what one field says holds for the call, the file and the command line alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import MalformedError, MisuseError
from thinwire.lab.config import check, from_mapping, from_yaml, option, options_of, to_mapping, to_yaml


@dataclass(frozen=True, kw_only=True)
class Config:
    count: int = option(3, "A count: with a colon.", "One", least=1, most=10**6)
    rate: float = option(0.5, "A rate # with a hash.", "Two", above=0, below=1)
    name: str = option("none", "A name.", "One")
    kind: str = option("auto", "A kind.", "Two", choices=("auto", "none", "off", "1"))
    flag: bool = option(True, "A flag.", "One")
    limit: int | None = option(None, "A limit.", "Two", least=0)
    folder: str | None = option(None, "A folder.", "Two")

    def __post_init__(self) -> None:
        check(self)


configs = st.builds(
    Config,
    count=st.integers(1, 10**6),
    rate=st.floats(0, 1, exclude_min=True, exclude_max=True),
    name=st.text(max_size=30),
    kind=st.sampled_from(["auto", "none", "off", "1"]),
    flag=st.booleans(),
    limit=st.none() | st.integers(0, 10**12),
    folder=st.none() | st.sampled_from(["null", "~", "yes", "1e-3", "a: b", "#", "'", '"', "\n", "é", ""]),
)


@given(config=configs)
def test_what_is_printed_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(Config, path, {}) == config
    assert from_mapping(Config, to_mapping(config)) == config


def test_sections_stay_together_and_help_is_beside_the_value() -> None:
    assert [x.name for x in options_of(Config)] == ["count", "name", "flag", "rate", "kind", "limit", "folder"]
    assert "kind: auto  # A kind. One of auto, none, off, 1." in to_yaml(Config()).splitlines()


def test_the_command_line_goes_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("count: 5\nrate: 1e-3\nname: file\n")
    assert from_yaml(Config, path, {"name": "line"}) == Config(count=5, rate=0.001, name="line")
    path.write_text("")
    assert from_yaml(Config, path, {}) == Config()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cuont": 3}, "did you mean count?"),
        ({"zzzzzzzz": 3}, "there are count, name"),
        ({"count": 0}, "count is 0; give a number at least 1 and at most 1e+06"),
        ({"count": 2.5}, "give a whole number"),
        ({"count": True}, "give a whole number"),
        ({"count": None}, "give a whole number"),
        ({"count": [1]}, "give a whole number"),
        ({"rate": 0.0}, "above 0 and below 1"),
        ({"rate": float("nan")}, "give a number"),
        ({"rate": "fast"}, "give a number"),
        ({"kind": "other"}, "one of auto, none, off, 1"),
        ({"kind": False}, "give a text"),  # what YAML 1.1 makes of an unquoted off
        ({"flag": 1}, "true or false"),
        ({"limit": -1}, "at least 0"),
    ],
)
def test_wrong_options_are_refused_in_words(tmp_path: Path, values: dict[str, object], words: str) -> None:
    with pytest.raises(MisuseError) as caught:
        from_mapping(Config, values)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "just words", "!!python/object/apply:os.system ['true']", "\x00"])
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(MalformedError):
        from_yaml(Config, path, {})
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(MalformedError, match="larger"):
        from_yaml(Config, path, {})
