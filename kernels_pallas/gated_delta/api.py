"""The two operations, one function each; `backend` selects the implementation.

Both take a layer's projections as they are: q, k and v before the convolution, and the gates before their
activations. A kernel can therefore fuse everything between the projections. The recurrent state is laid out
`[V, K]`: each row holds one value channel.
Glossary: S sequences or slots, T tokens, N value heads, K key width, V value width, C channels of q, k and v
together (2 x key heads x K + N x V), W conv width, history W - 1 earlier inputs, P snapshots.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.backends import HOPPER, REFERENCE, TPU, Implementation, dispatch
from kernels_pallas.gated_delta import gpu, reference, tpu
from kernels_pallas.gated_delta.arguments import ChunkedArguments
from kernels_pallas.gated_delta.packing import CHUNK


class Layer(NamedTuple):
    """Learned parameters of a layer, other than its projections.

    Attributes:
      conv: one causal filter per channel, oldest tap first; no bias.
      a_log: log of each head's decay rate.
      dt_bias: added to `a` before the softplus.
    """

    conv: Float[Array, "C W"]
    a_log: Float[Array, " N"]
    dt_bias: Float[Array, " N"]


class Chunked(NamedTuple):
    """Results of `chunked`.

    Attributes:
      out: each token's read in qkv's dtype, before the output norm; undefined for tokens of no sequence.
      recurrent_state, conv_state: states after each sequence's last token.
      snapshots, snapshot_conv_states: states after the requested chunks; zeros where a sequence has fewer.
    """

    out: Float[Array, "T N V"]
    recurrent_state: Float32[Array, "S N V K"]
    conv_state: Float[Array, "S history C"]
    snapshots: Float32[Array, "P N V K"]
    snapshot_conv_states: Float[Array, "P history C"]


def chunked(
    qkv: Float[Array, "T C"],
    a: Float[Array, "T N"],
    b: Float[Array, "T N"],
    layer: Layer,
    recurrent_state: Float32[Array, "S N V K"],
    conv_state: Float[Array, "S history C"],
    query_starts: Int32[Array, " S"],
    query_lens: Int32[Array, " S"],
    snapshots: Int32[Array, "P 2"] | None = None,
    *,
    backend: str | None = None,
) -> Chunked:
    """Applies the rule to many tokens of several sequences at once, for prefill and training.

    Args:
      qkv: queries, keys and values as projected, in one row of tokens.
      a, b: the gates as projected: decay `-exp(a_log) softplus(a + dt_bias)`, writing strength `sigmoid(b)`.
      layer: the layer's own parameters.
      recurrent_state: each sequence's state before its first token in this call.
      conv_state: the W - 1 rows of `qkv` before each sequence's first token in this call.
      query_starts, query_lens: sequence s has the tokens `query_starts[s] : query_starts[s] + query_lens[s]`.
        Sequences must not overlap; they may be empty.
      snapshots: pairs (sequence, chunks). Each requests that sequence's states after its first `chunks`
        chunks of 64 tokens.
      backend: "reference", "hopper", "tpu", or None for the fastest that supports these arguments here.

    Raises:
      ValueError: shapes do not match, there is no such backend, or it is for other devices.
      NotImplementedError: the backend does not support these arguments; the message names one that does.
    """
    _check(qkv.shape[-1], layer, recurrent_state, conv_state)
    snapshots = jnp.zeros((0, 2), jnp.int32) if snapshots is None else snapshots
    implementations = {
        REFERENCE: Implementation(reference.chunked),
        HOPPER: Implementation(gpu.chunked, gpu.unsupported_reason(qkv, layer.conv, recurrent_state)),
        TPU: Implementation(tpu.chunked, tpu.unsupported_reason(qkv, layer.conv, recurrent_state, conv_state)),
    }
    run = dispatch(backend, implementations)
    arguments = ChunkedArguments(qkv, a, b, *layer, recurrent_state, conv_state, query_starts, query_lens, snapshots)
    out, final_states, snapshot_states = run(arguments)
    sequence, tokens = snapshots[:, 0], snapshots[:, 1] * CHUNK
    is_taken = ((tokens > 0) & (tokens <= query_lens[sequence]))[:, None, None]
    taken_conv_states = _conv_states(qkv, conv_state[sequence], query_starts[sequence], tokens)
    snapshot_conv_states = jnp.where(is_taken, taken_conv_states, jnp.zeros((), conv_state.dtype))
    conv_states = _conv_states(qkv, conv_state, query_starts, query_lens)
    return Chunked(out, final_states, conv_states, snapshot_states, snapshot_conv_states)


def recurrent(
    qkv: Float[Array, "B T C"],
    a: Float[Array, "B T N"],
    b: Float[Array, "B T N"],
    z: Float[Array, "B T N V"],
    layer: Layer,
    norm: Float[Array, " V"],
    eps: float,
    recurrent_state: Float32[Array, "S N V K"],
    conv_state: Float[Array, "S history C"],
    slots: Int32[Array, " B"],
    keep: Int32[Array, " B"],
    *,
    backend: str | None = None,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "S N V K"], Float[Array, "S history C"]]:
    """Applies the rule and the gated output norm to a few tokens per sequence, for decode.

    Rows may hold draft tokens: all T tokens are read, but only the first `keep` update the states. To reject
    drafts, call with a smaller `keep`. To accept them later, pass the tokens again. Donated states are
    updated in place.

    Args:
      qkv, a, b, layer: as in `chunked`, for T tokens of each row.
      z: the output gate as projected.
      norm, eps: the output is `out / rms(out) * norm * silu(z)`, per head.
      recurrent_state, conv_state: states of all slots.
      slots: each row's slot, or -1 for a row that reads zeros and writes nothing. Slots must be distinct.
      keep: number of each row's tokens that update the states, 0 to T.
      backend: as in `chunked`.

    Returns:
      The normed outputs in z's dtype, and the recurrent and conv states of all slots.

    Raises:
      ValueError, NotImplementedError: as in `chunked`.
    """
    _check(qkv.shape[-1], layer, recurrent_state, conv_state)
    implementations = {
        REFERENCE: Implementation(reference.recurrent),
        HOPPER: Implementation(gpu.recurrent, gpu.unsupported_reason(qkv, layer.conv, recurrent_state)),
        TPU: Implementation(tpu.recurrent, tpu.step_unsupported_reason(qkv, layer.conv, recurrent_state, conv_state)),
    }
    run = dispatch(backend, implementations)
    return run(qkv, a, b, z, *layer, norm, eps, recurrent_state, conv_state, slots, keep)


def _check(C: int, layer: Layer, recurrent_state: Array, conv_state: Array) -> None:
    _, N, V, K = recurrent_state.shape
    keys, rest = divmod(C - N * V, 2 * K)
    if rest or keys < 1 or N % keys:
        raise ValueError(f"qkv has {C} channels, expected 2 x key heads x {K} + {N} x {V}, by recurrent_state's {(N, V, K)}")
    if layer.conv.shape[0] != C or conv_state.shape[1:] != (layer.conv.shape[1] - 1, C):
        raise ValueError(f"layer.conv is {layer.conv.shape} and conv_state {conv_state.shape}, and qkv has {C} channels")


def _conv_states(
    qkv: Float[Array, "T C"],
    conv_state: Float[Array, "S history C"],
    query_starts: Int32[Array, " S"],
    tokens: Int32[Array, " S"],
) -> Float[Array, "S history C"]:
    """Returns the last rows of `conv_state` followed by the sequence's first `tokens` rows of `qkv`."""
    history = conv_state.shape[1]
    offset = tokens[:, None] - history + jnp.arange(history, dtype=jnp.int32)[None]  # counted from the sequence's start
    new = qkv[jnp.clip(query_starts[:, None] + offset, 0, qkv.shape[0] - 1)].astype(conv_state.dtype)
    old = jnp.take_along_axis(conv_state, jnp.clip(offset + history, 0, history - 1)[..., None], axis=1)
    return jnp.where((offset >= 0)[..., None], new, old)
