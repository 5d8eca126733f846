"""The training forward over packed rows: the backward pass recomputes the inside of every layer.

The text's layers repeat: three gated delta nets and an attention, six times. Their parameters are stacked
while tracing. Scans run over the groups and over the equal layers of a group, so 24 layers compile as two.
The stacking adds no pass over memory: each step casts the masters to the computing dtype anyway and writes
the copies side by side. The parameter tree stays by layer. A scan copies the kept activations into arrays of
all layers and out again, so unrolled layers run faster where much is kept.

On a mesh, a device holds its shard of every large parameter. `Gather` all-gathers a layer's parameters where
they are used, inside the rematerialised part. A device therefore holds one group's whole weights at a time,
and gradients come back in shards.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from kernels_pallas.remat import SAVE_NAME
from minicpmv46_jax import model
from minicpmv46_jax.model import Params, Schema
from minicpmv46_jax.model.batch import PackedBatch
from minicpmv46_jax.model.packing import PackedViews
from minicpmv46_jax.model.text import TextModel
from minicpmv46_jax.model.vision import VisionTower
from minicpmv46_jax.train.batch import TrainBatch
from minicpmv46_jax.train.loss import summed_loss

Path = tuple[str | int, ...]
Gather = Callable[[Any, Path], Any]  # (a device's shards of a part of the tree, its path) -> whole parameters
_policies = jax.checkpoint_policies
_save_attention = _policies.save_only_these_names(SAVE_NAME)
# What a layer keeps for the backward pass: everything; the results of its products with weights; or only its
# input. The last two also keep attention's result, which costs most to recompute.
REMAT = {
    "none": None,
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _save_attention),
    "layer": _save_attention,
}


def batch_loss(
    graph: Schema,
    params: Params,
    batch: TrainBatch,
    *,
    remat: str = "layer",
    scan_layers: bool = True,
    gather: Gather = lambda part, path: part,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float32[Array, ""], Float32[Array, "R L"], Float32[Array, "R L"]]:
    """Computes the weighted sum of a batch's losses.

    Args:
      graph: the model's; see `model.schema`, whose `backend` also selects the kernels used here.
      params: the whole model's, in the computing dtype (see `step.cast_for_compute`).
      batch: one device's rows and pictures.
      remat: one of `REMAT`.
      scan_layers: False compiles every layer separately, which takes minutes for the released sizes.
      gather: on a mesh, gathers a part's parameters from their shards.
      z_loss, chunk: see `loss.summed_loss`.

    Returns:
      (the sum, each token's negative log likelihood, each token's log-sum-exp). Only the sum has a gradient.
    """
    table = gather(params["text"]["embed"], ("text", "embed"))
    features = jnp.zeros((1, table["weight"].shape[1]), table["weight"].dtype)
    if batch.views is not None:
        features = encode(graph.vision, params["vision"], batch.views, remat=remat, scan_layers=scan_layers, gather=gather)
    x = model.embed(table, batch.ids.reshape(-1), batch.feature_rows.reshape(-1), features)
    text = {"embed": table, "norm": gather(params["text"]["norm"], ("text", "norm")), "layers": params["text"]["layers"]}
    x = hidden_states(graph.text, text, x, PackedBatch(batch.segments), remat=remat, scan_layers=scan_layers, gather=gather)
    total, nll, lse = summed_loss(x, table["weight"], batch.labels.reshape(-1), batch.weights.reshape(-1), z_loss, chunk)
    return total, nll.reshape(batch.ids.shape), lse.reshape(batch.ids.shape)


def hidden_states(
    graph: nnx.GraphDef[TextModel],
    params: Params,
    x: Float[Array, "T D"],
    batch: PackedBatch,
    *,
    remat: str,
    scan_layers: bool = True,
    gather: Gather,
) -> Float[Array, "T D"]:
    """Returns the text backbone's last hidden states after the final norm."""
    text = model.merge(graph, params)
    kinds = [type(block.mixer) for block in text.layers]
    period = next(p for p in range(1, len(kinds) + 1) if len(kinds) % p == 0 and kinds == kinds[:p] * (len(kinds) // p))
    runs = [list(run) for _, run in itertools.groupby(range(period), key=kinds.__getitem__)]
    graphs = [nnx.split(text.layers[run[0]])[0] for run in runs]
    bundle = _stack_layers if scan_layers else list
    groups = [[bundle([params["layers"][at + i] for i in run]) for run in runs] for at in range(0, len(kinds), period)]

    def group(x: Array, shards: list[Any]) -> Array:
        for run, graph, part in zip(runs, graphs, shards, strict=True):
            block = functools.partial(_call, graph, ("text", "layers", run[0]), gather)  # all layers of a run are sharded alike
            layer = _rematerialized(lambda x, part, block=block: block(part, x, None, batch)[0], remat)
            x = _run_repeated(layer, x, part, scan_layers)
        return x

    return text.norm(_run_repeated(group, x, bundle(groups), scan_layers))


def encode(
    graph: nnx.GraphDef[VisionTower], params: Params, views: PackedViews, *, remat: str, scan_layers: bool = True, gather: Gather
) -> Float[Array, "tokens E"]:
    """Computes `model.encode` with each layer rematerialised."""
    rest = {name: gather(part, ("vision", name)) for name, part in params.items() if name != "layers"}

    def run(first: int, blocks: list[nnx.Module], x: Array, attend: Callable[..., Array]) -> Array:
        if not blocks:
            return x
        block = functools.partial(_call, nnx.split(blocks[0])[0], ("vision", "layers", first), gather)
        layer = _rematerialized(lambda x, part: block(part, x, attend), remat)
        parts = [params["layers"][first + i] for i in range(len(blocks))]
        return _run_repeated(layer, x, _stack_layers(parts) if scan_layers else parts, scan_layers)

    return model.merge(graph, {**rest, "layers": params["layers"]})(views, run=run)


def _rematerialized(layer: Callable[[Array, Any], Array], remat: str) -> Callable[[Array, Any], Array]:
    return layer if remat == "none" else jax.checkpoint(layer, policy=REMAT[remat])


def _run_repeated(layer: Callable[[Array, Any], Array], x: Array, parts: Any, scan: bool) -> Array:
    """Applies the layer to `x` once per part: a scan over stacked parts, or a loop over a list of parts."""
    if scan:
        return jax.lax.scan(lambda x, part: (layer(x, part), None), x, parts)[0]
    return functools.reduce(layer, parts, x)


def _call(graph: nnx.GraphDef, path: Path, gather: Gather, shards: Params, *inputs: Any) -> Any:
    return model.merge(graph, gather(shards, path))(*inputs)


def _stack_layers(layers: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
