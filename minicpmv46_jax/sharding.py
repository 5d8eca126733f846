"""Places parameters and batches on a device mesh: data parallel, fully sharded (FSDP), or both.

A mesh has two axes, "data" and "fsdp". Both split a batch over the devices. Large arrays are sharded along
"fsdp" (arXiv:1910.02054) and replicated along "data". An array's sharding depends on its shape alone, so
master weights, gradients and optimiser moments of one parameter have the same sharding.

Several processes ("hosts", each with its own devices) may run the same program after
`jax.distributed.initialize`. Each reads data for its own devices. `all_true` and `gather_json` exchange
values between them.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, FSDP = "data", "fsdp"
BATCH = PartitionSpec((DATA, FSDP))


def make_mesh(data: int = 1, fsdp: int = 1) -> Mesh:
    """Returns a mesh of the first data x fsdp devices; with several hosts, it must have all devices.

    Raises:
      ValueError: there are too few devices, or the mesh would leave out devices of several hosts.
    """
    devices = jax.devices()
    if data < 1 or fsdp < 1 or data * fsdp > len(devices):
        raise ValueError(f"a mesh of data = {data} and fsdp = {fsdp} needs {data * fsdp} devices, there are {len(devices)}")
    if jax.process_count() > 1 and data * fsdp < len(devices):
        raise ValueError(
            f"a mesh of data = {data} and fsdp = {fsdp} leaves out some of the {len(devices)} devices of several hosts"
        )
    return Mesh(np.array(devices[: data * fsdp]).reshape(data, fsdp), (DATA, FSDP))


def partition_spec(shape: tuple[int, ...], shards: int) -> PartitionSpec:
    """Returns an array's sharding: a matrix is sharded along its longest axis that `shards` divides.

    Vectors, and matrices without such an axis, are replicated.
    """
    fitting = [axis for axis, size in enumerate(shape) if size % shards == 0]
    if shards == 1 or len(shape) < 2 or not fitting:
        return PartitionSpec()
    axis = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * axis, FSDP)


def partition_specs(tree: Any, mesh: Mesh) -> Any:
    """Returns each leaf's `partition_spec`."""
    return jax.tree.map(lambda x: partition_spec(x.shape, mesh.shape[FSDP]), tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns each leaf's `NamedSharding` on the mesh."""
    return jax.tree.map(lambda x: NamedSharding(mesh, partition_spec(x.shape, mesh.shape[FSDP])), tree)


def make_gather(specs: Any) -> Callable[[Any, tuple[str | int, ...]], Any]:
    """Returns a function for use inside `shard_map` that all-gathers a part of the parameter tree.

    The function takes (shards of the part, the part's path in the tree) and returns the unsharded part.

    Args:
      specs: the tree's `partition_specs`.
    """

    def unshard(part: Any, path: tuple[str | int, ...]) -> Any:
        part_specs = specs
        for key in path:
            part_specs = part_specs[key]
        return jax.tree.map(_unshard, part, part_specs)

    return unshard


def _unshard(shard: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.all_gather(shard, FSDP, axis=spec.index(FSDP), tiled=True) if FSDP in spec else shard


def place(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays that every host has whole on the mesh, each sharded by `partition_spec`."""

    def put(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: np.asarray(x[at]))

    return jax.tree.map(put, tree, shardings(tree, mesh))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch of leaves `[accumulation, devices, ...]` on the mesh.

    Each host passes the part of its own devices.
    """
    own = NamedSharding(mesh, PartitionSpec(None, *BATCH))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(own, x), batch)


def all_true(flag: bool) -> bool:
    """Returns whether `flag` is true on every host. A collective: every host must call it."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(flag)).all())


def gather_json(value: Any) -> list[Any]:
    """Returns every host's JSON-compatible `value`, in host order. A collective: every host must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - text.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
