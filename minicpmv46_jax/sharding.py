"""Parameters and batches over a mesh: data parallel, fully sharded, or both.

A mesh has two axes. Every device of either reads its own part of a batch; along "fsdp" large arrays are kept in shards too
(arXiv:1910.02054), along "data" they are repeated. How an array is sharded depends on its shape alone, so that masters, gradients
and the optimiser's moments of one parameter lie alike.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, FSDP = "data", "fsdp"
BATCH = PartitionSpec((DATA, FSDP))


def make_mesh(data: int = 1, fsdp: int = 1) -> Mesh:
    """A mesh of data x fsdp devices, the first that there are. Raises ValueError where there are not so many."""
    devices = jax.devices()
    if data < 1 or fsdp < 1 or data * fsdp > len(devices):
        raise ValueError(f"a mesh of data = {data} and fsdp = {fsdp} needs {data * fsdp} devices, there are {len(devices)}")
    return Mesh(np.array(devices[: data * fsdp]).reshape(data, fsdp), (DATA, FSDP))


def spec(shape: tuple[int, ...], shards: int) -> PartitionSpec:
    """Matrices are sharded along their longest axis that divides; vectors, and what does not divide, are repeated."""
    fitting = [axis for axis, size in enumerate(shape) if size % shards == 0]
    if shards == 1 or len(shape) < 2 or not fitting:
        return PartitionSpec()
    axis = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * axis, FSDP)


def specs(tree: Any, mesh: Mesh) -> Any:
    """Each leaf's `spec`."""
    return jax.tree.map(lambda x: spec(x.shape, mesh.shape[FSDP]), tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each leaf lies on the mesh."""
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(x.shape, mesh.shape[FSDP])), tree)


def gather(specs: Any) -> Callable[[Any, tuple[str | int, ...]], Any]:
    """For use inside `shard_map`: (part, path) -> the part of the tree at `path`, made whole from its shards."""

    def whole(part: Any, path: tuple[str | int, ...]) -> Any:
        own = specs
        for key in path:
            own = own[key]
        return jax.tree.map(_whole, part, own)

    return whole


def _whole(shard: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.all_gather(shard, FSDP, axis=spec.index(FSDP), tiled=True) if FSDP in spec else shard
