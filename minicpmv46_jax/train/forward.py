"""The model over packed rows, made to be differentiated: every layer forgets what is inside it and computes it again.

The text's layers repeat (three gated delta nets and an attention, six times): their parameters are stacked while tracing, and
scans run the groups and the equal layers inside, so that 24 layers compile as two. Stacking costs no pass of its own: the masters
are cast to the computing dtype in every step, and the copies written side by side. The tree stays by layer, as everywhere. What a
scan's layers keep is copied into arrays of all layers and out again, though: where much is kept, layers one by one run faster.

On a mesh a device has its shard of every large parameter; `Gather` makes it whole where it is used, inside the forgotten part,
so that a device holds one group's whole weights at a time, and the gradient comes back in shards.
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
from minicpmv46_jax.train.batch import TrainBatch
from minicpmv46_jax.train.loss import summed_loss

Path = tuple[str | int, ...]
Gather = Callable[[Any, Path], Any]  # the whole parameters of a part of the tree, from a device's shards of them
_keep = jax.checkpoint_policies
# What a layer keeps for the backward pass: all; the results of its products with weights; or nothing but its input. The last two
# keep what attention read, too: it costs most to read again.
REMAT = {
    "none": None,
    "dots": _keep.save_from_both_policies(_keep.dots_with_no_batch_dims_saveable, _keep.save_only_these_names(SAVE_NAME)),
    "layer": _keep.save_only_these_names(SAVE_NAME),
}


def loss(
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
    """The weighted sum of a batch's losses, which alone has a gradient; every token's negative log likelihood, and log-sum-exp.

    Args:
      graph: the model's; see `model.schema`.
      params: the whole model's, in the dtype to compute in (see `step.cast_for_compute`).
      batch: one device's rows and pictures.
      remat: one of `REMAT`.
      scan_layers: False compiles every layer by itself: minutes for the released sizes.
      gather: on a mesh, makes a part's parameters whole.
      z_loss, chunk: see `loss.summed_loss`.
    """
    table = gather(params["text"]["embed"], ("text", "embed"))
    features = jnp.zeros((1, table["weight"].shape[1]), table["weight"].dtype)
    if batch.views is not None:
        features = encode(graph.vision, params["vision"], batch.views, remat=remat, scan_layers=scan_layers, gather=gather)
    x = model.embed(table, batch.ids.reshape(-1), batch.feature_rows.reshape(-1), features)
    text = {"embed": table, "norm": gather(params["text"]["norm"], ("text", "norm")), "layers": params["text"]["layers"]}
    x = hidden_states(graph.text, text, x, PackedBatch(batch.segments), remat=remat, scan_layers=scan_layers, gather=gather)
    total, *found = summed_loss(x, table["weight"], batch.labels.reshape(-1), batch.weights.reshape(-1), z_loss, chunk)
    return total, *(value.reshape(batch.ids.shape) for value in found)


def hidden_states(
    graph: nnx.GraphDef,
    params: Params,
    x: Float[Array, "T D"],
    batch: PackedBatch,
    *,
    remat: str,
    scan_layers: bool = True,
    gather: Gather,
) -> Float[Array, "T D"]:
    """The text backbone's last hidden states, normalised."""
    text = model.merge(graph, params)
    kinds = [type(block.mixer) for block in text.layers]
    period = next(p for p in range(1, len(kinds) + 1) if len(kinds) % p == 0 and kinds == kinds[:p] * (len(kinds) // p))
    runs = [list(run) for _, run in itertools.groupby(range(period), key=kinds.__getitem__)]
    graphs = [nnx.split(text.layers[run[0]])[0] for run in runs]
    bundle = _stacked if scan_layers else list
    groups = [[bundle([params["layers"][at + i] for i in run]) for run in runs] for at in range(0, len(kinds), period)]

    def group(x: Array, shards: list[Any]) -> Array:
        for run, own, part in zip(runs, graphs, shards, strict=True):
            inside = functools.partial(_call, own, ("text", "layers", run[0]), gather)  # all layers of a run are sharded alike
            x = _repeat(_forgetting(lambda x, part, inside=inside: inside(part, x, None, batch)[0], remat), x, part, scan_layers)
        return x

    return text.norm(_repeat(group, x, bundle(groups), scan_layers))


def encode(
    graph: nnx.GraphDef, params: Params, views: PackedViews, *, remat: str, scan_layers: bool = True, gather: Gather
) -> Float[Array, "tokens E"]:
    """`model.encode`, each layer forgotten."""
    rest = {name: gather(part, ("vision", name)) for name, part in params.items() if name != "layers"}

    def run(first: int, blocks: list[nnx.Module], x: Array, attend: Callable[..., Array]) -> Array:
        if not blocks:
            return x
        inside = functools.partial(_call, nnx.split(blocks[0])[0], ("vision", "layers", first), gather)
        layer = _forgetting(lambda x, part: inside(part, x, attend), remat)
        parts = [params["layers"][first + i] for i in range(len(blocks))]
        return _repeat(layer, x, _stacked(parts) if scan_layers else parts, scan_layers)

    return model.merge(graph, {**rest, "layers": params["layers"]})(views, run=run)


def _forgetting(layer: Callable[[Array, Any], Array], remat: str) -> Callable[[Array, Any], Array]:
    return layer if remat == "none" else jax.checkpoint(layer, policy=REMAT[remat])


def _repeat(layer: Callable[[Array, Any], Array], x: Array, parts: Any, scan: bool) -> Array:
    """`x` through the layer with one part after the other: of a stack in a scan, or of a list."""
    if scan:
        return jax.lax.scan(lambda x, part: (layer(x, part), None), x, parts)[0]
    return functools.reduce(layer, parts, x)


def _call(graph: nnx.GraphDef, path: Path, gather: Gather, shards: Params, *inputs: Any) -> Any:
    return model.merge(graph, gather(shards, path))(*inputs)


def _stacked(layers: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
