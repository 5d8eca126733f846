"""The two operations, each one function; `backend` says who runs it.

Both take what a layer's projections give (q, k and v before the convolution, the gates before their functions), so that a kernel
may fuse everything between the projections. The memory is kept as `[V, K]`: a row is what one value channel remembers.
Glossary: S sequences or slots, T tokens, N value heads, K key width, V value width, C channels of q, k and v together
(2 x key heads x K + N x V), W conv width, P snapshots.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.backends import REFERENCE, choose
from kernels_pallas.gated_delta import gpu, reference, tpu
from kernels_pallas.gated_delta.packing import CHUNK


class Layer(NamedTuple):
    """What a layer learned, next to its projections.

    Attributes:
      conv: one causal filter a channel, oldest tap first; no bias.
      a_log: log of each head's decay rate.
      dt_bias: added to `a` before the softplus.
    """

    conv: Float[Array, "C W"]
    a_log: Float[Array, " N"]
    dt_bias: Float[Array, " N"]


class Chunked(NamedTuple):
    """What `chunked` returns."""

    out: Float[Array, "T N V"]
    recurrent_state: Float32[Array, "S N V K"]
    conv_state: Float[Array, "S tail C"]
    snapshots: Float32[Array, "P N V K"]
    snapshot_conv_states: Float[Array, "P tail C"]


def chunked(
    qkv: Float[Array, "T C"],
    a: Float[Array, "T N"],
    b: Float[Array, "T N"],
    layer: Layer,
    recurrent_state: Float32[Array, "S N V K"],
    conv_state: Float[Array, "S tail C"],
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
    snapshots: Int32[Array, "P 2"] | None = None,
    *,
    backend: str | None = None,
) -> Chunked:
    """Many tokens of several sequences at once: prefill and training.

    Args:
      qkv: queries, keys and values as projected, in one row of tokens.
      a, b: the gates as projected: decay `-exp(a_log) softplus(a + dt_bias)`, writing strength `sigmoid(b)`.
      layer: the layer's own parameters.
      recurrent_state: each sequence's memory before its first token here.
      conv_state: the W - 1 rows of `qkv` before each sequence's first token here.
      starts, lengths: sequence s is the tokens `starts[s] : starts[s] + lengths[s]`. They must not overlap; they may be empty.
      snapshots: (sequence, chunks): return that sequence's memory and tail after its first `chunks` chunks of 64 as well.
      backend: "reference", "gpu", "tpu", or None for the fastest that serves these arguments here.

    Returns:
      What each token reads, in qkv's dtype, before the output norm; anything at all for tokens of no sequence. Memory and tail
      after each sequence's last token. Snapshots; zeros where a sequence has fewer whole chunks than asked for.

    Raises:
      ValueError, NotImplementedError: the backend does not serve these arguments; the message names one that does.
    """
    _check(qkv.shape[-1], layer, recurrent_state, conv_state)
    snapshots = jnp.zeros((0, 2), jnp.int32) if snapshots is None else snapshots
    gaps = {
        REFERENCE: None,
        "gpu": gpu.gap(qkv, layer.conv, recurrent_state),
        "tpu": tpu.gap(qkv, layer.conv, recurrent_state, conv_state),
    }
    run = {REFERENCE: reference.chunked, "gpu": gpu.chunked, "tpu": tpu.chunked}[choose(backend, gaps)]
    out, ends, kept = run(qkv, a, b, *layer, recurrent_state, conv_state, starts, lengths, snapshots)
    sequence, tokens = snapshots[:, 0], snapshots[:, 1] * CHUNK
    whole = (tokens > 0) & (tokens <= lengths[sequence])
    kept_tails = jnp.where(
        whole[:, None, None], _conv_states(qkv, conv_state[sequence], starts[sequence], tokens), jnp.zeros((), conv_state.dtype)
    )
    return Chunked(out, ends, _conv_states(qkv, conv_state, starts, lengths), kept, kept_tails)


def recurrent(
    qkv: Float[Array, "B T C"],
    a: Float[Array, "B T N"],
    b: Float[Array, "B T N"],
    z: Float[Array, "B T N V"],
    layer: Layer,
    norm: Float[Array, " V"],
    eps: float,
    recurrent_state: Float32[Array, "S N V K"],
    conv_state: Float[Array, "S tail C"],
    slots: Int32[Array, " B"],
    keep: Int32[Array, " B"],
    *,
    backend: str | None = None,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "S N V K"], Float[Array, "S tail C"]]:
    """A few tokens of each of many sequences: decoding, up to the gated output norm.

    Rows may be drafts: all T tokens are read, but only the first `keep` are remembered. To take back what a draft wrote, call
    with `keep` short of it; to accept it later, give its tokens again. Donate memory and tail, and they are updated in place.

    Args:
      qkv, a, b, layer: as in `chunked`, for T tokens of each row.
      z: the output gate as projected.
      norm, eps: the output is `out / rms(out) * norm * silu(z)`, per head.
      recurrent_state, conv_state: of all slots.
      slots: each row's slot, or -1: such a row reads zeros and writes nothing. No slot may stand in two rows.
      keep: of each row's tokens, how many leave their mark on memory and tail; 0 to T.
      backend: as in `chunked`.

    Returns:
      The normed outputs in z's dtype, and memory and tail of all slots.

    Raises:
      ValueError, NotImplementedError: as in `chunked`.
    """
    _check(qkv.shape[-1], layer, recurrent_state, conv_state)
    gaps = {
        REFERENCE: None,
        "gpu": gpu.gap(qkv, layer.conv, recurrent_state),
        "tpu": tpu.step_gap(qkv, layer.conv, recurrent_state, conv_state),
    }
    run = {REFERENCE: reference.recurrent, "gpu": gpu.recurrent, "tpu": tpu.recurrent}[choose(backend, gaps)]
    return run(qkv, a, b, z, *layer, norm, eps, recurrent_state, conv_state, slots, keep)


def _check(C: int, layer: Layer, recurrent_state: Array, conv_state: Array) -> None:
    _, N, V, K = recurrent_state.shape
    keys, rest = divmod(C - N * V, 2 * K)
    if rest or keys < 1 or N % keys:
        raise ValueError(f"qkv has {C} channels, expected 2 x key heads x {K} + {N} x {V}, by memory's {(N, V, K)}")
    if layer.conv.shape[0] != C or conv_state.shape[1:] != (layer.conv.shape[1] - 1, C):
        raise ValueError(f"layer.conv is {layer.conv.shape} and tail {conv_state.shape}, and qkv has {C} channels")


def _conv_states(
    qkv: Float[Array, "T C"], conv_state: Float[Array, "S tail C"], starts: Int32[Array, " S"], tokens: Int32[Array, " S"]
) -> Float[Array, "S tail C"]:
    """The last rows of `conv_state` followed by the sequence's first `tokens` rows of `qkv`."""
    inputs = conv_state.shape[1]
    back = tokens[:, None] - inputs + jnp.arange(inputs, dtype=jnp.int32)[None]  # counted from the sequence's start
    new = qkv[jnp.clip(starts[:, None] + back, 0, qkv.shape[0] - 1)].astype(conv_state.dtype)
    old = jnp.take_along_axis(conv_state, jnp.clip(back + inputs, 0, inputs - 1)[..., None], axis=1)
    return jnp.where((back >= 0)[..., None], new, old)
