"""The whole model: its schema as one NNX module, and the pure functions that run it on plain trees.

    graph = schema(config)                                              # static: which modules there are
    params = checkpoint.load_params(folder, config)                     # nested dicts of arrays
    features = encode(graph.vision, params["vision"], packed_views)     # pictures, once
    logits, state = prefill(graph.text, params["text"], state, pieces, features)  # pieces of prompts
    logits, layers = decode_step(graph.text, params["text"], layers, last, rows)      # one token of each sequence

A Module never crosses `jit`: the functions take a graph (bind it with functools.partial) and parameters, and merge them while
tracing; a Module as an argument costs 18.6 ms a call on the host, a plain tree 0.3 ms. Each function takes only the part it
reads: on an H200 a call with all 779 parameters took 1.8 ms to dispatch.
"""

import functools
from typing import Any, NamedTuple

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


class MiniCPMV46(nnx.Module):
    """Vision tower and text backbone; names, shapes and initialisation of every parameter."""

    def __init__(self, config: ModelConfig, *, backend: str | None = None, rngs: nnx.Rngs):
        self.text = TextModel(config.text, backend=backend, rngs=rngs)
        self.vision = VisionTower(config.vision, config.text.hidden_size, backend=backend, rngs=rngs)


class Schema(NamedTuple):
    """The static halves of the model's two parts, for `merge`."""

    text: nnx.GraphDef
    vision: nnx.GraphDef


@tree_dataclass
class TokenBlock:
    """B whole sequences, padded to T tokens; of each row the first `num_valid` are real.

    `feature_rows` is the row of the features that replaces a token's embedding, -1 where the token is a word.
    """

    ids: Int32[Array, "B T"]
    feature_rows: Int32[Array, "B T"]
    num_valid: Int32[Array, " B"]


@tree_dataclass
class PrefillInput:
    """Pieces of prompts in one row; `feature_rows` as in `TokenBlock`. A piece may end anywhere, inside a picture too."""

    ids: Int32[Array, " T"]
    feature_rows: Int32[Array, " T"]
    chunks: PrefillBatch


def schema(config: ModelConfig, backend: str | None = None) -> Schema:
    """Which modules the model has; built without allocating a parameter.

    `backend` selects the implementation of the operations of `kernels_pallas`: "reference", "hopper", "tpu", or None for the
    fastest that serves them.
    """
    module = _abstract(config, backend)
    return Schema(nnx.split(module.text)[0], nnx.split(module.vision)[0])


def parameter_shapes(config: ModelConfig) -> Params:
    """Every parameter's shape, as a plain tree of `jax.ShapeDtypeStruct` (float32)."""
    return nnx.to_pure_dict(nnx.split(_abstract(config, None))[1])


def init_params(config: ModelConfig, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> Params:
    """Freshly initialised parameters, as a plain tree.

    Not jitted: as one program the full-size model's took minutes to compile on an H200; op by op it compiles once a shape.
    """
    params = nnx.to_pure_dict(nnx.split(MiniCPMV46(config, rngs=nnx.Rngs(seed)))[1])
    return jax.tree.map(lambda x: x.astype(dtype), params)


def merge(graph: nnx.GraphDef, params: Params) -> nnx.Module:
    """The module over these parameters; call it while tracing."""
    return nnx.merge(graph, params)


@functools.cache
def _abstract(config: ModelConfig, backend: str | None) -> MiniCPMV46:
    """The module without a parameter allocated; made once, for it takes half a second."""
    return nnx.eval_shape(lambda: MiniCPMV46(config, backend=backend, rngs=_OneKey(0)))


class _OneKey(nnx.Rngs):
    """For shapes alone: draws one key. nnx counts draws in a traced number, each slower to trace than the last: 2.6 s in all."""

    def params(self) -> Key[Array, ""]:
        return jax.random.key(0)


def encode(graph: nnx.GraphDef, params: Params, views: PackedViews, taps: Taps | None = None) -> Float[Array, "R D"]:
    """The tower: text embeddings of one pass of packed views, in the order of the views; padding rows at the end."""
    return merge(graph, params)(views, taps)


def embed(
    table: Params, ids: Int32[Array, " T"], feature_rows: Int32[Array, " T"], features: Float[Array, "R D"]
) -> Float[Array, "T D"]:
    """Token embeddings, with picture features gathered into the places that hold them."""
    pictures = features[jnp.maximum(feature_rows, 0)]
    return jnp.where((feature_rows >= 0)[:, None], pictures, table["weight"][ids])


def prefill(
    graph: nnx.GraphDef, params: Params, state: TextState, pieces: PrefillInput, features: Float[Array, "R D"]
) -> tuple[Float32[Array, "S V"], TextState]:
    """The backbone over pieces of prompts: logits after each piece's last token, and the state after them."""
    text, chunks = merge(graph, params), pieces.chunks
    x = embed(params["embed"], pieces.ids, pieces.feature_rows, features)
    hidden, layers = text(x, state.layers, chunks)
    ends = jnp.clip(chunks.query_starts + chunks.query_lens - 1, 0, x.shape[0] - 1)
    slots = scatter_index(chunks.slots, state.seq_lens.shape[0])
    tables = state.block_tables.at[slots].set(chunks.block_tables, mode="drop")
    lengths = state.seq_lens.at[slots].set(chunks.context_lens, mode="drop")
    return text.logits(hidden[ends]), TextState(layers, tables, lengths)


def decode_step(
    graph: nnx.GraphDef, params: Params, layers: Layers, last: Int32[Array, " S"], rows: DecodeBatch
) -> tuple[Float32[Array, "S V"], Layers]:
    """The backbone over one token of each sequence: logits after it, and the layers' state."""
    text = merge(graph, params)
    hidden, layers = text(text.embed(last), layers, rows)
    return text.logits(hidden), layers


def forward(
    graph: Schema,
    params: Params,
    tokens: TokenBlock,
    features: Float[Array, "R D"],
    taps: Taps | None = None,
) -> Float32[Array, "B T V"]:
    """Logits at every token, from nothing: the readable, cache-free forward. Differentiable.

    Args:
      graph, params: the whole model.
      tokens: whole sequences.
      features: picture embeddings, as `encode` gives them; any [1, D] array where there is no picture.
      taps: if given, receives the embeddings, every layer's output and the last hidden states, by name.
    """
    text = merge(graph.text, params["text"])
    B, T = tokens.ids.shape
    x = embed(params["text"]["embed"], tokens.ids.reshape(-1), tokens.feature_rows.reshape(-1), features)
    tap(taps, "text.embeddings", x)
    hidden, _ = text(x, None, FullBatch(tokens.num_valid), taps)
    tap(taps, "text.norm", hidden)
    return text.logits(hidden).reshape(B, T, -1)
