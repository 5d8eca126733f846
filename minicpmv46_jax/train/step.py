"""A training step: a pure function over plain trees.

Trained and frozen parameters are two trees of the model's shape. Each has None in the other's places, or an
adapter beside a frozen matrix. None is not a leaf in jax, so gradients and the optimiser's state exist for
trained parameters only. Trained parameters are float32 masters, which the step casts to the computing dtype.
Frozen ones may be stored in that dtype.
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
    """State of a run.

    Attributes:
      step: number of steps done.
      trained, frozen: the model's parameters in two parts; see `join`.
      optimizer: the optimiser's state.
    """

    step: Int32[Array, ""]
    trained: Any
    frozen: Any
    optimizer: Any


class Metrics(NamedTuple):
    """Metrics of one step.

    Attributes:
      loss: mean negative log likelihood of the label tokens, without `z_loss`.
      z_loss: the weighted mean of the squared log-sum-exp.
      grad_norm: norm of the gradient.
      learned: sum of the label tokens' weights.
    """

    loss: Float32[Array, ""]
    z_loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    learned: Float32[Array, ""]


Step = Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]


def split(params: Params, trained: Callable[[TreePath], bool]) -> tuple[Params, Params]:
    """Splits parameters into (trained, frozen).

    Both are trees like `params`, with None in the other's places.
    """
    is_trained = jax.tree_util.tree_map_with_path(lambda keys, _: trained(tree_path(keys)), params)
    return (
        jax.tree.map(lambda x, chosen: x if chosen else None, params, is_trained),
        jax.tree.map(lambda x, chosen: None if chosen else x, params, is_trained),
    )


def join(trained: Any, frozen: Any, scale: float = 1.0) -> Params:
    """Joins trained and frozen parameters: the inverse of `split`.

    An adapter (`lora.Adapter`) beside a frozen matrix gives frozen + scale b a.
    """

    def leaf(frozen: Array | None, trained: Any) -> Array | None:
        if trained is None:
            return frozen
        return trained if frozen is None else lora.merge_adapter(frozen, trained, scale)

    return jax.tree.map(leaf, frozen, trained, is_leaf=lambda x: x is None)


def cast_for_compute(params: Params, dtype: DTypeLike) -> Params:
    """Casts parameters to the computing dtype.

    Norms, gates and decays keep their dtype, because the layers use them in float32.
    """

    def cast(keys: Any, x: Array) -> Array:
        used_in_float32 = x.ndim == 1 and tree_path(keys)[-1] != "bias"
        return x if used_in_float32 else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def new_state(trained: Any, frozen: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; trained parameters become float32 masters."""
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
    """Returns the step function; jit it with its state donated.

    Args:
      config: the model's.
      optimizer: the optimiser of the trained parameters.
      dtype: the computing dtype, bfloat16 or float32.
      z_loss: weight of the squared log-sum-exp of the logits (arXiv:2204.02311, section 5); 0 for none.
      remat, scan_layers: see `forward.batch_loss`.
      scale: the adapters' factor; see `join`.
      mesh: a mesh of `sharding.make_mesh` that the state was placed on with `place`; None for one device.
      backend: the backend of every operation of the step, text layers and vision tower: "reference", "hopper"
        (alias "gpu"), "tpu", or None for the fastest one that serves. The loss and the optimiser are plain
        XLA with any backend.
      chunk: see `loss.summed_loss`.

    Returns:
      (state, batch) -> (state, metrics). The batch has leading axes `[accumulation, devices]`; see
      `batch.stack`. Tracing it raises ValueError or NotImplementedError if an operation lacks the backend or
      cannot use it for these sizes.
    """
    graph = model.schema(config, backend)
    options = {"remat": remat, "scan_layers": scan_layers, "z_loss": z_loss, "chunk": chunk}

    def sums(params: Params, batch: TrainBatch, gather: Gather) -> Float32[Array, "1 3"]:
        """Computes a device's sums of the objective, the likelihood term and the squared log-sum-exp."""
        local = jax.tree.map(lambda x: x[0], batch)
        total, nll, lse = forward.batch_loss(graph, params, local, gather=gather, **options)
        return jnp.stack([total, (nll * local.weights).sum(), (lse**2 * local.weights).sum()])[None]

    def loss(trained: Any, frozen: Any, batch: TrainBatch, total: Array) -> tuple[Array, tuple[Array, Array]]:
        """Computes a batch's share of the mean loss, where `total` is the weight of all batches."""
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
        return _constrain_sharding(TrainState(state.step + 1, trained, state.frozen, optimizer_state), mesh), metrics

    return step


def place(state: TrainState, mesh: Mesh) -> TrainState:
    """Places the state on the mesh, sharded as `sharding.place` does."""
    return sharding.place(state, mesh)


def _constrain_sharding(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Constrains the state to the shardings of `place`, for use while tracing."""
    return state if mesh is None else jax.lax.with_sharding_constraint(state, sharding.shardings(state, mesh))


def _on_mesh(sums: Callable[..., Array], params: Params, mesh: Mesh | None) -> Callable[[Params, TrainBatch], Array]:
    """Returns `sums` run on every device: (params, batch) -> [devices, 3]."""
    if mesh is None:
        return functools.partial(sums, gather=lambda part, path: part)
    specs = sharding.partition_specs(params, mesh)
    local = functools.partial(sums, gather=sharding.make_gather(specs))
    return jax.shard_map(local, mesh=mesh, in_specs=(specs, sharding.BATCH), out_specs=sharding.BATCH, check_vma=False)


def accumulate(grad: Callable[..., Any], trained: Any, frozen: Any, batch: TrainBatch) -> Any:
    """Returns the sum of `grad(trained, frozen, part)` over the batch's parts."""
    parts = batch.ids.shape[0]
    part = functools.partial(grad, trained, frozen)
    if parts == 1:
        return part(jax.tree.map(lambda x: x[0], batch))
    first = jax.eval_shape(part, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(lambda sums, one: (jax.tree.map(jnp.add, sums, part(one)), None), zeros, batch)[0]
