"""The same app in this process, without Ray: python local.py --clients 100 --rounds 20"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from flwr.app import Context, RecordDict  # noqa: E402
from sparse_digits import client_app, server_app  # noqa: E402

from thinwire.bench.measure import load, machine, versions  # noqa: E402
from thinwire.integrations.flower_grid import LocalGrid  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append what was measured to this file, as a row of JSON")
    options = parser.parse_args()
    config = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config["rounds"] = options.rounds
    random.seed(0)
    began = time.perf_counter()
    grid = LocalGrid(client_app.app, options.clients, run_config=config)
    server_app.app(grid, Context(1, 1, {}, RecordDict(), config))
    took, nbytes = time.perf_counter() - began, sum(sent.nbytes for sent in grid.log)
    print(f"{options.clients} clients, {nbytes} bytes of messages, {took:.0f} s")
    if options.out:
        row = {"bench": "federated-local", "clients": options.clients, "config": config, "nbytes": nbytes}
        row |= {"seconds": round(took, 1), "load": load(), "machine": machine(), "versions": versions()}
        with options.out.open("a") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
