"""The vision tower: SigLIP2 over packed views, with two mergers.

Source: transformers models/minicpmv4_6. Quirks: there is no class token and no pooling. Attention stays
inside each view. After layer `insert_layer_id` the window merger turns every 2x2 window into one token, with
the window's mean as residual ("16x"; "4x" skips it). The tower's MLPs and the window merger use the tanh
GELU, the final merger the exact one. The packer orders patches by blocks, which makes both merges reshapes.
Glossary: P rows (patches, later tokens), D width, N heads, H head width, I views, E text width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.packed_attention import packed_attention, window_attention
from minicpmv46_jax.config import VisionConfig
from minicpmv46_jax.model.layers import Embedding, LayerNorm, Linear, Taps, tap
from minicpmv46_jax.model.packing import PackedViews
from minicpmv46_jax.trees import tree_dataclass

WINDOW = 4  # a 2x2 window
FINAL_MERGER_EPS = 1e-6  # fixed in the reference, not a field of the checkpoint

tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
exact_gelu = functools.partial(jax.nn.gelu, approximate=False)


class VisionAttention(nnx.Module):
    """Multi-head attention with biases; `attend` (q, k, v) -> out decides which rows are visible."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        D = config.hidden_size
        self.q_proj = Linear(D, D, bias=True, rngs=rngs)
        self.k_proj = Linear(D, D, bias=True, rngs=rngs)
        self.v_proj = Linear(D, D, bias=True, rngs=rngs)
        self.out_proj = Linear(D, D, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "P D"], attend) -> Float[Array, "P D"]:
        q, k, v = (proj(x).reshape(x.shape[0], self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v).reshape(x.shape))


class VisionMLP(nnx.Module):
    """MLP of two linear layers around a tanh GELU."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "P D"]) -> Float[Array, "P D"]:
        return self.fc2(tanh_gelu(self.fc1(x)))


class VisionBlock(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = VisionAttention(config, rngs=rngs)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "P D"], attend) -> Float[Array, "P D"]:
        with jax.named_scope("norm1"):
            h = self.norm1(x)
        with jax.named_scope("attention"):
            x = x + self.attn(h, attend)
        with jax.named_scope("norm2"):
            h = self.norm2(x)
        with jax.named_scope("mlp"):
            return x + self.mlp(h)


class WindowMerger(nnx.Module):
    """Merger in the middle of the tower: attention inside each 2x2 window, then an MLP to one token."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.norm1 = LayerNorm(D, config.layer_norm_eps)
        self.attn = VisionAttention(config, rngs=rngs)
        self.pre_norm = LayerNorm(WINDOW * D, config.layer_norm_eps)
        self.linear_1 = Linear(WINDOW * D, WINDOW * F, bias=True, rngs=rngs)
        self.linear_2 = Linear(WINDOW * F, D, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "P D"], attend) -> Float[Array, "P/4 D"]:
        x = x + self.attn(self.norm1(x), attend)
        x = x.reshape(-1, WINDOW, x.shape[1])
        merged = self.linear_2(tanh_gelu(self.linear_1(self.pre_norm(x.reshape(x.shape[0], -1)))))
        return merged + x.mean(axis=1)


class FinalMerger(nnx.Module):
    """MLP that makes one text embedding of each 2x2 window of the tower's tokens."""

    def __init__(self, width: int, text_width: int, *, rngs: nnx.Rngs):
        merged = WINDOW * width
        self.pre_norm = LayerNorm(merged, FINAL_MERGER_EPS)
        self.linear_1 = Linear(merged, merged, bias=True, rngs=rngs)
        self.linear_2 = Linear(merged, text_width, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "P D"]) -> Float[Array, "P/4 E"]:
        x = self.pre_norm(x.reshape(x.shape[0] // WINDOW, -1))
        return self.linear_2(exact_gelu(self.linear_1(x)))


class VisionTower(nnx.Module):
    """Packed views in, text embeddings out.

    `backend` selects the kernels, as in `kernels_pallas.packed_attention`.
    """

    def __init__(self, config: VisionConfig, text_width: int, *, backend: str | None = None, rngs: nnx.Rngs):
        D = config.hidden_size
        self.insert_layer_id, self.backend = config.insert_layer_id, backend
        self.patch_embed = Linear(config.patch_dim, D, bias=True, rngs=rngs)
        self.position_embed = Embedding(config.positions_per_side**2, D, rngs=rngs)
        self.layers = nnx.List([VisionBlock(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.window_merger = WindowMerger(config, rngs=rngs)
        self.post_norm = LayerNorm(D, config.layer_norm_eps)
        self.merger = FinalMerger(D, text_width, rngs=rngs)

    def __call__(
        self, views: PackedViews, taps: Taps | None = None, run: Callable[..., Array] | None = None
    ) -> Float[Array, "tokens E"]:
        """Encodes one pass of packed views.

        Args:
          views: one pass, as `packing.pack` makes it.
          taps: if given, receives the embeddings and the outputs of each layer and of both mergers.
          run: (first, blocks, x, attend) -> x, called in place of running `blocks` one after another; `first`
            is the index of the first. Training uses it for rematerialisation.

        Returns:
          The tokens of all views, one view after another: P/16 rows in "16x", P/4 in "4x", padding last.
        """
        with jax.named_scope("patch_embed"):
            x = self.patch_embed(pixel_values(views).astype(self.patch_embed.weight.dtype))
            x = x + self.position_embed(views.position_ids)
        tap(taps, "vision.embeddings", x)
        run = run or functools.partial(_run_blocks, taps=taps)
        blocks, attend = list(self.layers), self.view_attention(views, 1)
        split = self.insert_layer_id + 1 if views.downsample_mode == "16x" else len(blocks)
        with jax.named_scope("layers"):
            x = run(0, blocks[:split], x, attend)
        if views.downsample_mode == "16x":
            with jax.named_scope("window_merger"):
                x = self.window_merger(x, functools.partial(window_attention, window=WINDOW, backend=self.backend))
            tap(taps, "vision.window_merger", x)
            with jax.named_scope("layers"):
                x = run(split, blocks[split:], x, self.view_attention(views, WINDOW))
        with jax.named_scope("post_norm"):
            x = self.post_norm(x)
        with jax.named_scope("merger"):
            features = self.merger(x)
        tap(taps, "vision.merger", features)
        return features

    def view_attention(self, views: PackedViews, patches_per_row: int) -> "ViewAttention":
        """Returns an attention inside each view, for rows that each stand for `patches_per_row` patches."""
        starts, lengths = views.view_starts // patches_per_row, views.view_lens // patches_per_row
        return ViewAttention(starts, lengths, views.max_view_len // patches_per_row, self.backend)


@tree_dataclass
class ViewAttention:
    """Attention inside each view; a pytree, so that it can be an argument of a jitted function."""

    view_starts: Int32[Array, " I"]
    view_lens: Int32[Array, " I"]
    max_view_len: int = dataclasses.field(metadata={"static": True})
    backend: str | None = dataclasses.field(metadata={"static": True})

    def __call__(self, q: Float[Array, "P N H"], k: Float[Array, "P N H"], v: Float[Array, "P N H"]) -> Float[Array, "P N H"]:
        views = self.view_starts, self.view_lens
        return packed_attention(q, k, v, *views, longest=self.max_view_len, backend=self.backend)


def _run_blocks(first: int, blocks: list[VisionBlock], x: Float[Array, "P D"], attend: ViewAttention, taps: Taps | None) -> Array:
    for i, block in enumerate(blocks, start=first):
        x = _run_block(*nnx.split(block), x, attend)
        tap(taps, f"vision.layers.{i}", x)
    return x


@functools.partial(jax.jit, static_argnums=0)
def _run_block(graph: nnx.GraphDef, params: Any, x: Float[Array, "P D"], attend: ViewAttention) -> Float[Array, "P D"]:
    """Runs one block. Jitted, so that all layers share one trace and one lowering of the kernels."""
    return nnx.merge(graph, params)(x, attend)


def pixel_values(views: PackedViews) -> Float32[Array, "P patch_dim"]:
    """Returns the normalised values of the patches' bytes.

    They equal `processing.View.pixel_values` up to the last digit of float32.
    """
    P, channels = views.scale.shape
    values = jnp.asarray(views.patches).reshape(P, channels, -1).astype(jnp.float32)
    return (values * views.scale[..., None] + views.offset[..., None]).reshape(P, -1)
