"""Parameters and batches over a mesh: data parallel, fully sharded, or both.

A mesh has two axes. Every device of either reads its own part of a batch; along "fsdp" large arrays are kept in shards too
(arXiv:1910.02054), along "data" they are repeated. How an array is sharded depends on its shape alone, so that masters, gradients
and the optimiser's moments of one parameter lie alike.

Several processes ("hosts", each with devices of its own) run the same program, begun by `jax.distributed.initialize`: each reads
data for its own devices, and what they must decide together they tell each other.
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
    """A mesh of data x fsdp devices, the first that there are; of several hosts all.

    Raises ValueError where there are not so many, or some of several hosts' would be left out.
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
    """Matrices are sharded along their longest axis that divides; vectors, and what does not divide, are repeated."""
    fitting = [axis for axis, size in enumerate(shape) if size % shards == 0]
    if shards == 1 or len(shape) < 2 or not fitting:
        return PartitionSpec()
    axis = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * axis, FSDP)


def partition_specs(tree: Any, mesh: Mesh) -> Any:
    """Each leaf's `partition_spec`."""
    return jax.tree.map(lambda x: partition_spec(x.shape, mesh.shape[FSDP]), tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each leaf lies on the mesh."""
    return jax.tree.map(lambda x: NamedSharding(mesh, partition_spec(x.shape, mesh.shape[FSDP])), tree)


def make_gather(partition_specs: Any) -> Callable[[Any, tuple[str | int, ...]], Any]:
    """For use inside `shard_map`: (part, path) -> the part of the tree at `path`, made whole from its shards."""

    def unshard(part: Any, path: tuple[str | int, ...]) -> Any:
        own = partition_specs
        for key in path:
            own = own[key]
        return jax.tree.map(_unshard, part, own)

    return unshard


def _unshard(shard: jax.Array, partition_spec: PartitionSpec) -> jax.Array:
    return jax.lax.all_gather(shard, FSDP, axis=partition_spec.index(FSDP), tiled=True) if FSDP in partition_spec else shard


def place(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every host has whole, on the mesh, each as `partition_spec` says."""

    def put(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: np.asarray(x[at]))

    return jax.tree.map(put, tree, shardings(tree, mesh))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch of leaves `[accumulation, devices, ...]` on the mesh; of several hosts each gives the part of its own devices."""
    own = NamedSharding(mesh, PartitionSpec(None, *BATCH))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(own, x), batch)


def all_true(flag: bool) -> bool:
    """Whether `flag` is true on every host; all have to ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(flag)).all())


def gather_json(value: Any) -> list[Any]:
    """Every host's `value`, as JSON can hold it, in the order of hosts; all have to tell theirs."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - text.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
