"""One step of training: a pure function over plain trees.

What is trained and what is frozen are two trees of the model's shape with None in the other's places; None is no leaf to jax, so
gradients, optimiser state and their memory are of the trained parameters alone. Trained parameters are float32 masters; the step
casts them to the computing dtype, frozen ones may be kept in it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32

from minicpmv46_jax import model
from minicpmv46_jax.checkpoint.names import TreePath, tree_path
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.model import Params
from minicpmv46_jax.train.batch import TrainBatch
from minicpmv46_jax.train.forward import losses
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
Assemble = Callable[[Any, Any], Params]  # the model's parameters, from what is trained and what is frozen


def split(params: Params, trained: Callable[[TreePath], bool]) -> tuple[Params, Params]:
    """(trained, frozen): two trees like `params`, each with None in the other's places."""
    chosen = jax.tree_util.tree_map_with_path(lambda keys, _: trained(tree_path(keys)), params)
    ours = jax.tree.map(lambda x, own: x if own else None, params, chosen)
    theirs = jax.tree.map(lambda x, own: None if own else x, params, chosen)
    return ours, theirs


def join(trained: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    return jax.tree.map(lambda x, y: y if x is None else x, trained, frozen, is_leaf=lambda x: x is None)


def computing(params: Params, dtype: DTypeLike) -> Params:
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
    assemble: Assemble = join,
    backend: str | None = None,
    chunk: int | None = None,
) -> Step:
    """The function of a step, to be jitted with its state donated.

    Args:
      config: the model's.
      optimizer: over the trained parameters.
      dtype: to compute in: bfloat16 or float32.
      z_loss: weight of the squared log-sum-exp of the logits (arXiv:2204.02311, section 5); 0 for none.
      remat: "layer" or "dots"; see `forward.REMAT`.
      assemble: how trained and frozen parameters make the model's.
      backend: as in `model.schema`.
      chunk: see `loss.token_losses`.

    Returns:
      (state, batch) -> (state, metrics). The batch has leading axes `[accumulation, devices]`; see `batch.stack`.
    """
    graph = model.schema(config, backend)

    def loss(trained: Any, frozen: Any, batch: TrainBatch, total: Array) -> tuple[Array, tuple[Array, Array]]:
        """One batch's share of the mean over all `total` learned tokens."""
        params = computing(assemble(trained, frozen), dtype)
        own = jax.tree.map(lambda x: x[0], batch)
        nll, lse = losses(graph, params, own, remat=remat, chunk=chunk)
        parts = (nll * own.weights).sum() / total, (lse**2 * own.weights).sum() / total
        return parts[0] + z_loss * parts[1], parts

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        learned = batch.weights.sum()
        share = functools.partial(loss, total=jnp.maximum(learned, 1.0))
        grads, (nll, z) = accumulate(jax.grad(share, has_aux=True), state.trained, state.frozen, batch)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax counts steps in int32
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = Metrics(nll, z_loss * z, optax.global_norm(grads), learned)
        return TrainState(state.step + 1, trained, state.frozen, optimizer_state), metrics

    return step


def accumulate(grad: Callable[..., Any], trained: Any, frozen: Any, batch: TrainBatch) -> Any:
    """The sum of `grad(trained, frozen, part)` over the batch's parts."""
    parts = batch.ids.shape[0]
    part = functools.partial(grad, trained, frozen)
    if parts == 1:
        return part(jax.tree.map(lambda x: x[0], batch))
    first = jax.eval_shape(part, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(lambda sums, one: (jax.tree.map(jnp.add, sums, part(one)), None), zeros, batch)[0]
