"""The server: an ordinary Flower ServerApp, and one wrapper around its strategy."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import thinwire
from sparse_digits import task

app = ServerApp()


def strategy(config) -> thinwire.SparseSync:
    return thinwire.SparseSync(
        FedAvg(fraction_evaluate=0.0),
        density=float(config["density"]),
        down_density=float(config["down-density"]),
        anchor_every=int(config["anchor-every"]),
        feedback=str(config["feedback"]),
        values=str(config["values"]),
    )


def score(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    del server_round
    model = task.network()
    model.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": task.accuracy(model)})


@app.main()
def main(grid: Grid, context: Context) -> None:
    sync = strategy(context.run_config)
    arrays = ArrayRecord(task.network().state_dict())
    rounds = int(context.run_config["rounds"])
    result = sync.start(grid, arrays, num_rounds=rounds, evaluate_fn=score)
    clients = len(list(grid.get_node_ids()))
    dense = 2 * rounds * clients * sum(len(array.data) for array in arrays.values())
    print(f"accuracy {result.evaluate_metrics_serverapp[rounds]['accuracy']:.3f} after {rounds} rounds")
    print(f"{sync.ledger.total() / 1e6:.2f} MB sent; whole models would have been {dense / 1e6:.2f} MB")
    for (direction, kind), nbytes in sorted(sync.ledger.by("direction", "kind").items()):
        print(f"  {direction:4} {kind:7} {nbytes / 1e3:10.1f} kB")
