"""The client: an ordinary Flower ClientApp, and one mod."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import thinwire
from sparse_digits import task

app = ClientApp(mods=[thinwire.SparseSyncMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    number, parts = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    model = task.network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = task.part(number, parts)
    loss = task.train(
        model,
        images,
        labels,
        epochs=int(context.run_config["local-epochs"]),
        rate=float(context.run_config["learning-rate"]),
        seed=1000 * int(message.content["config"]["server-round"]) + number,
    )
    metrics = MetricRecord({"num-examples": len(images), "train_loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)
