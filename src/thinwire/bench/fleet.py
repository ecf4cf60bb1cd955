"""A thousand consumers of one chain, on machines that share a cache or do not, over a line that damages what passes.

Everything is real but the machines: each is a process, its consumers are threads of it, and all share the cores of
one machine. So the time from a commit to a consumer's proof is mostly the time in which these cores prove a
thousand states, and the order in which they do it. What does not depend on the cores: how often the origin is
asked, and that no consumer ever holds anything but what was published.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from thinwire.bench.fleet_worker import Machine, memory_hash, open_origin, run_machine, small_state, swarm
from thinwire.bench.measure import load, machine, versions
from thinwire.bench.net.faults import FaultProxy, counts_of
from thinwire.errors import MisuseError, StoreUnavailableError
from thinwire.stores.protocol import Blob, Store
from thinwire.sync.publisher import Publisher
from thinwire.tensors.bits import cells_of

__all__ = ["CARRIERS", "FleetOptions", "run_fleet"]

Report = Callable[[str], None]
Row = dict[str, Any]

CARRIERS = {
    "direct": "every consumer asks the origin",
    "cache": "the consumers of a machine share a cache",
    "swarm": "the consumers of a machine share a cache, the machines a swarm",
}
_QUANTILES = 101
_WARM = 2  # versions before the first that counts: the anchor, and a patch for which kernels are loaded


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How many, how fast, how bad. ``server`` is ``radosgw``, ``moto``, ``http`` (a folder), or ``auto``."""

    consumers: int = 1000
    machines: int = 8
    versions: int = 10
    state_bytes: int = 256 << 10
    density: float = 0.01
    poll_s: float = 5.0
    share: float = 0.01
    server: str = "auto"
    seed: int = 0
    version_timeout_s: float = 180.0
    processes: bool = True


class _Stamped:
    """A store that notes when each manifest was created: the moment from which a version exists."""

    def __init__(self, store: Store) -> None:
        self._store, self.committed_s = store, 0.0

    def create(self, key: str, data: Blob) -> None:
        self._store.create(key, data)
        if key.startswith("manifests/"):
            self.committed_s = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


# --- the origin ----------------------------------------------------------------------------------------------------


def _has_radosgw() -> bool:
    from thinwire.bench.net.radosgw import PROGRAMS

    return all(shutil.which(program) for program in PROGRAMS)


def _bucket(endpoint: str, key: str, secret: str) -> dict[str, str]:
    """A bucket of its own at an S3 server, made if it is not there; how to open it."""
    try:
        import boto3
    except ImportError as error:
        raise MisuseError("making a bucket needs boto3: pip install boto3, or take --server http") from error
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=key, aws_secret_access_key=secret
    )
    client.create_bucket(Bucket="weights")
    return {
        "url": f"s3://weights/{uuid.uuid4().hex[:8]}", "endpoint": endpoint, "region": "us-east-1",
        "access_key_id": key, "secret_access_key": secret,
    }  # fmt: skip


@contextmanager
def _origin(server: str, folder: Path) -> Iterator[tuple[dict[str, str], str]]:
    """How to open the origin, and what it is."""
    if server == "auto":
        server = "radosgw" if _has_radosgw() else "moto"
    if server == "radosgw":
        from thinwire.bench.net.radosgw import RadosGateway

        with RadosGateway() as gateway:
            words = subprocess.run(["radosgw", "--version"], capture_output=True, text=True, check=False).stdout.split()
            origin = _bucket(gateway.endpoint, gateway.access_key_id, gateway.secret_access_key)
            yield origin, f"Ceph radosgw {words[2] if len(words) > 2 else ''}".strip()
    elif server == "moto":
        try:
            from moto.server import ThreadedMotoServer
        except ImportError as error:
            raise MisuseError("no S3 server here: install radosgw, or moto[server], or take --server http") from error
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        try:
            host, port = moto.get_host_and_port()
            yield _bucket(f"http://{host}:{port}", "testing", "testing"), "moto"
        finally:
            moto.stop()
    elif server == "http":
        from thinwire.bench.net.http_store import HttpServer
        from thinwire.stores.local import LocalStore

        with HttpServer(LocalStore(folder / "origin", fsync=False)) as served:
            yield {"endpoint": served.endpoint}, "a folder over HTTP"
    else:
        raise MisuseError(f"the server is radosgw, moto, http or auto, not {server!r}")


@contextmanager
def _proxy(upstream: str, options: FleetOptions) -> Iterator[str]:
    """The faulty line before the origin; a process of its own, so that it does not wait for ours."""
    if not options.processes:
        with FaultProxy(upstream, share=options.share, seed=options.seed) as proxy:
            yield proxy.endpoint
        return
    words = [upstream, "0", str(options.share), str(options.seed)]
    command = [sys.executable, "-m", "thinwire.bench.net.faults", *words]
    process = subprocess.Popen(["/bin/sh", "-c", 'ulimit -n $(ulimit -Hn); exec "$@"', "sh", *command], stdout=-1)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()
    finally:
        process.kill()
        process.communicate()


# --- the machines --------------------------------------------------------------------------------------------------


class _Fleet:
    """The machines, and what they note."""

    def __init__(self, machines: Sequence[Machine], options: FleetOptions) -> None:
        self.machines, self.folder = machines, Path(machines[0].folder)
        self._read = {m.index: 0 for m in machines}
        self.notes: list[tuple[int, int, float, float, str, str]] = []
        self._runs: list[Any] = []
        for each in machines:
            path = each.write()
            if not options.processes:
                thread = threading.Thread(target=run_machine, args=(each,), daemon=True)
                thread.start()
                self._runs.append(thread)
                continue
            with (self.folder / f"machine-{each.index}.log").open("wb") as log:
                command = [sys.executable, "-m", "thinwire.bench.fleet_worker", str(path)]
                env = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
                self._runs.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))

    def read(self) -> None:
        """Take in what has been noted since."""
        for each in self.machines:
            path = self.folder / f"notes-{each.index}.txt"
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self._read[each.index])
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[each.index] += len(whole)
            for line in whole.decode().splitlines():
                index, version, at, since, memory, digest = line.split()
                self.notes.append((int(index), int(version), float(at), float(since), memory, digest))

    def wait(self, version: int, count: int, timeout_s: float) -> bool:
        """Whether ``count`` consumers have noted ``version`` in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.read()
            if len({note[0] for note in self.notes if note[1] == version}) >= count:
                return True
            ended = [run for run in self._runs if isinstance(run, subprocess.Popen) and run.poll() is not None]
            if ended:
                log = "\n".join(path.read_text(errors="replace")[-800:] for path in self.folder.glob("*.log"))
                raise StoreUnavailableError(f"{len(ended)} machines have ended by themselves:\n{log}")
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)

    def stop(self) -> dict[str, int]:
        """End the machines; the errors that they met, by kind."""
        (self.folder / "stop").touch()
        for run in self._runs:
            if isinstance(run, threading.Thread):
                run.join(timeout=60)
                continue
            try:
                run.wait(timeout=60)
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
        errors: Counter[str] = Counter()
        for each in self.machines:
            with suppress(FileNotFoundError):
                errors.update(json.loads((self.folder / f"errors-{each.index}.json").read_text()))
        return dict(errors)


def _step(state: Mapping[str, torch.Tensor], density: float, random_: np.random.Generator) -> None:
    """Move a share of the weights by one unit in the last place."""
    for tensor in state.values():
        cells = cells_of(tensor)
        where = np.flatnonzero(random_.random(cells.size, np.float32) < density)
        cells[where] ^= 1


# --- a run ---------------------------------------------------------------------------------------------------------


def run_fleet(
    folder: Path,
    carriers: Sequence[str],
    options: FleetOptions,
    *,
    report: Report = lambda _: None,
    keep: Callable[[Row], object] = lambda _: None,
) -> list[Row]:
    """A row for each carrier, measured one after another against one origin; each is handed to ``keep`` at once.

    ``mismatches`` counts notes whose memory or digest differ from what was published, ``missing`` consumers that had
    not proved a version in time: both must be 0.

    Raises:
        MisuseError: an unknown carrier, no consumers or machines, or a server that is not there.
    """
    if not set(carriers) <= set(CARRIERS):
        raise MisuseError(f"carriers are {', '.join(CARRIERS)}; not {', '.join(carriers)}")
    if not 1 <= options.machines <= options.consumers or options.versions < 1:
        raise MisuseError("a fleet needs a machine, a consumer on each, and a version")
    rows = []
    with _origin(options.server, folder) as (origin, server):
        for carrier in carriers:
            place = folder / carrier
            place.mkdir(parents=True)
            its = {**origin, "url": f"{origin['url']}-{carrier}"} if "url" in origin else origin
            rows.append({**_run_carrier(place, carrier, its, options, report), "server": server})
            keep(rows[-1])
            if "url" not in origin:  # one folder, one chain at a time
                shutil.rmtree(folder / "origin", ignore_errors=True)
    return rows


def _run_carrier(
    folder: Path, carrier: str, origin: dict[str, str], options: FleetOptions, report: Report
) -> Row:  # fmt: skip
    from thinwire.crypto import SigningKey
    from thinwire.wire.signing import public_text

    key = SigningKey.generate()
    trust = folder / "publisher.key.pub"
    trust.write_text(public_text(key.public))
    state, draw = small_state(options.state_bytes, options.seed), np.random.default_rng(options.seed)
    hashes, digests, commits = {}, {}, {}
    sizes: list[int] = []
    counts: dict[str, dict[str, int]] = {}
    began = time.perf_counter()
    with ExitStack() as stack:
        stamped = _Stamped(open_origin(origin))
        publisher = stack.enter_context(
            Publisher(
                cast("Store", stamped), threads=1, anchor_ratio=1e6, key=key, level="small",
                peers=swarm() if carrier == "swarm" else None,
            )
        )  # fmt: skip

        def publish() -> int:
            done = publisher.publish(state)
            version = done.version
            hashes[version], digests[version] = memory_hash(state), done.digest
            commits[version] = stamped.committed_s
            sizes.append(done.patch_bytes)
            return version

        publish()
        line = stack.enter_context(_proxy(origin["endpoint"], options))
        fleet = _Fleet(_machines(folder, carrier, {**origin, "endpoint": line}, trust, options), options)
        missing = 0
        try:
            report(f"{carrier}: {options.consumers} consumers load the first version")
            if not fleet.wait(1, options.consumers, 600.0):
                raise StoreUnavailableError("not all consumers have loaded the first version within 600 s")
            counts["loaded"] = counts_of(line)
            _step(state, options.density, draw)
            if not fleet.wait(publish(), options.consumers, 600.0):  # their first patch: kernels are loaded
                raise StoreUnavailableError("not all consumers have applied the first patch within 600 s")
            counts["warm"] = counts_of(line)
            idle_s = max(2 * options.poll_s, 1.0)
            time.sleep(idle_s)
            counts["idle"] = counts_of(line)
            for _ in range(options.versions):
                _step(state, options.density, draw)
                version = publish()
                if not fleet.wait(version, options.consumers, options.version_timeout_s):
                    missing += options.consumers - len({n[0] for n in fleet.notes if n[1] == version})
                report(f"{carrier}: version {version} of {options.versions + _WARM}")
                time.sleep(random.uniform(0.5, 1.5) * options.poll_s)  # so that looks and versions do not march in step
            counts["end"] = counts_of(line)
        finally:
            errors = fleet.stop()
            fleet.read()
    wrong = [note for note in fleet.notes if (note[4], note[5]) != (hashes.get(note[1]), digests.get(note[1]))]
    return {
        "bench": "fleet",
        "carrier": carrier,
        **{k: v for k, v in asdict(options).items() if k not in ("processes", "version_timeout_s", "server")},
        "patch_bytes": round(sum(sizes[1:]) / (len(sizes) - 1)),
        "mismatches": len(wrong),
        "missing": missing,
        "errors": errors,
        "notes": len(fleet.notes),
        **_times(fleet.notes, commits),
        "requests": _requests(counts, options, idle_s),
        "signed": True,
        "seconds": round(time.perf_counter() - began, 1),
        "load": load(),
        "machine": machine(),
        "package_versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _machines(
    folder: Path, carrier: str, origin: Mapping[str, str], trust: Path, options: FleetOptions
) -> list[Machine]:
    share = options.consumers // options.machines
    if share * options.machines != options.consumers:
        raise MisuseError(f"{options.consumers} consumers cannot be shared out evenly to {options.machines} machines")
    first = Machine(
        0, str(folder), share, options.state_bytes, options.poll_s, origin, str(trust), "", "", options.seed
    )  # fmt: skip
    cached = carrier != "direct"
    return [
        replace(
            first, index=k, cache=str(folder / f"cache-{k}") if cached else "",
            peers="swarm" if carrier == "swarm" else "",
        )
        for k in range(options.machines)
    ]  # fmt: skip


def _times(notes: Sequence[tuple[int, int, float, float, str, str]], commits: Mapping[int, float]) -> Row:
    """Seconds from commit to proof over all consumers and versions, and by version; and from the look that found it."""
    by_version: dict[int, list[float]] = {}
    looks = []
    for _, version, at, since, _, _ in notes:
        if version > _WARM:
            by_version.setdefault(version, []).append(at - commits[version])
            looks.append(at - max(since, commits[version]))
    if not by_version:
        return {"p50_s": None, "p99_s": None}
    every = np.concatenate([np.asarray(x) for x in by_version.values()])

    per = {v: (_at(x, 50), _at(x, 99)) for v, x in sorted(by_version.items())}
    return {
        "p50_s": _at(every, 50), "p90_s": _at(every, 90), "p99_s": _at(every, 99), "max_s": _at(every, 100),
        "ratio": round(_at(every, 99) / _at(every, 50), 3),
        "ratio_by_version": [round(high / low, 3) for low, high in per.values()],
        "p50_by_version_s": [low for low, _ in per.values()],
        "p99_by_version_s": [high for _, high in per.values()],
        "work_p50_s": _at(looks, 50), "work_p99_s": _at(looks, 99),
        "quantiles_s": [_at(every, q) for q in np.linspace(0, 100, _QUANTILES)],
    }  # fmt: skip


def _at(values: Any, percent: float) -> float:
    return round(float(np.percentile(values, percent)), 4)


def _requests(counts: Mapping[str, Mapping[str, int]], options: FleetOptions, idle_s: float) -> Row:
    """What the origin was asked: to load, a second while nothing happens, a version; and what was damaged."""
    loaded, warm, idle, end = counts["loaded"], counts["warm"], counts["idle"], counts["end"]

    def less(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
        return {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}

    followed = less(end, idle)
    return {
        "load": dict(loaded),
        "idle_per_s": round(less(idle, warm).get("requests", 0) / idle_s, 2),
        "followed": followed,
        "objects_per_version": round(followed.get("object", 0) / options.versions, 2),
        "requests_per_version": round(followed.get("requests", 0) / options.versions, 2),
        "corrupted": end.get("corrupted", 0),
        "cut": end.get("cut", 0),
    }
