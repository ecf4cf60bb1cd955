"""The slow network limits, counts and leaves nothing; the launcher collects results and reports the rank that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from thinwire.bench.net import launch as launching
from thinwire.bench.net import namespaces
from thinwire.bench.net.launch import RankError, deliver, launch, rank_environment
from thinwire.bench.net.namespaces import HOSTS_MAX, Counters, SlowNetwork, parse_rate
from thinwire.errors import MisuseError

HEADER = "import os, sys, time\nfrom thinwire.bench.net.launch import deliver\nrank = int(os.environ['RANK'])\n"


def worker(body: str) -> str:
    """A module in the current folder, which ``python -m`` finds."""
    Path("networker.py").write_text(HEADER + body)
    return "networker"


def gone(pid: int) -> bool:
    """Whether the process ends within a few seconds; a zombie has ended."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


# --- without root ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "1", "gbit", "0gbit", "-1gbit", "1Gbps", "1gbit; rm", "nangbit"])
def test_what_is_not_a_rate_is_refused(text: str) -> None:
    with pytest.raises(MisuseError, match="not a rate"):
        parse_rate(text)


@pytest.mark.parametrize("hosts", [0, -1, HOSTS_MAX + 1])
def test_a_network_has_a_sane_number_of_hosts(hosts: int) -> None:
    with pytest.raises(MisuseError, match="hosts"):
        SlowNetwork(hosts)


def test_two_networks_of_one_process_have_different_names() -> None:
    names = {SlowNetwork(2).namespace(host) for host in range(2)} | {SlowNetwork(2).namespace(1)}
    assert len(names) == 3
    with pytest.raises(MisuseError, match="count from 0"):
        SlowNetwork(2).address(2)


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces.shutil, "which", lambda program: f"/sbin/{program}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in str(SlowNetwork.why_not())
    with pytest.raises(MisuseError, match="root"):
        SlowNetwork(2).__enter__()
    monkeypatch.setattr(namespaces.shutil, "which", lambda _program: None)
    assert "install iproute2" in str(SlowNetwork.why_not())


def test_ranks_talk_over_loopback_and_deliver() -> None:
    module = worker(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.full((3,), rank + 1.0)\n"
        "dist.all_reduce(x)\n"
        "print('sum', x[0].item())\n"
        "dist.destroy_process_group()\n"
        "deliver({'rank': rank, 'sum': x.tolist(), 'given': [*sys.argv[1:], os.environ['EXTRA']]})\n"
    )
    said: list[str] = []
    results = launch(module, ["a", "b"], ranks=2, env={"EXTRA": "c"}, report=said.append)
    assert results == [{"rank": rank, "sum": [3.0] * 3, "given": ["a", "b", "c"]} for rank in range(2)]
    assert "sum 3.0" in said


def test_the_first_rank_that_dies_is_named_and_the_others_are_ended() -> None:
    module = worker(
        "print(os.getpid())\n"
        "if rank == 1:\n"
        "    time.sleep(0.3)\n"
        "    raise RuntimeError('the disk is full')\n"
        "time.sleep(60)\n"
    )
    said: list[str] = []
    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 2 ended with exit code 1;(.*\n)*.*the disk is full") as caught:
        launch(module, ranks=2, report=said.append)
    assert time.monotonic() - began < 30
    assert (caught.value.facts["rank"], caught.value.facts["exit_code"]) == (1, 1)
    assert gone(int(said[0]))


def test_a_rank_that_is_killed_hangs_or_says_nothing_is_an_error() -> None:
    with pytest.raises(RankError, match=r"exit code -9"):
        launch(worker("os.kill(os.getpid(), 9)"), ranks=1)
    with pytest.raises(RankError, match=r"not ended after 0\.5 s"):
        launch(worker("time.sleep(60)"), ranks=1, timeout_s=0.5)
    with pytest.raises(RankError, match="without a result"):
        launch(worker("pass"), ranks=1)


def test_what_a_rank_started_ends_with_it() -> None:
    module = worker(
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nprint(child.pid)\ntime.sleep(0.2)\nsys.exit(3)\n"
    )
    said: list[str] = []
    with pytest.raises(RankError, match="exit code 3"):
        launch(module, ranks=1, report=said.append)
    assert gone(int(said[0]))


def test_misuse_is_refused() -> None:
    with pytest.raises(MisuseError, match="3 ranks on 2 hosts"):
        launch("nothing", ranks=3, network=SlowNetwork(2))
    with pytest.raises(MisuseError, match="without anybody to take it"):
        deliver(1)


def test_ranks_use_one_thread_and_the_line() -> None:
    env = rank_environment(1, 2, SlowNetwork(2), 29500)
    assert (env["GLOO_SOCKET_IFNAME"], env["MASTER_ADDR"], env["OMP_NUM_THREADS"]) == ("eth0", "10.77.0.1", "1")
    assert rank_environment(0, 1, None, launching._free_port())["GLOO_SOCKET_IFNAME"] == "lo"


# --- with root: make test-net --------------------------------------------------------------------------------------

SEND = """
import socket
size, address = int(sys.argv[1]), os.environ['MASTER_ADDR']
counter = lambda which: int(open(f'/sys/class/net/eth0/statistics/{which}_bytes').read())
if rank == 0:
    with socket.create_server((address, 6000)) as server:
        deliver({})
        connection, _ = server.accept()
        with connection:
            buffer, got, began = bytearray(1 << 20), 0, None
            while n := connection.recv_into(buffer):
                began = began or time.perf_counter()
                got += n
    deliver({'bytes': got, 'seconds': time.perf_counter() - began, 'received': counter('rx')})
else:
    deadline = time.monotonic() + 20
    while True:
        try:
            connection = socket.create_connection((address, 6000), timeout=5)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with connection:
        connection.sendall(bytes(size))
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    deliver({'sent': counter('tx')})
"""

needs_network = pytest.mark.skipif(
    SlowNetwork.why_not() is not None, reason=f"no slow network here: {SlowNetwork.why_not()}"
)


def left_over() -> list[str]:
    """Namespaces of this process."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"thinwire-{os.getpid()}-")]


@pytest.mark.net
@needs_network
def test_a_line_limits_what_passes_and_counts_it() -> None:
    size, module = 4_000_000, worker(SEND)
    seconds = {}
    for rate in ("100mbit", "none"):
        with SlowNetwork(2, rate) as network:
            before = [network.counters(host) for host in range(2)]
            results = launch(module, [str(size)], ranks=2, network=network, timeout_s=60)
            first, second = (network.counters(host) - before[host] for host in range(2))
        assert results[0]["bytes"] == size
        assert size < first.received_bytes < 1.1 * size
        assert size < second.sent_bytes < 1.1 * size
        assert first.sent_bytes < 0.1 * size  # acknowledgements
        assert abs(results[0]["received"] - first.received_bytes) < 5000  # as the host itself counts
        seconds[rate] = results[0]["seconds"]
    assert 8 * size / seconds["100mbit"] < 1.1 * 100e6
    assert seconds["none"] < seconds["100mbit"]
    assert left_over() == []


@pytest.mark.net
@needs_network
def test_a_host_knows_its_neighbours_and_no_way_out() -> None:
    def asked(network: SlowNetwork, what: str) -> list[dict]:
        return json.loads(network.run(0, ["ip", "-j", what], stdout=subprocess.PIPE).communicate(timeout=20)[0])

    with SlowNetwork(40) as network:
        assert [route["dst"] for route in asked(network, "route")] == ["10.77.0.0/24"]
        found = [n["dst"] for n in asked(network, "neigh") if n["state"] == ["PERMANENT"]]
        assert sorted(found) == sorted(network.address(host) for host in range(1, 40))


@pytest.mark.net
@needs_network
def test_the_rank_that_dies_on_the_network_is_named_and_nothing_is_left() -> None:
    module = worker("print(os.getpid())\nif rank == 1:\n    sys.exit('no route to anywhere')\ntime.sleep(60)\n")
    with (
        pytest.raises(RankError, match=r"rank 1 of 2 ended with exit code 1;(.*\n)*no route"),
        SlowNetwork(2) as network,
    ):
        launch(module, ranks=2, network=network, timeout_s=60)
    assert left_over() == []


@pytest.mark.net
@needs_network
def test_teardown_ends_what_runs_and_may_be_repeated() -> None:
    with SlowNetwork(2) as network, SlowNetwork(2) as other:
        sleeper = network.run(0, ["sleep", "60"])
        kept = other.run(0, ["sleep", "60"])
        network.tear_down()
        network.tear_down()
        assert sleeper.wait(timeout=10) == -signal.SIGKILL
        assert kept.poll() is None
        assert len(left_over()) == 3  # the other's two hosts and switch
    assert kept.wait(timeout=10) == -signal.SIGKILL
    assert left_over() == []


@pytest.mark.net
@needs_network
def test_a_network_that_cannot_be_made_whole_is_not_left_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no such queue")

    monkeypatch.setattr(namespaces, "_limit", fail)
    with pytest.raises(OSError, match="queue"):
        SlowNetwork(2).__enter__()
    assert left_over() == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


HOLD = """
import time
from thinwire.bench.net.namespaces import SlowNetwork
with SlowNetwork(2) as network:
    print(network.namespace(0), flush=True)
    time.sleep(60)
"""


@pytest.mark.net
@needs_network
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_program_that_is_ended_leaves_nothing_for_long(number: signal.Signals) -> None:
    held = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert held.stdout is not None
    name = held.stdout.readline().strip()
    assert name in namespaces._namespaces()
    held.send_signal(number)
    held.wait(timeout=20)
    if number == signal.SIGKILL:  # nobody could tidy up: the next network does
        assert name in namespaces._namespaces()
        with SlowNetwork(1):
            pass
    assert name not in namespaces._namespaces()


def test_counters_subtract() -> None:
    assert Counters(5, 7) - Counters(2, 3) == Counters(3, 4)
