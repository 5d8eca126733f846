"""The gated delta rule for training: rows of equal length, each packed with several sequences.

States start at zero and are not returned. `api.chunked` cuts every sequence from its own start. Here one grid
of chunks covers all rows, and masks separate the sequences inside a chunk. Nothing is gathered, so rows are
an ordinary batch that jit may shard over devices. Only the scan of the state, two products per chunk, is
sequential. Everything is matrix products and differentiable.
Source: arXiv:2412.06464, section 3.3. State, gates and sums are float32; factors of products have the inputs'
dtype.
Glossary: R rows, T tokens of a row, C channels, c chunks, L tokens of a chunk, N value heads, K key width, V
value width.
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Float32, Int32

from kernels_pallas.backends import HOPPER, REFERENCE, Implementation, dispatch
from kernels_pallas.gated_delta import gpu_convolve, gpu_packed
from kernels_pallas.gated_delta.api import Layer
from kernels_pallas.gated_delta.packing import CHUNK
from kernels_pallas.gated_delta.reference import gates, heads

SMALL = 8  # blocks up to this size are multiplied entry by entry, which is faster on a GPU than 100,000 products


def packed(
    qkv: Float[Array, "R T C"],
    a: Float[Array, "R T N"],
    b: Float[Array, "R T N"],
    layer: Layer,
    segments: Int32[Array, "R T"],
    key_width: int,
    value_width: int,
    *,
    backend: str | None = None,
) -> Float[Array, "R T N V"]:
    """Returns each token's read of its own sequence's state, before the output norm.

    Args:
      qkv, a, b, layer: as in `chunked`.
      segments: each token's sequence within its row; a sequence's tokens are contiguous. T must be a
        multiple of 64.
      key_width, value_width: K and V.
      backend: "reference", or "hopper"; None for the fastest that supports these arguments on this device.

    Returns:
      The reads, in qkv's dtype.

    Raises:
      ValueError: T is not a multiple of 64, or the backend is for other devices.
      NotImplementedError: the backend does not support these arguments.
    """
    N = a.shape[-1]
    if (T := a.shape[1]) % CHUNK:
        raise ValueError(f"rows have {T} tokens, and packed rows are a multiple of {CHUNK} long")
    g, beta = gates(a, b, layer.a_log, layer.dt_bias)

    def in_xla() -> Array:
        channels = convolve_segments(qkv, layer.conv, segments)
        return rule(channels, g, beta, segments, key_width=key_width, value_width=value_width)

    def on_hopper() -> Array:
        return gpu_packed.rule(gpu_convolve.convolve(qkv, layer.conv, segments), g, beta, segments)

    reason = gpu_packed.unsupported_reason(qkv, layer.conv, N, key_width, value_width)
    return dispatch(backend, {REFERENCE: Implementation(in_xla), HOPPER: Implementation(on_hopper, reason)})()


def rule(
    channels: Float[Array, "R T C"],
    g: Float32[Array, "R T N"],
    beta: Float32[Array, "R T N"],
    segments: Int32[Array, "R T"],
    *,
    key_width: int,
    value_width: int,
) -> Float[Array, "R T N V"]:
    """Computes `gpu_packed.rule` in plain XLA, for any widths."""
    (R, T, N), dtype = g.shape, channels.dtype
    q, k, v = (x.astype(dtype) for x in heads(channels, N, key_width, value_width))
    q, k, v, g, beta = (_to_chunks(x) for x in (q, k, v, g, beta))  # [R, c, N, L, ...]
    read = _chunk_outputs(q, k, v, g, beta, segments.reshape(R, -1, CHUNK), dtype)
    return jnp.moveaxis(read, 2, 3).reshape(R, T, N, value_width).astype(dtype)


def convolve_segments(
    qkv: Float[Array, "R T C"], conv: Float[Array, "C W"], segments: Int32[Array, "R T"]
) -> Float[Array, "R T C"]:
    """Applies the depthwise causal convolution inside each sequence, oldest tap first, then SiLU.

    The arithmetic is float32; the result has qkv's dtype.
    """
    W, T = conv.shape[1], qkv.shape[1]
    taps = conv.astype(jnp.float32)
    out = qkv.astype(jnp.float32) * taps[:, -1][None, None]
    for back in range(1, W):
        shifted = jnp.pad(qkv, ((0, 0), (back, 0), (0, 0)))[:, :T]
        same = jnp.pad(segments, ((0, 0), (back, 0)), constant_values=-1)[:, :T] == segments
        out += jnp.where(same[..., None], shifted.astype(jnp.float32) * taps[:, W - 1 - back][None, None], 0.0)
    return jax.nn.silu(out).astype(qkv.dtype)


def _chunk_outputs(
    q: Float[Array, "R c N L K"],
    k: Float[Array, "R c N L K"],
    v: Float[Array, "R c N L V"],
    g: Float32[Array, "R c N L"],
    beta: Float32[Array, "R c N L"],
    segments: Int32[Array, "R c L"],
    dtype: jnp.dtype,
) -> Float32[Array, "R c N L V"]:
    decay = jnp.cumsum(g, axis=-1)  # log of the decay from the chunk's start to each token
    # The sequence that owns the state before each chunk.
    incoming = jnp.pad(segments[:, :-1, -1], ((0, 0), (1, 0)), constant_values=-1)[..., None]
    is_incoming = (segments == incoming)[:, :, None]  # [R, c, 1, L]
    is_outgoing = (segments == segments[..., -1:])[:, :, None]
    same = (segments[..., :, None] == segments[..., None, :])[:, :, None]
    between = jnp.exp(jnp.where(same & _earlier(), decay[..., :, None] - decay[..., None, :], -jnp.inf))
    # The diagonal is the constant 1, not a function of the decay. As exp(0) it would give the decay two
    # large, equal gradients. Their difference is rounding error: 1e-3 in float32 for a quickly decaying head.
    overlap_decay, between = between, jnp.where(jnp.eye(CHUNK, dtype=bool)[None, None, None], 1.0, between)

    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))  # upcast here, because they are stored in the inputs' dtype
    k_beta = k * beta[..., None]
    overlap = _dot("rcnik,rcnjk->rcnij", k_beta, k, dtype) * overlap_decay
    right = jnp.concatenate([v * beta[..., None], k_beta * jnp.where(is_incoming, jnp.exp(decay), 0.0)[..., None]], axis=-1)
    inverse, width = unit_lower_inverse(overlap), v.shape[-1]
    writes = _dot("rcnij,rcnjv->rcnvi", inverse, right[..., :width], dtype)
    reads = _dot("rcnij,rcnjk->rcnik", inverse, right[..., width:], dtype)
    attention = _dot("rcnik,rcnjk->rcnij", q, k, dtype) * between
    q_decayed = q * jnp.where(is_incoming, jnp.exp(decay), 0.0)[..., None]
    k_decayed = k * jnp.where(is_outgoing, jnp.exp(decay[..., -1:] - decay), 0.0)[..., None]
    fade = jnp.where(is_incoming[..., -1], jnp.exp(decay[..., -1]), 0.0)

    states, new = scan_states(*(x.astype(dtype) for x in (writes, reads, k_decayed)), fade)
    return _dot("rcnlk,rcnvk->rcnlv", q_decayed, states, dtype) + _dot("rcnij,rcnvj->rcniv", attention, new, dtype)


def scan_states(
    writes: Float[Array, "R c N V L"],
    reads: Float[Array, "R c N L K"],
    keys: Float[Array, "R c N L K"],
    fade: Float32[Array, "R c N"],
) -> tuple[Float[Array, "R c N V K"], Float[Array, "R c N V L"]]:
    """Scans over the chunks. Returns the state before each chunk and each token's write to the state."""
    (R, _, N, V, _), dtype = writes.shape, writes.dtype

    def chunk(state, terms):
        write, read, key, fade = terms
        new = write.astype(jnp.float32) - _dot("rnvk,rnlk->rnvl", state, read, dtype)
        return state * fade[..., None, None] + _dot("rnvl,rnlk->rnvk", new, key, dtype), (state, new)

    terms = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (writes, reads, keys, fade))
    _, (states, new) = jax.lax.scan(chunk, jnp.zeros((R, N, V, reads.shape[-1])), terms)
    return jnp.moveaxis(states, 0, 1), jnp.moveaxis(new, 0, 1)


@jax.custom_vjp
def unit_lower_inverse(a: Float32[Array, "*batch L L"]) -> Float32[Array, "*batch L L"]:
    """Returns (I + a)^-1 for strictly lower triangular `a`, L a power of two.

    Diagonal blocks are inverted two by two, from single entries up. This takes matrix products only, and is
    as stable as substitution. The product over powers of `a` is not: with equal keys its terms reach 1e17 and
    cancel. The upper half of `a` is not read.
    """
    L = a.shape[-1]
    inverse = jnp.ones_like(a[..., :1]).reshape(*a.shape[:-1], 1, 1)  # [..., blocks, size, size]
    size = 1
    while size < L:
        pairs = L // (2 * size)
        corners = a.reshape(*a.shape[:-2], pairs, 2 * size, pairs, 2 * size)[..., size:, :, :size]
        same = jnp.eye(pairs, dtype=bool).reshape(*[1] * (a.ndim - 2), pairs, 1, pairs, 1)
        upper, lower = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        corner = -_exact(_exact(lower, jnp.where(same, corners, 0.0).sum(axis=-2)), upper)
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]


def _inverse_fwd(a: Float32[Array, "*batch L L"]) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _inverse_bwd(inverse: Float32[Array, "*batch L L"], d_inverse: Float32[Array, "*batch L L"]) -> tuple[Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (jnp.tril(-_exact(_exact(transposed, d_inverse), transposed), -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)


def _exact(a: Float32[Array, "*batch i j"], b: Float32[Array, "*batch j k"]) -> Float32[Array, "*batch i k"]:
    if b.shape[-1] <= SMALL:
        return (a[..., None] * b[..., None, :, :]).sum(axis=-2)
    return jnp.matmul(a, b, precision=Precision.HIGHEST)


def _dot(equation: str, x: Array, y: Array, dtype: jnp.dtype) -> Float32[Array, "..."]:
    """Returns a product of factors in `dtype`, summed in float32."""
    precision = Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _earlier() -> Bool[Array, "1 1 1 L L"]:
    return jnp.tril(jnp.ones((1, 1, 1, CHUNK, CHUNK), bool), -1)


def _to_chunks(x: Float[Array, "R T N ..."]) -> Float[Array, "R c N L ..."]:
    return jnp.moveaxis(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), 3, 2)
