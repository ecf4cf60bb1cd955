"""A swarm: workers give one another the pieces of each object, by BitTorrent through libtorrent.

The publisher describes an object (``KEY.torrent`` beside it in the store, :mod:`thinwire.peers.metainfo`) and seeds it;
who has a piece gives it on. Workers meet at a rendezvous, the publisher's own by default. The store is the seed of last
resort: a worker that gets on too slowly reads pieces that nobody has from it by ranges, in random places, and gives
these on, too. So the swarm works without the publisher, and a store of any kind can serve it, with any credentials.

libtorrent checks every piece against the description, and bans who sends wrong ones. No DHT, no local discovery, no
port mapping, no exchange of peers: nobody is told of the swarm but the rendezvous.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from thinwire.errors import MalformedError, MisuseError, RefetchError, RetryError, ThinwireError
from thinwire.peers.download import LOOK_S, Download, Torrent
from thinwire.peers.metainfo import DESCRIPTION_SUFFIX, Description, describe, description_bytes_max
from thinwire.peers.protocol import Blob, Origin, Progress
from thinwire.peers.rendezvous import (
    HINT_BYTES_MAX,
    HINT_KEY,
    Rendezvous,
    addresses_of,
    hint_bytes,
    parse_hint,
)

__all__ = ["Swarm"]

_log = logging.getLogger(__name__)
_KEY_LENGTH_MAX = 512
_FLUSH_S, _HINT_S = 10.0, 10.0
_SETTINGS: dict[str, Any] = {
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_incoming_utp": False,  # TCP is many times as fast here, and as fair between machines of one owner
    "enable_outgoing_utp": False,
    "allow_multiple_connections_per_ip": True,  # several workers a machine
    "announce_to_all_trackers": True,
    "in_enc_policy": 2,  # disabled: BitTorrent's encryption hides from providers, not from attackers
    "out_enc_policy": 2,
    "active_limit": -1,
    "active_seeds": -1,
    "active_downloads": -1,
    "alert_mask": 0,
    "choking_algorithm": 0,
    "unchoke_slots_limit": 16,
    "unchoke_interval": 2,
    "optimistic_unchoke_interval": 4,
    "seed_choking_algorithm": 1,  # to whoever takes it fastest
    "connection_speed": 200,
    "torrent_connect_boost": 60,
    "peer_connect_timeout": 4,
    "handshake_timeout": 4,
    "request_timeout": 6,
    "piece_timeout": 4,
    "min_reconnect_time": 2,
    "peer_timeout": 30,
    "tick_interval": 100,
    "min_announce_interval": 5,
    "tracker_completion_timeout": 5,
    "tracker_receive_timeout": 5,
    "stop_tracker_timeout": 0,
    "tracker_backoff": 10,
    "tracker_maximum_response_length": 16 << 10,
    "connections_limit": 2000,
    "listen_queue_size": 128,
    "hashing_threads": 1,
    "aio_threads": 2,
    "user_agent": "thinwire",
}


def _libtorrent() -> Any:
    try:
        import libtorrent
    except ImportError as error:
        raise MisuseError("a swarm needs the package libtorrent: pip install 'thinwire[swarm]'") from error
    return libtorrent


class _Engine:
    """What must end when a swarm does: libtorrent's session, the folder, a rendezvous of its own."""

    def __init__(self) -> None:
        self.session: Any = None
        self.folder: Path | None = None
        self.owned = False
        self.rendezvous: Rendezvous | None = None

    def close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.pause()
            del session
        rendezvous, self.rendezvous = self.rendezvous, None
        if rendezvous is not None:
            rendezvous.close()
        if self.folder is not None and self.owned:
            shutil.rmtree(self.folder, ignore_errors=True)


@final
class Swarm:
    """A carrier by BitTorrent, for any number of workers.

    Args:
        rendezvous: ``host:port`` of a ``thinwire rendezvous``. By default the publisher's own, which consumers find by
            a hint in the store.
        listen: addresses to take connections on; port 0 is a free one.
        folder: where objects lie while they are given on, one for each process; by default a new one below the system's
            temporary folder. What was written there goes in the end. One in memory (``/dev/shm``) spares a disk.
        keep_bytes: objects beyond so many bytes are given up, those first that were used the longest ago.
        bytes_min: smaller objects come from the store: their description would cost as much.
        upload_bytes_s: the most bytes a second to send; None does not limit.
        rescue_s: pieces are read from the store when nothing has come from peers for so long.
        rendezvous_port: of a publisher's own rendezvous; 0 is a free one.

    Raises:
        MisuseError: (:meth:`join`) the package libtorrent is missing, or nothing can listen there.
    """

    name = "swarm"

    def __init__(
        self,
        *,
        rendezvous: str | None = None,
        listen: str = "0.0.0.0:0",
        folder: str | os.PathLike[str] | None = None,
        keep_bytes: int = 8 << 30,
        bytes_min: int = 64 << 10,
        upload_bytes_s: int | None = None,
        rescue_s: float = 1.5,
        rendezvous_port: int = 0,
    ) -> None:
        if keep_bytes < 1 or bytes_min < 1 or rescue_s <= 0 or (upload_bytes_s is not None and upload_bytes_s < 1):
            raise MisuseError("keep_bytes, bytes_min, rescue_s and upload_bytes_s are above 0")
        self._named = None if rendezvous is None else addresses_of(rendezvous)
        self._listen, self._folder, self._keep_bytes = listen, folder, keep_bytes
        self._bytes_min, self._upload, self._rescue_s = bytes_min, upload_bytes_s, rescue_s
        self._rendezvous_port = rendezvous_port
        self._origin: Origin | None = None
        self._publishing = self._left = self._hinted = False
        self._hint_data = b""
        self._engine = _Engine()
        self._lock = threading.RLock()
        self._torrents: OrderedDict[str, Torrent] = OrderedDict()
        self._meeting: tuple[float, list[str]] = (float("-inf"), [])
        self._refused: OrderedDict[str, None] = OrderedDict()
        self.rescued_bytes = 0
        weakref.finalize(self, self._engine.close)

    def join(self, origin: Origin, *, publishing: bool) -> None:
        _libtorrent()
        if self._origin is not None:
            raise MisuseError("this swarm was joined to a run before; make a new one for another")
        self._origin, self._publishing = origin, publishing
        if publishing and self._named is None:
            self._engine.rendezvous = Rendezvous(port=self._rendezvous_port)
            self._hint_data = hint_bytes(self._engine.rendezvous.addresses)

    def meeting(self) -> bytes:
        return hint_bytes(self._named or []) if self._engine.rendezvous is None else self._hint_data

    def join_at(self, origin: Origin, meeting: bytes) -> None:
        addresses = parse_hint(meeting).addresses
        if self._named is None:
            self._named, self._hint_data = addresses, meeting
        self.join(origin, publishing=True)

    def carries(self, key: str, size: int) -> bool:
        # a description in skips/ would be taken for a patch by listings
        return size >= self._bytes_min and key.startswith("objects/") and len(key) + 8 <= _KEY_LENGTH_MAX

    # --- the session -------------------------------------------------------------------------------------------------

    def _session(self) -> Any:
        with self._lock:
            if self._left:
                raise RetryError("this swarm was left")
            if self._engine.session is None:
                if self._folder is None:
                    self._engine.folder, self._engine.owned = Path(tempfile.mkdtemp(prefix="thinwire-swarm-")), True
                else:
                    self._engine.folder = Path(self._folder)
                    self._engine.folder.mkdir(parents=True, exist_ok=True)
                settings = {**_SETTINGS, "listen_interfaces": self._listen}
                if self._upload is not None:
                    settings["upload_rate_limit"] = self._upload
                self._engine.session = _libtorrent().session(settings)
            return self._engine.session

    def _path(self, description: Description) -> Path:
        assert self._engine.folder is not None
        return self._engine.folder / description.name

    def _trackers(self) -> list[str]:
        """Announce URLs of the rendezvous; what the hint says is looked at anew every few seconds."""
        if self._engine.rendezvous is not None:
            addresses = self._engine.rendezvous.addresses
        elif self._named is not None:
            addresses = self._named
        else:
            addresses = self._hint()
        return [f"http://{address}/announce" for address in addresses]

    def _hint(self) -> list[str]:
        at, addresses = self._meeting
        if time.monotonic() - at < _HINT_S or self._origin is None:
            return addresses
        found = addresses
        try:
            found = parse_hint(self._origin.get(HINT_KEY, size_max=HINT_BYTES_MAX)).addresses
        except (RefetchError, MalformedError, RetryError) as error:
            _log.info("no publisher tells where its swarm meets: %s", error)
        self._meeting = time.monotonic(), found
        if found != addresses:
            with self._lock:
                for torrent in self._torrents.values():
                    torrent.handle.replace_trackers([{"url": f"http://{a}/announce", "tier": 0} for a in found])
        return found

    def _add(self, key: str, description: Description, *, whole: bool) -> Torrent:
        lt, session = _libtorrent(), self._session()
        trackers = self._trackers()
        params = lt.load_torrent_buffer(description.encode())
        params.save_path = str(self._engine.folder)
        params.trackers = trackers
        flags = lt.torrent_flags
        params.flags = flags.disable_dht | flags.disable_lsd | flags.disable_pex
        if whole:
            params.flags |= flags.seed_mode
        with self._lock:
            found = self._torrents.get(key)
            if found is None:
                found = Torrent(key, description, session.add_torrent(params))
                found.whole = whole
                self._torrents[key] = found
            self._torrents.move_to_end(key)
        return found

    def _drop(self, key: str) -> None:
        with self._lock:
            torrent = self._torrents.pop(key, None)
            session = self._engine.session
            if torrent is None or session is None:
                return
            with suppress(RuntimeError):
                session.remove_torrent(torrent.handle, _libtorrent().session.delete_files)

    def _trim(self) -> None:
        """Give up what is beyond ``keep_bytes``, the longest unused first; never what is on its way."""
        with self._lock:
            held = sum(t.description.size for t in self._torrents.values())
            for key, torrent in list(self._torrents.items()):
                if held <= self._keep_bytes:
                    return
                if torrent.whole and not torrent.waiting:
                    held -= torrent.description.size
                    self._drop(key)

    # --- giving ------------------------------------------------------------------------------------------------------

    def offer(self, key: str, data: Blob) -> None:
        if self._left or self._origin is None or not self.carries(key, sum(memoryview(b).nbytes for b in data)):
            return
        with self._lock:
            if key in self._torrents or key in self._refused:
                return
        if self._publishing:
            description = describe(key, data)
            self._seed(key, description, data)
            self._tell()
            self._origin.put(key + DESCRIPTION_SUFFIX, [description.encode()])
        else:
            joined = b"".join(data)
            threading.Thread(target=self._give_on, args=(key, joined), name="thinwire-seed", daemon=True).start()

    def _give_on(self, key: str, data: bytes) -> None:
        """Seed what came from the store, if it is what the publisher described."""
        try:
            description = self._description(key, len(data))
            if description is not None and description.first_wrong(data) is None:
                self._seed(key, description, [data])
        except (ThinwireError, OSError, RuntimeError) as error:
            _log.info("%s is not given on: %s", key, error)

    def _seed(self, key: str, description: Description, data: Blob) -> None:
        self._session()
        if description.size > self._keep_bytes:
            return
        with open(self._path(description), "wb") as file:
            for buffer in data:
                file.write(buffer)
        self._add(key, description, whole=True)
        self._trim()

    def _tell(self) -> None:
        """Say in the store where this publisher's rendezvous is, once; not where workers are told otherwise."""
        if self._hint_data and not self._hinted and self._origin is not None:
            self._origin.put(HINT_KEY, [self._hint_data])
            self._hinted = True

    # --- taking ------------------------------------------------------------------------------------------------------

    def _description(self, key: str, size_max: int) -> Description | None:
        assert self._origin is not None
        try:
            data = self._origin.get(key + DESCRIPTION_SUFFIX, size_max=description_bytes_max(size_max))
            return Description.parse(data, key=key, size_max=size_max)
        except RefetchError:  # none, or a larger one than there can be
            return None
        except MalformedError as error:
            _log.warning("%s comes without a swarm: %s", key, error)
            return None

    def fetch(self, key: str, *, size_max: int, stall_s: float, progress: Progress) -> bytes | None:
        if self._left or self._origin is None or key in self._refused:
            return None
        torrent = self._torrents.get(key)
        if torrent is None:
            description = self._description(key, size_max)
            if description is None:
                return None
            torrent = self._add(key, description, whole=False)
        if torrent.description.size > size_max:
            return None
        with self._lock:
            torrent.waiting += 1
        try:
            if not torrent.whole:
                self._download(torrent, stall_s, progress).wait()
            return self._read(torrent, progress)
        except (RuntimeError, OSError) as error:  # libtorrent's own, and the disk's
            if not self._left:
                self._drop(key)
            raise RetryError(f"{key} was not got from the swarm: {error}", key=key) from error
        except RetryError:
            self._drop(key)
            raise
        finally:
            with self._lock:
                torrent.waiting -= 1
            self._trim()

    def _download(self, torrent: Torrent, stall_s: float, progress: Progress) -> Download:
        assert self._origin is not None
        return Download(
            torrent, self._origin, rescue_s=self._rescue_s, stall_s=stall_s, progress=progress,
            left=lambda: self._left, rescued=self._rescued,
        )  # fmt: skip

    def _rescued(self, size: int) -> None:
        with self._lock:
            self.rescued_bytes += size

    def _read(self, torrent: Torrent, progress: Progress) -> bytes:
        """The bytes of a torrent that is whole. libtorrent may still be writing: pieces are compared once more."""
        deadline, said = time.monotonic() + _FLUSH_S, 0
        if not torrent.whole:
            torrent.handle.flush_cache()
        while True:
            if self._left:
                raise RetryError("this swarm was left")
            try:
                data = self._path(torrent.description).read_bytes()
            except FileNotFoundError:
                data = b""
            if len(data) == torrent.description.size and (
                torrent.whole or torrent.description.first_wrong(data) is None
            ):
                torrent.whole = True
                return data
            if torrent.whole or time.monotonic() > deadline:
                raise RetryError(f"{torrent.key} came, and cannot be read back from {self._engine.folder}")
            said += 1
            progress(torrent.description.size + said)
            time.sleep(LOOK_S)

    def distrust(self, key: str) -> None:
        """Not asked for in this swarm any more: its description is of other bytes than its manifest."""
        with self._lock:
            self._refused[key] = None
            while len(self._refused) > 4096:
                self._refused.popitem(last=False)
        self._drop(key)

    def leave(self) -> None:
        with self._lock:
            self._left = True
            files = [self._path(torrent.description) for torrent in self._torrents.values()]
            self._torrents.clear()
        self._engine.close()
        with suppress(OSError):
            for file in files:
                file.unlink(missing_ok=True)
            if files:
                files[0].parent.rmdir()  # a folder that was given stays if there is more in it
