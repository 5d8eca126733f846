"""The text backbone: six times three gated delta nets and one full attention (transformers: models/qwen3_5).

Quirks: positions are plain 0, 1, 2, ... for images too, because 4.6 uses no spatial M-RoPE. The output head
is tied to the embedding table.
Glossary: T tokens, D width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from minicpmv46_jax.config import TextConfig
from minicpmv46_jax.model.batch import Batch
from minicpmv46_jax.model.layer_kinds import LAYER_KINDS
from minicpmv46_jax.model.layer_state import LayerState
from minicpmv46_jax.model.layers import Embedding, RMSNorm, SwiGLU, Taps, matmul_precision, tap
from minicpmv46_jax.model.state import Layers


class Block(nnx.Module):
    """One layer: a token mixer and an MLP, each behind a norm and around a residual."""

    def __init__(self, config: TextConfig, kind: str, *, backend: str | None = None, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = LAYER_KINDS[kind].mixer(config, backend=backend, rngs=rngs)
        self.mixer_scope = LAYER_KINDS[kind].scope
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, rngs=rngs)

    def __call__(
        self, x: Float[Array, "T D"], state: LayerState | None, batch: Batch
    ) -> tuple[Float[Array, "T D"], LayerState | None]:
        with jax.named_scope("input_norm"):
            h = self.input_norm(x)
        with jax.named_scope(self.mixer_scope):
            h, state = self.mixer(h, state, batch)
        x = x + h
        with jax.named_scope("mlp_norm"):
            h = self.mlp_norm(x)
        with jax.named_scope("mlp"):
            return x + self.mlp(h), state


class TextModel(nnx.Module):
    """Embeddings in, final hidden states out; `logits` applies the tied output head."""

    def __init__(self, config: TextConfig, *, backend: str | None = None, rngs: nnx.Rngs):
        self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Block(config, kind, backend=backend, rngs=rngs) for kind in config.layer_types])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self, x: Float[Array, "T D"], layers: Layers | None, batch: Batch, taps: Taps | None = None
    ) -> tuple[Float[Array, "T D"], Layers | None]:
        """Runs the layers over the tokens of one call.

        Args:
          x: token embeddings or image features.
          layers: the state before the tokens; None for batches of complete sequences, which keep no state.
          batch: the sequences of the tokens.
          taps: if given, receives each layer's output.

        Returns:
          The normalised hidden states, and the state after the tokens.
        """
        after = []
        for i, block in enumerate(self.layers):
            x, state = _run_block(*nnx.split(block), x, None if layers is None else layers[i], batch)
            after.append(state)
            tap(taps, f"text.layers.{i}", x)
        with jax.named_scope("norm"):
            return self.norm(x), None if layers is None else tuple(after)

    @jax.named_scope("logits")
    def logits(self, x: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Returns the score of every vocabulary entry, in float32."""
        table, precision = self.embed.weight[...], matmul_precision(x.dtype)
        return jnp.einsum("...d,vd->...v", x, table, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _run_block(
    graph: nnx.GraphDef, params: Any, x: Float[Array, "T D"], state: LayerState | None, batch: Batch
) -> tuple[Float[Array, "T D"], LayerState | None]:
    """Runs one block. Jitted, so that all layers of one kind are traced and lowered once."""
    return nnx.merge(graph, params)(x, state, batch)
