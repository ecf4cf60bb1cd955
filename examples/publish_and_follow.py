"""A trainer publishes every step; a worker follows in another thread, bit for bit.

python examples/publish_and_follow.py
"""

from __future__ import annotations

import copy
import tempfile
import threading

import torch

import thinwire

STEPS = 8


def train(model: torch.nn.Module, store: str, digests: dict[int, str]) -> None:
    """fp32 masters, published as they are served: in bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-6)
    with thinwire.Publisher(store, dtype=torch.bfloat16, level="smallest") as publisher:
        for step in range(STEPS):
            loss = model(torch.randn(32, 256)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report = publisher.publish(model, step=step)
            digests[report.version] = report.digest
            print(
                f"published {report.version}: {report.total_bytes:>7,} bytes instead of {report.full_bytes:,}, "
                f"{report.density:.2%} changed"
            )


def main() -> None:
    torch.manual_seed(0)
    masters = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))
    served = copy.deepcopy(masters).to(torch.bfloat16)
    digests: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as store:
        trainer = threading.Thread(target=train, args=(masters, store, digests))
        trainer.start()
        consumer = thinwire.Consumer(store, poll_s=0.05)
        followed = {consumer.load(served).version: consumer.digest}
        for version in consumer.follow(every=True, timeout_s=30):
            result = version.apply(served)  # raises, and changes nothing, unless the result is exact
            followed[result.version] = result.digest
            if result.version == STEPS:
                break
        trainer.join()
    assert all(digests[version] == digest for version, digest in followed.items())
    assert torch.equal(served[0].weight, masters[0].weight.to(torch.bfloat16))
    print(f"the worker ran {len(followed)} versions, each with the trainer's digest")


if __name__ == "__main__":
    main()
