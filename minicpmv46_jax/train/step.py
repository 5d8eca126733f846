"""One step of training: a pure function over plain trees.

What is trained and what is frozen are two trees of the model's shape with None in the other's places (or an adapter beside a
frozen matrix); None is no leaf to jax, so gradients, optimiser state and their memory are of the trained parameters alone. Those
are float32 masters; the step casts them to the computing dtype, frozen ones may be kept in it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32

from minicpmv46_jax import model, sharding
from minicpmv46_jax.checkpoint.names import TreePath, tree_path
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.model import Params
from minicpmv46_jax.train import forward, lora
from minicpmv46_jax.train.batch import TrainBatch
from minicpmv46_jax.train.forward import Gather
from minicpmv46_jax.trees import tree_dataclass


@tree_dataclass
class TrainState:
    """Everything that a step changes, and what it reads: `trained` and `frozen` make the model (see `join`)."""

    step: Int32[Array, ""]
    trained: Any
    frozen: Any
    optimizer: Any


class Metrics(NamedTuple):
    """Of one step. `loss` is the mean over learned tokens; `z_loss` is not in it."""

    loss: Float32[Array, ""]
    z_loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    learned: Float32[Array, ""]


Step = Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]


def split(params: Params, trained: Callable[[TreePath], bool]) -> tuple[Params, Params]:
    """(trained, frozen): two trees like `params`, each with None in the other's places."""
    chosen = jax.tree_util.tree_map_with_path(lambda keys, _: trained(tree_path(keys)), params)
    ours = jax.tree.map(lambda x, own: x if own else None, params, chosen)
    theirs = jax.tree.map(lambda x, own: None if own else x, params, chosen)
    return ours, theirs


def join(trained: Any, frozen: Any, scale: float = 1.0) -> Params:
    """The model's parameters: the inverse of `split`; where a trained leaf is an adapter (`lora.Adapter`), frozen + scale b a."""

    def leaf(theirs: Array | None, ours: Any) -> Array:
        if ours is None:
            return theirs
        return ours if theirs is None else lora.merge_adapter(theirs, ours, scale)

    return jax.tree.map(leaf, frozen, trained, is_leaf=lambda x: x is None)


def cast_for_compute(params: Params, dtype: DTypeLike) -> Params:
    """Parameters in the dtype to compute in. Norms, gates and decays, which the layers use in float32, keep theirs."""

    def cast(keys: Any, x: Array) -> Array:
        used_in_float32 = x.ndim == 1 and tree_path(keys)[-1] != "bias"
        return x if used_in_float32 else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def new_state(trained: Any, frozen: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Before the first step; masters become float32."""
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    return TrainState(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained))


def make_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    z_loss: float = 0.0,
    remat: str = "layer",
    scan_layers: bool = True,
    scale: float = 1.0,
    mesh: Mesh | None = None,
    backend: str | None = None,
    chunk: int | None = None,
) -> Step:
    """The function of a step, to be jitted with its state donated.

    Args:
      config: the model's.
      optimizer: over the trained parameters.
      dtype: to compute in: bfloat16 or float32.
      z_loss: weight of the squared log-sum-exp of the logits (arXiv:2204.02311, section 5); 0 for none.
      remat, scan_layers: see `forward.loss`.
      scale: of adapters; see `join`.
      mesh: as `sharding.make_mesh` makes it, for a state that `place`d itself on it; None for one device.
      backend: as in `model.schema`.
      chunk: see `loss.summed_loss`.

    Returns:
      (state, batch) -> (state, metrics). The batch has leading axes `[accumulation, devices]`; see `batch.stack`.
    """
    graph = model.schema(config, backend)
    options = {"remat": remat, "scan_layers": scan_layers, "z_loss": z_loss, "chunk": chunk}

    def sums(params: Params, batch: TrainBatch, gather: Gather) -> Float32[Array, "1 3"]:
        """One device's, over learned tokens: the objective, negative log likelihoods, squared log-sum-exps."""
        own = jax.tree.map(lambda x: x[0], batch)
        total, nll, lse = forward.loss(graph, params, own, gather=gather, **options)
        return jnp.stack([total, (nll * own.weights).sum(), (lse**2 * own.weights).sum()])[None]

    def loss(trained: Any, frozen: Any, batch: TrainBatch, total: Array) -> tuple[Array, tuple[Array, Array]]:
        """One batch's share of the mean over all `total` learned tokens."""
        params = cast_for_compute(join(trained, frozen, scale), dtype)
        objective, nll, z = _on_mesh(sums, params, mesh)(params, batch).sum(axis=0) / total
        return objective, (nll, z)

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        learned = batch.weights.sum()
        share = functools.partial(loss, total=jnp.maximum(learned, 1.0))
        grads, (nll, z) = accumulate(jax.grad(share, has_aux=True), state.trained, state.frozen, batch)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax counts steps in int32
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
        metrics = Metrics(nll, z_loss * z, optax.tree.norm(grads), learned)
        return _placed(TrainState(state.step + 1, trained, state.frozen, optimizer_state), mesh), metrics

    return step


def place(state: TrainState, mesh: Mesh) -> TrainState:
    """The state on the mesh, in shards."""
    return sharding.place(state, mesh)


def _placed(state: TrainState, mesh: Mesh | None) -> TrainState:
    """The same while tracing."""
    return state if mesh is None else jax.lax.with_sharding_constraint(state, sharding.shardings(state, mesh))


def _on_mesh(sums: Callable[..., Array], params: Params, mesh: Mesh | None) -> Callable[[Params, TrainBatch], Array]:
    """`sums` on every device, [devices, 3]."""
    if mesh is None:
        return functools.partial(sums, gather=lambda part, path: part)
    specs = sharding.partition_specs(params, mesh)
    own = functools.partial(sums, gather=sharding.make_gather(specs))
    return jax.shard_map(own, mesh=mesh, in_specs=(specs, sharding.BATCH), out_specs=sharding.BATCH, check_vma=False)


def accumulate(grad: Callable[..., Any], trained: Any, frozen: Any, batch: TrainBatch) -> Any:
    """The sum of `grad(trained, frozen, part)` over the batch's parts."""
    parts = batch.ids.shape[0]
    part = functools.partial(grad, trained, frozen)
    if parts == 1:
        return part(jax.tree.map(lambda x: x[0], batch))
    first = jax.eval_shape(part, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(lambda sums, one: (jax.tree.map(jnp.add, sums, part(one)), None), zeros, batch)[0]
