"""The whole model: its schema as one NNX module, and pure functions that run it on plain trees.

    graph = schema(config)                                                      # static: the modules
    params = checkpoint.load_params(folder, config)                             # nested dicts of arrays
    features = encode(graph.vision, params["vision"], packed_views)             # images, once
    logits, state = prefill(graph.text, params["text"], state, inputs, features)  # chunks of prompts
    logits, layers = decode_step(graph.text, params["text"], layers, token_ids, batch)  # a token per sequence

A Module never crosses `jit`, because flattening it costs much more per call than a plain tree. The functions
take a graph (bind it with functools.partial) and parameters, and merge them while tracing. Each function
takes only the parameters that it reads, because each array of an argument adds to the time of a call.
Glossary: T tokens, S sequences, B rows, R feature rows, D width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Key

from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.model.batch import DecodeBatch, FullBatch, PrefillBatch, scatter_index
from minicpmv46_jax.model.layers import Taps, tap
from minicpmv46_jax.model.packing import PackedViews
from minicpmv46_jax.model.state import Layers, TextState
from minicpmv46_jax.model.text import TextModel
from minicpmv46_jax.model.vision import VisionTower
from minicpmv46_jax.trees import tree_dataclass

Params = dict[str, Any]
Module = TypeVar("Module", bound=nnx.Module)


class MiniCPMV46(nnx.Module):
    """Vision tower and text backbone; defines names, shapes and initialisation of every parameter."""

    def __init__(self, config: ModelConfig, *, backend: str | None = None, rngs: nnx.Rngs):
        self.text = TextModel(config.text, backend=backend, rngs=rngs)
        self.vision = VisionTower(config.vision, config.text.hidden_size, backend=backend, rngs=rngs)


class Schema(NamedTuple):
    """Static graphs of the model's two parts, for `merge`."""

    text: nnx.GraphDef[TextModel]
    vision: nnx.GraphDef[VisionTower]


@tree_dataclass
class TokenBlock:
    """B whole sequences, padded to T tokens.

    Attributes:
      ids: token ids.
      feature_rows: the row of the image features that replaces a token's embedding; -1 for text tokens.
      num_valid: number of valid tokens at the start of each row.
    """

    ids: Int32[Array, "B T"]
    feature_rows: Int32[Array, "B T"]
    num_valid: Int32[Array, " B"]


@tree_dataclass
class PrefillInput:
    """Chunks of prompts, concatenated; `feature_rows` as in `TokenBlock`.

    A chunk may end at any token, inside an image too.
    """

    ids: Int32[Array, " T"]
    feature_rows: Int32[Array, " T"]
    batch: PrefillBatch


def schema(config: ModelConfig, backend: str | None = None) -> Schema:
    """Returns the model's graphs; allocates no parameter.

    `backend` selects the kernels of `kernels_pallas`: "reference", "hopper", "tpu", or None for the fastest
    that supports the device and the shapes.
    """
    module = _abstract_model(config, backend)
    return Schema(nnx.split(module.text)[0], nnx.split(module.vision)[0])


def parameter_shapes(config: ModelConfig) -> Params:
    """Returns every parameter's shape, as a plain tree of `jax.ShapeDtypeStruct` (float32)."""
    shapes = nnx.to_pure_dict(nnx.split(_abstract_model(config, None))[1])
    # Without the sharding of a mesh in use: the abstract module is made once, for all meshes.
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)


def init_params(config: ModelConfig, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> Params:
    """Returns randomly initialised parameters, as a plain tree.

    Not jitted: one program for the full-size model takes minutes to compile; op by op is fast.
    """
    params = nnx.to_pure_dict(nnx.split(MiniCPMV46(config, rngs=nnx.Rngs(seed)))[1])
    return jax.tree.map(lambda x: x.astype(dtype), params)


def merge(graph: nnx.GraphDef[Module], params: Params) -> Module:
    """Returns the module with these parameters; for use while tracing."""
    return nnx.merge(graph, params)


@functools.cache
def _abstract_model(config: ModelConfig, backend: str | None) -> MiniCPMV46:
    """Returns the module without allocated parameters; cached, because it takes half a second."""
    return nnx.eval_shape(lambda: MiniCPMV46(config, backend=backend, rngs=_SameKeyRngs(0)))


class _SameKeyRngs(nnx.Rngs):
    """Random keys for abstract evaluation: always the same key.

    nnx counts draws in a traced number, which makes each draw slower to trace than the last.
    """

    def params(self) -> Key[Array, ""]:
        return jax.random.key(0)


def encode(graph: nnx.GraphDef[VisionTower], params: Params, views: PackedViews, taps: Taps | None = None) -> Float[Array, "R D"]:
    """Encodes one pass of packed views with the vision tower.

    Returns the text embeddings of all views, one view after another; padding rows are at the end.
    """
    return merge(graph, params)(views, taps)


@jax.named_scope("embed")
def embed(
    table: Params, ids: Int32[Array, " T"], feature_rows: Int32[Array, " T"], features: Float[Array, "R D"]
) -> Float[Array, "T D"]:
    """Returns token embeddings, with image features in place of the placeholder tokens."""
    image_features = features[jnp.maximum(feature_rows, 0)]
    return jnp.where((feature_rows >= 0)[:, None], image_features, table["weight"][ids])


def prefill(
    graph: nnx.GraphDef[TextModel], params: Params, state: TextState, inputs: PrefillInput, features: Float[Array, "R D"]
) -> tuple[Float32[Array, "S V"], TextState]:
    """Runs the backbone over chunks of prompts.

    Returns the logits after each chunk's last token, and the state after the chunks.
    """
    text, batch = merge(graph, params), inputs.batch
    x = embed(params["embed"], inputs.ids, inputs.feature_rows, features)
    hidden, layers = text(x, state.layers, batch)
    last = jnp.clip(batch.query_starts + batch.query_lens - 1, 0, x.shape[0] - 1)
    slots = scatter_index(batch.slots, state.seq_lens.shape[0])
    block_tables = state.block_tables.at[slots].set(batch.block_tables, mode="drop")
    seq_lens = state.seq_lens.at[slots].set(batch.context_lens, mode="drop")
    return text.logits(hidden[last]), TextState(layers, block_tables, seq_lens)


def decode_step(
    graph: nnx.GraphDef[TextModel], params: Params, layers: Layers, token_ids: Int32[Array, " S"], batch: DecodeBatch
) -> tuple[Float32[Array, "S V"], Layers]:
    """Runs the backbone over one token of each sequence.

    Returns the logits after the token, and the layers' state.
    """
    text = merge(graph, params)
    with jax.named_scope("embed"):
        x = text.embed(token_ids)
    hidden, new_layers = text(x, layers, batch)
    assert new_layers is not None  # None only for `layers` = None
    return text.logits(hidden), new_layers


def forward(
    graph: Schema,
    params: Params,
    tokens: TokenBlock,
    features: Float[Array, "R D"],
    taps: Taps | None = None,
) -> Float32[Array, "B T V"]:
    """Computes logits at every token of whole sequences: the readable, cache-free forward. Differentiable.

    Args:
      graph, params: the whole model.
      tokens: whole sequences.
      features: image features from `encode`; any [1, D] array for prompts without images.
      taps: if given, receives the embeddings, every layer's output and the last hidden states, by name.
    """
    text = merge(graph.text, params["text"])
    B, T = tokens.ids.shape
    x = embed(params["text"]["embed"], tokens.ids.reshape(-1), tokens.feature_rows.reshape(-1), features)
    tap(taps, "text.embeddings", x)
    hidden, _ = text(x, None, FullBatch(tokens.num_valid), taps)
    tap(taps, "text.norm", hidden)
    return text.logits(hidden).reshape(B, T, -1)
