"""The report: every number equals a recount from the files by hand, and what is broken is shown, never raised."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.tools import thinwire
from tests.sync.checkpoints import State, nudged, state
from tests.trust.scenes import forge, pinned
from tests.trust.scenes import publish as publish_signed
from thinwire import Publisher
from thinwire.cli.report.facts import ChainFacts, VersionFacts, read_facts
from thinwire.cli.report.figures import figures_of
from thinwire.cli.report.heat import heat_of
from thinwire.cli.report.page import page_of
from thinwire.cli.report.tables import read_table
from thinwire.errors import MalformedError, MisuseError
from thinwire.stores import open_store
from thinwire.stores.memory import MemoryStore
from thinwire.sync.remote import Remote
from thinwire.wire.patch import Patch

FIGURES = ["bytes", "steps", "density", "interval", "lineage", "heat"]


def states(count: int) -> list[State]:
    found = [state()]
    for k in range(1, count):
        found.append(nudged(found[-1], seed=k))
    return found


def publish(where: Path, tensors: list[State], **how: object) -> Path:
    with Publisher(str(where), threads=1, **how) as publisher:  # type: ignore[arg-type]
        for step, each in enumerate(tensors):
            publisher.publish(each, step=10 * step)
        publisher.compact()
    return where


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    tensors = states(7)
    return SimpleNamespace(
        path=publish(tmp_path_factory.mktemp("chain") / "s", tensors, anchor_every=4), states=tensors
    )


@pytest.fixture
def broken(chain: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain.path, tmp_path / "broken"))


def facts_of(path: Path, **how: int) -> ChainFacts:
    return read_facts(open_store(str(path)), **how)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().reshape(-1, tensor.element_size())


# --- the numbers ---------------------------------------------------------------------------------------------------


def test_every_number_equals_a_recount(chain: SimpleNamespace) -> None:
    facts = facts_of(chain.path)
    assert not facts.problems
    assert [v.version for v in facts.versions] == list(range(1, 8))
    for v in facts.versions:
        folder = next((chain.path / "objects").glob(f"{v.version:010d}-*"))
        files = {p.name: p.stat().st_size for p in folder.iterdir()}
        signed = json.loads((chain.path / f"manifests/{v.version:010d}.json").read_bytes())["signed"]
        assert v.delta_bytes == files.pop("delta.safetensors", 0)
        assert v.tree_bytes == files.pop("tree.json")
        assert v.anchor_bytes == sum(files.values())
        assert v.manifest_bytes == (chain.path / f"manifests/{v.version:010d}.json").stat().st_size
        assert (v.step, v.created_ms, v.state) == (signed["step"], signed["facts"]["created_ms"], signed["state"])
        assert (v.status, v.signatures) == ("ok", 0)
        new = chain.states[v.version - 1]
        assert v.state_bytes == sum(t.numel() * t.element_size() for t in new.values())
        assert v.elements == sum(t.numel() for t in new.values())
        if v.version > 1:
            old = chain.states[v.version - 2]
            changed = {n: int((bits(t) != bits(old[n])).any(axis=1).sum()) for n, t in new.items()}
            assert v.changed == sum(changed.values())
            assert v.tensors == {name: (changed[name], t.numel()) for name, t in new.items()}
            assert v.density == sum(changed.values()) / v.elements
            assert v.interval_s == (v.created_ms - facts.versions[v.version - 2].created_ms) / 1000
    assert [v.version for v in facts.versions if v.anchor_bytes] == [1, 5]
    files = [p for p in (chain.path / "objects").rglob("*") if p.is_file()]
    records = sorted((chain.path / "skips").glob("*.json"))
    patches = [p for p in (chain.path / "skips").rglob("*") if p.is_file() and p.parent != chain.path / "skips"]
    manifests = list((chain.path / "manifests").iterdir())
    objects, skips = (sum(p.stat().st_size for p in each) for each in (files, patches))
    totals = facts.totals
    assert totals.published_bytes == objects + sum(p.stat().st_size for p in manifests)
    assert (totals.skip_bytes, totals.stored_bytes) == (skips, objects + skips)
    assert totals.full_bytes == sum(v.state_bytes or 0 for v in facts.versions)
    assert totals.saved == 1 - totals.published_bytes / totals.full_bytes
    assert len(facts.skips) == len(records) > 0
    assert [s.changed for s in facts.skips] == [
        sum(int((bits(t) != bits(chain.states[s.base - 1][n])).any(axis=1).sum())
            for n, t in chain.states[s.version - 1].items())
        for s in facts.skips
    ]  # fmt: skip


def test_figures_draw_these_numbers(chain: SimpleNamespace) -> None:
    facts = facts_of(chain.path)
    drawn = {name: figure for name, _, _, figure in figures_of(facts)}
    assert list(drawn) == FIGURES
    traces = {trace.name: trace for trace in drawn["bytes"].data}
    assert list(traces["patch, small"].y) == [v.delta_bytes for v in facts.versions if v.delta_bytes]
    assert list(traces["anchor"].y) == [v.anchor_bytes for v in facts.versions if v.anchor_bytes]
    assert list(drawn["density"].data[0].y) == [100 * (v.density or 0) for v in facts.versions if v.delta_bytes]
    assert list(drawn["interval"].data[0].y) == [v.interval_s for v in facts.versions]
    steps = {trace.name: trace for trace in drawn["steps"].data}
    assert sorted(zip(steps["skip delta"].x, steps["skip delta"].y, strict=True)) == sorted(
        (s.version - s.base, s.bytes) for s in facts.skips
    )
    heat, (trace,) = heat_of(facts.versions), drawn["heat"].data
    for y, row in enumerate(heat.density):
        for x, share in enumerate(row):
            if share:
                assert 10 ** trace.z[y][x] == pytest.approx(share)


def test_a_table_read_by_ranges_is_that_of_the_whole_patch(
    chain: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(chain.path))
    manifest = Remote(store, retry_s=1).manifest(3)
    patch = Patch.parse(store.get(manifest.deltas[0].object.key, size_max=1 << 30))
    for first in (1 << 16, 64, 8):
        monkeypatch.setattr("thinwire.cli.report.tables._FIRST_BYTES", first)
        table = read_table(store, manifest, manifest.deltas[0], retry_s=1)
        assert (table.changed, table.level, list(table.tensors)) == (
            patch.changed, patch.level, [row.name for row in patch.rows],
        )  # fmt: skip


names = st.lists(
    st.sampled_from(["a.b.c", "a.b.d", "a.e", "f", ".g", "h..i", "x.2.w", "x.10.w"]), unique=True, min_size=1
)
tables = st.none() | names.flatmap(
    lambda ns: st.fixed_dictionaries({n: st.tuples(st.integers(0, 9), st.integers(9, 20)) for n in ns})
)


@given(tables=st.lists(tables, max_size=9), rows_max=st.integers(1, 9), columns_max=st.integers(1, 9))
def test_a_heat_map_keeps_its_bounds_and_its_cells(tables: list, rows_max: int, columns_max: int) -> None:
    versions = [VersionFacts(k + 1, "ok", tensors=table) for k, table in enumerate(tables)]
    heat = heat_of(versions, rows_max=rows_max, columns_max=columns_max)
    if not any(tables):
        assert heat.rows == ()
        return
    assert 1 <= len(heat.rows) <= rows_max
    assert 1 <= len(heat.columns) <= columns_max
    assert [v for a, b in heat.columns for v in range(a, b + 1)] == list(range(1, len(tables) + 1))
    for x, (a, b) in enumerate(heat.columns):
        everything = [counts for v in versions[a - 1 : b] for counts in (v.tensors or {}).values()]
        shares = [row[x] for row in heat.density if row[x] is not None]
        assert bool(shares) == bool(everything)
        if shares:  # a mean weighted by cells lies between the least and the most
            mean = sum(c for c, _ in everything) / sum(n for _, n in everything)
            assert min(shares) - 1e-12 <= mean <= max(shares) + 1e-12
    full = heat_of(versions)
    assert full.rows == tuple(sorted(full.rows, key=lambda n: heat_of_order(n)))


def heat_of_order(name: str) -> list:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


# --- what is broken ------------------------------------------------------------------------------------------------


def test_what_is_broken_is_shown_and_the_rest_as_it_was(broken: Path) -> None:
    (broken / "manifests/0000000002.json").unlink()
    (broken / "manifests/0000000003.json").write_text("{}")
    delta = {v: next((broken / "objects").glob(f"{v:010d}-*/delta.safetensors")) for v in (5, 6, 7)}
    delta[5].unlink()
    delta[6].write_bytes(delta[6].read_bytes()[:50])
    data = bytearray(delta[7].read_bytes())
    data[30] ^= 255
    delta[7].write_bytes(data)
    facts = facts_of(broken)
    assert {v.version: v.status for v in facts.versions} == {
        1: "ok", 2: "no manifest", 3: "unreadable", 4: "contradicts", 5: "missing", 6: "damaged", 7: "damaged",
    }  # fmt: skip
    assert all(v.problems for v in facts.versions if v.status != "ok")
    assert {s.status for s in facts.skips if 3 in (s.base, s.version)} <= {"missing"}
    where = {p.where for p in facts.problems}
    assert {"manifests/0000000003.json", "manifests/0000000004.json"} <= where
    assert sum(w.endswith("delta.safetensors") for w in where) == 3
    result = thinwire("report", broken, "-o", "r.html", "--json")
    assert result.json["totals"]["versions"] == 5
    page = Path("r.html").read_text()
    assert all(
        re.search(rf"{word}", page) for word in ("no manifest", "unreadable", "contradicts", "missing", "damaged")
    )


def test_versions_that_the_given_keys_have_not_signed_are_untrusted() -> None:
    store = MemoryStore()
    publish_signed(store, 3)
    forge(store, 3, keys=(1,), metadata={"who": "somebody else"})
    assert {v.status for v in read_facts(store).versions} == {"ok"}
    facts = read_facts(store, trust=pinned(0))
    assert [v.status for v in facts.versions] == ["ok", "ok", "untrusted"]
    assert [p.where for p in facts.problems] == ["manifests/0000000003.json"]
    assert "untrusted" in page_of(facts)
    assert {v.status for v in read_facts(store, trust=pinned(2)).versions} == {"untrusted"}


def test_the_command_takes_keys(tmp_path: Path) -> None:
    thinwire("keygen", "mine.key")
    thinwire("keygen", "other.key")
    publish(tmp_path / "s", states(2), key="mine.key")
    for name, status in (("mine", "ok"), ("other", "untrusted")):
        result = thinwire("report", tmp_path / "s", "--trust", f"{name}.key.pub", "--json")
        assert {v["status"] for v in result.json["versions"]} == {status}


def test_versions_given_up_by_gc_are_no_problem(broken: Path) -> None:
    thinwire("gc", broken, "--keep-last", 2, "--grace", "0")
    facts = facts_of(broken)
    assert not facts.problems
    assert [v.status for v in facts.versions].count("given up") == facts.totals.given_up == 5
    assert thinwire("verify", broken).code == 0


def test_a_patch_that_counts_otherwise_than_its_manifest_is_found_out(chain: SimpleNamespace) -> None:
    store = open_store(str(chain.path))
    remote = Remote(store, retry_s=1)
    with pytest.raises(MalformedError, match="another state"):
        read_table(store, remote.manifest(4), remote.manifest(3).deltas[0], retry_s=1)


def test_a_stray_manifest_of_a_far_number_makes_no_endless_table(broken: Path) -> None:
    (broken / "manifests/9999999999.json").write_text("{}")
    facts = facts_of(broken)
    assert facts.newest == 9999999999
    assert len(facts.versions) == 7 + 100 + 1
    assert "9999999999" in page_of(facts)


@pytest.mark.parametrize("count", [1, 2])
def test_short_chains_have_a_page(count: int, tmp_path: Path) -> None:
    facts = facts_of(publish(tmp_path / "s", states(count)))
    assert [name for name, *_ in figures_of(facts)] == (["bytes", "lineage"] if count == 1 else FIGURES)
    assert page_of(facts).count("plotly-graph-div") >= 2


def test_last_limits_what_is_shown_not_what_is_summed(chain: SimpleNamespace) -> None:
    some, everything = facts_of(chain.path, last=2), facts_of(chain.path)
    assert some.versions == everything.versions[-2:]
    assert (some.totals.published_bytes, some.totals.versions) == (everything.totals.published_bytes, 7)
    assert all(s.base >= 6 for s in some.skips)
    with pytest.raises(MisuseError):
        facts_of(chain.path, last=0)
    with pytest.raises(MisuseError, match="holds no versions"):
        read_facts(MemoryStore())


def test_names_from_the_store_cannot_write_html(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    old = {evil: torch.zeros(50)}
    page = page_of(facts_of(publish(tmp_path / "s", [old, {evil: torch.ones(50)}])))
    own = page.split("</style>")[1]
    assert "<img" not in own
    assert "<script>alert" not in own


def test_the_command_writes_one_file_and_says_so(chain: SimpleNamespace) -> None:
    said = thinwire("report", chain.path).out
    assert "7 versions" in said
    assert "no problems" in said
    assert Path("report.html").stat().st_size > 1_000_000
    assert "http" not in re.sub(r"<script>.*?</script>", "", Path("report.html").read_text(), flags=re.DOTALL)
    Path("report.html").unlink()
    document = thinwire("report", chain.path, "--json").json
    assert (document["page"], len(document["versions"]), Path("report.html").exists()) == (None, 7, False)
    thinwire("report", "nowhere", code=2)


# --- in a browser --------------------------------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("size", ["1280,1600", "480,1600"])
@pytest.mark.parametrize("case", ["whole", "broken", "one"])
def test_a_browser_draws_every_figure_without_complaint(case: str, size: str, broken: Path, tmp_path: Path) -> None:
    if case == "broken":
        (broken / "manifests/0000000003.json").unlink()
    where = publish(tmp_path / "one", states(1)) if case == "one" else broken
    thinwire("report", where, "-o", "r.html")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={size}",
         "--virtual-time-budget=9000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         Path("r.html").absolute().as_uri()],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    expected = {name for name, *_ in figures_of(facts_of(where))}
    for name in expected:
        assert re.search(rf'id="figure-{name}" class="[^"]*js-plotly-plot', done.stdout), name
    assert done.stdout.count('class="xy"') + done.stdout.count("cartesianlayer") >= len(expected)
