"""Compressed replicas of an FSDP2 model: shard inside a machine, send compressed gradients between machines.

    mesh = init_device_mesh("cuda", (machines, gpus), mesh_dim_names=("replicate", "shard"))
    for block in model.layers:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    exchange = CompressedAllReduce(ErrorFeedback(TopK(density=0.01)), group=mesh["replicate"].get_group())
    compress_replicas(model, exchange)

It stands where hybrid sharding (HSDP) does its all-reduce: FSDP reduce-scatters each group of parameters over the
shard axis, and the exchange takes the mean of what a rank holds then with the ranks that hold the same shard.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from thinwire.compress.group import sizes_of
from thinwire.errors import MisuseError
from thinwire.integrations.agreement import agree, digest_of
from thinwire.integrations.ddp import CompressedAllReduce

__all__ = ["compress_replicas"]

_ROOT = "(root)"


def compress_replicas(model: torch.nn.Module, exchange: CompressedAllReduce) -> tuple[str, ...]:
    """Registers ``exchange`` as the all-reduce hook of every module that went through ``fully_shard``. Collective over
    the exchange's ranks. Returns the names of the units: the modules' paths, which stay the same from run to run.

    What is sent is the gradient of a unit's shard, averaged over the shard axis, in the type in which FSDP reduces.
    Residuals are kept by unit and rank: save ``exchange.state_dict()`` on every rank, and load it where the shard and
    the replica are the same. The law of error feedback holds for every shard by itself.

    Limits:
        - FSDP2 (``fully_shard``) only, and over a mesh of the shard axis alone: given the replicas too, FSDP would have
          sent the whole gradient before the hook is called.
        - Replicas must start from equal parameters (checked here: call it once they hold their values).
        - All parameters of a unit get a gradient in every step, or ``set_reduce_scatter_unused_params(True)`` is on.
        - To accumulate gradients use ``set_requires_gradient_sync(False)``; else every micro-batch is exchanged.
        - The hook returns when the mean is there, so units follow each other: while one travels, only what backward
          has already queued on the device is computed.
        - ``clip_grad_norm_`` and ``GradScaler`` see the mean, alike on all replicas; a gradient that is not finite on
          any replica is NaN on all. Make the exchange without ``scaler`` and ``optimizer``, which know parameters, not
          shards: under a GradScaler keep its scale constant, or what waits counts by the scale of its time.

    Raises:
        MisuseError: No module is sharded by FSDP2, the mesh holds replicas too, or the replicas differ.
    """
    units = {name or _ROOT: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    if not units:
        raise MisuseError("no module of this model went through fully_shard; shard first, then compress the replicas")
    if exchange.scaled:
        raise MisuseError("make the exchange without scaler and optimizer: a unit is a shard of many parameters")
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise MisuseError(f"parameter {name} holds no values yet; initialise the model, then compress its replicas")
    _check_mesh(parameters, exchange)
    shards = {name: _shard_of(parameter) for name, parameter in parameters.items()}
    start = {"units": list(units), "shards": shards, "digest": digest_of(parameters.values())}
    agree(
        exchange.group,
        start,
        "replicas must hold the same shard of the same parameters: start all from one seed or checkpoint, and give the "
        "exchange the group of the replicate axis",
    )
    for name, module in units.items():
        module.set_all_reduce_hook(_hook_of(name, exchange))
    return tuple(units)


def _hook_of(name: str, exchange: CompressedAllReduce) -> Callable[[Tensor], None]:
    seen: list[int] = []

    def hook(gradient: Tensor) -> None:
        numel = gradient.numel()
        if seen and seen[0] != numel:
            raise MisuseError(
                f"unit {name} has gradients for {numel} elements, and had for {seen[0]}: not all of its parameters "
                "were used in every step; call model.set_reduce_scatter_unused_params(True)",
                unit=name,
            )
        seen[:] = [numel]
        exchange.all_reduce(gradient, name=name)
        if gradient.is_cuda:
            # FSDP frees this buffer on another stream than the one that reads it last, after a cast.
            gradient.record_stream(torch.cuda.current_stream(gradient.device))

    return hook


def _shard_of(parameter: Tensor) -> tuple[list[int], list[int] | None]:
    """The shape of what this rank holds, and its coordinate along the shard axis."""
    if not isinstance(parameter, DTensor):
        return list(parameter.shape), None
    coordinate = parameter.device_mesh.get_coordinate()
    return list(parameter.to_local().shape), None if coordinate is None else list(coordinate)


def _check_mesh(parameters: dict[str, torch.nn.Parameter], exchange: CompressedAllReduce) -> None:
    """The exchange's ranks, and those among which a parameter is sharded, have this one in common and no other."""
    me = dist.get_rank()
    replicas = set(sizes_of(exchange.group, me)) - {me}
    meshes = {name: p.device_mesh for name, p in parameters.items() if isinstance(p, DTensor)}
    shared = {name: replicas & set(mesh.mesh.flatten().tolist()) for name, mesh in meshes.items()}
    bad = [name for name, ranks in shared.items() if ranks]
    if max(sizes_of(exchange.group, int(bool(bad)))):  # raise on all ranks, or none
        where = f"ranks {sorted(shared[bad[0]])} are in the mesh of {bad[0]}" if bad else "so it is on another replica"
        raise MisuseError(
            "a replica's ranks must not be among those that FSDP shards over; give fully_shard the shard axis alone, "
            f'mesh["shard"], and the exchange the group of the other ({where})'
        )
