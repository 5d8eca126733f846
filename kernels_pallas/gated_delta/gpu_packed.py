"""Per-chunk kernels of `packed` for Hopper, forward and backward, around `gpu_state_scan`.

Let i, j be a chunk's tokens, D the log of the decay from the chunk's start, beta the writing strengths, and q
and k normalised. Let e = exp(D) where a token's sequence owns the incoming state S, else 0. Let x = exp(D_L -
D) where a token's sequence owns the state after the chunk, else 0. Then

    A_ij = beta_i (k_i k_j) exp(D_i - D_j), i > j,      M = (I + A)^-1,
    P_ij = (q_i k_j) exp(D_i - D_j), i >= j,
    U = M beta v,   W = M beta e k,   Q = e q,   X = x k.

In the backward pass, n is the tokens' writes to S, d the cotangent of n, o that of the output, and G that of
the state after the chunk. One product with M' (the transpose) passes through the system. The gradient of A
needs only n, because n = M r with r = beta (v - e S k):

    dr = M' d,   dA = -dr n' (i > j),   dP = o n' (i >= j),   dv = beta dr,
    dq = dP~ k + e o S,   dk = dA~ k + dA~' k + dP~' q - beta e dr S + x n G,

where ~ multiplies by the factors that turn products of keys and queries into A and P.
Glossary: B chunks of all rows, N heads, L tokens of a chunk, K key width, V value width, C channels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from kernels_pallas.backends import mosaic_unsupported_reason
from kernels_pallas.gated_delta.gpu_chunked import inverse_norm, invert, store_global, store_shared
from kernels_pallas.gated_delta.gpu_convolve import TAPS
from kernels_pallas.gated_delta.gpu_state_scan import scan_states, scan_states_backward
from kernels_pallas.gated_delta.packing import CHUNK
from kernels_pallas.gpu.mosaic import (
    COL,
    ROW,
    TRANSPOSE,
    accumulate,
    along_columns,
    along_rows,
    iota,
    load,
    params,
    product,
    tiles,
)

L = CHUNK
WIDTH = 128  # of keys and of values


def unsupported_reason(qkv: jax.Array, conv: jax.Array, heads: int, key_width: int, value_width: int) -> str | None:
    """Returns why the kernels do not support these arguments of `packed`, or None."""
    if (key_width, value_width) != (WIDTH, WIDTH):
        return f"heads have {key_width} keys and {value_width} values, and it takes {WIDTH} and {WIDTH}"
    if qkv.shape[-1] != 3 * heads * WIDTH:
        return f"qkv has {qkv.shape[-1]} channels, and it takes {3 * heads * WIDTH}: as many key heads as value heads"
    if conv.shape[1] != TAPS:
        return f"layer.conv has {conv.shape[1]} taps, and it takes {TAPS}"
    if qkv.dtype != jnp.bfloat16:
        return f"qkv is {qkv.dtype}, and it takes bfloat16"
    return mosaic_unsupported_reason()


class ChunkSegments(NamedTuple):
    """Sequences of a chunk's tokens and of its incoming state.

    Attributes:
      segment: each token's sequence.
      incoming: sequence of the state before the chunk; -1 at a row's first chunk.
    """

    segment: Int32[Array, "B L"]
    incoming: Int32[Array, " B"]


class PreparedChunks(NamedTuple):
    """Each chunk's solved system, as `gpu_state_scan` takes it, and the inverse for the backward pass."""

    writes: BFloat16[Array, "B N V L"]
    reads: BFloat16[Array, "B N L K"]
    queries: BFloat16[Array, "B N L K"]
    keys: BFloat16[Array, "B N L K"]
    attention: BFloat16[Array, "B N L L"]
    inverse: BFloat16[Array, "B N L L"]


class BackwardTerms(NamedTuple):
    """Per-chunk results of both scans that `gradients` needs.

    Attributes:
      inverse: each system's inverse.
      states, d_states: the state before each chunk, and the cotangent of the state after it.
      new, d_new: each token's write to the state, and its cotangent.
    """

    inverse: BFloat16[Array, "B N L L"]
    states: BFloat16[Array, "B N V K"]
    d_states: BFloat16[Array, "B N V K"]
    new: BFloat16[Array, "B N V L"]
    d_new: BFloat16[Array, "B N V L"]


@jax.custom_vjp
def rule(
    channels: BFloat16[Array, "R T C"],
    g: Float32[Array, "R T N"],
    beta: Float32[Array, "R T N"],
    segments: Int32[Array, "R T"],
) -> BFloat16[Array, "R T N V"]:
    """Returns each token's read of its own sequence's state.

    Args:
      channels: queries, keys and values after convolution and SiLU, not normalised.
      g, beta: log decay and writing strength.
      segments: as in `packed`.
    """
    return _rule_fwd(channels, g, beta, segments)[0]


def _rule_fwd(channels: Array, g: Array, beta: Array, segments: Array) -> tuple[Array, Any]:
    R, T, N = g.shape
    inputs = channels.reshape(R * T, -1), _by_head(g), _by_head(beta), _chunk_segments(segments)
    prepared = prepare(*inputs)
    fade = _fade(inputs[1], inputs[3]).T.reshape(R, -1, N)
    by_row = [x.reshape(R, -1, *x.shape[1:]) for x in prepared]
    out, states, new = scan_states(*by_row[:5], fade)
    return out.reshape(R, T, N, WIDTH), (inputs, by_row, fade, states, new)


def _rule_bwd(saved: Any, d_out: Array) -> tuple[Array | None, ...]:
    (channels, g, beta, chunk_segments), (_, *rest, inverse), fade, states, new = saved
    R, T, N, V = d_out.shape
    d_out = d_out.reshape(R, T, N * V)
    d_states, d_new = scan_states_backward(d_out, *rest, fade)
    flat_d_out = d_out.reshape(R * T, -1)
    terms = BackwardTerms(*(x.reshape(-1, *x.shape[2:]) for x in (inverse, states, d_states, new, d_new)))
    d_channels, d_beta, shares, d_fade = gradients(channels, flat_d_out, g, beta, chunk_segments, terms)
    # The decay over the whole chunk fades the incoming state, so every token of it gets the same summand.
    d_g = shares.sum(axis=0) + (_fade(g, chunk_segments) * d_fade.sum(axis=-1))[..., None]
    return d_channels.reshape(R, T, -1), *(x.reshape(N, R, T).transpose(1, 2, 0) for x in (d_g, d_beta)), None


rule.defvjp(_rule_fwd, _rule_bwd)


def _by_head(x: Float32[Array, "R T N"]) -> Float32[Array, "N B L"]:
    return x.reshape(-1, L, x.shape[-1]).transpose(2, 0, 1)


def _chunk_segments(segments: Int32[Array, "R T"]) -> ChunkSegments:
    chunks = segments.reshape(segments.shape[0], -1, L)
    before = jnp.pad(chunks[:, :-1, -1], ((0, 0), (1, 0)), constant_values=-1)
    return ChunkSegments(chunks.reshape(-1, L), before.reshape(-1))


def _fade(g: Float32[Array, "N B L"], chunk_segments: ChunkSegments) -> Float32[Array, "N B"]:
    """Returns the decay of the incoming state over a chunk; 0 if another sequence owns the chunk's end."""
    return jnp.where((chunk_segments.segment[:, -1] == chunk_segments.incoming)[None], jnp.exp(g.sum(axis=-1)), 0.0)


def prepare(
    channels: BFloat16[Array, "RT C"], g: Float32[Array, "N B L"], beta: Float32[Array, "N B L"], chunk_segments: ChunkSegments
) -> PreparedChunks:
    """Solves every chunk's system."""
    N, B, _ = g.shape
    shapes = PreparedChunks((WIDTH, L), (L, WIDTH), (L, WIDTH), (L, WIDTH), (L, L), (L, L))
    kernel = plgpu.kernel(
        functools.partial(_prepare, N=N),
        out_type=PreparedChunks(*(jax.ShapeDtypeStruct((B, N, *shape), channels.dtype) for shape in shapes)),
        grid=(B, N),
        grid_names=("chunk", "head"),
        scratch_types=[
            *(tiles(L, WIDTH), tiles(L, WIDTH), tiles(L, WIDTH)),  # q, k, v
            *(tiles(WIDTH, L), tiles(L, WIDTH), tiles(L, L), tiles(L, L)),
            plgpu.SMEM((2, L), jnp.float32),  # vectors, to change from ROW to COL layout
            plgpu.Barrier(num_arrivals=3),
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_prepare",
    )
    return kernel(channels, g, beta, *chunk_segments)


class _Factors(NamedTuple):
    """Factors of one chunk and head, in registers.

    Vectors have ROW layout, except those named `_col`.
    """

    q_norm: Any
    k_norm: Any
    k_norm_col: Any
    incoming: Any  # e
    outgoing: Any  # x
    between: Any  # exp(D_i - D_j) within a sequence, 0 elsewhere
    i: Any
    j: Any


def _factors(g, segment, incoming_segment, q_s, k_s, vectors_s, head, chunk):
    i, j = iota((L, L), 0), iota((L, L), 1)
    g_col = along_columns(load(g.at[head, chunk], COL), L)
    decay = jnp.sum(jnp.where(i >= j, g_col, 0.0), axis=1)  # a cumulative sum
    rest = jnp.sum(jnp.where(i < j, g_col, 0.0), axis=1)  # from each token to the chunk's end
    own, own_col = (load(segment.at[chunk], layout) for layout in (ROW, COL))
    k_norm, q_norm = inverse_norm(k_s), None if q_s is None else inverse_norm(q_s) * WIDTH**-0.5
    vectors_s[0], vectors_s[1] = k_norm, decay
    k_norm_col, decay_col = (load(vectors_s.at[n], COL) for n in range(2))
    between = jnp.exp(jnp.minimum(along_rows(decay, L) - along_columns(decay_col, L), 0.0))
    between = jnp.where(along_rows(own, L) == along_columns(own_col, L), between, 0.0)
    incoming = jnp.where(own == incoming_segment[chunk], jnp.exp(decay), 0.0)
    outgoing = jnp.where(own == segment[chunk, L - 1], jnp.exp(rest), 0.0)
    return _Factors(q_norm, k_norm, k_norm_col, incoming, outgoing, between, i, j)


def _fetch(channels, dst, ready, head, N):
    """Fetches one head's queries, keys and values of a chunk."""
    rows = pl.ds(lax.axis_index("chunk") * L, L)
    for part, tile in enumerate(dst):
        plgpu.copy_gmem_to_smem(channels.at[rows, pl.ds((part * N + head) * WIDTH, WIDTH)], tile, ready)


def _prepare(*refs, N):
    channels, g, beta, segment, incoming_segment, *outputs, q_s, k_s, v_s, u_s, w_s, d_s, m_s, vectors_s, ready = refs
    out_u, out_w, out_q, out_k, out_p, out_m = (x.at[lax.axis_index("chunk"), lax.axis_index("head")] for x in outputs)
    chunk, head = lax.axis_index("chunk"), lax.axis_index("head")
    _fetch(channels, (q_s, k_s, v_s), ready, head, N)
    beta_row, beta_col = (load(beta.at[head, chunk], layout) for layout in (ROW, COL))
    plgpu.barrier_wait(ready)
    f = _factors(g, segment, incoming_segment, q_s, k_s, vectors_s, head, chunk)
    scaled = f.between * along_columns(f.k_norm_col, L)

    attention = product(q_s, k_s.transpose(TRANSPOSE)) * scaled * along_rows(f.q_norm, L)
    store_global(jnp.where(f.i >= f.j, attention, 0.0), m_s, out_p)
    store_global(q_s[...].astype(jnp.float32) * along_rows(f.q_norm * f.incoming, WIDTH), q_s, out_q)
    overlap = product(k_s, k_s.transpose(TRANSPOSE)) * scaled * along_rows(f.k_norm * beta_row, L)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    inverse = invert(jnp.where(f.i > f.j, overlap, 0.0), f.i, f.j, d_s, m_s)

    store_global(inverse, m_s, out_m)
    store_shared(inverse * along_columns(beta_col, L), d_s)
    store_global(product(v_s.transpose(TRANSPOSE), d_s.transpose(TRANSPOSE)), u_s, out_u)
    store_shared(k_s[...].astype(jnp.float32) * along_rows(f.k_norm * f.incoming, WIDTH), v_s)
    store_global(product(d_s, v_s), w_s, out_w)
    store_global(k_s[...].astype(jnp.float32) * along_rows(f.k_norm * f.outgoing, WIDTH), k_s, out_k)
    plgpu.wait_smem_to_gmem(0)


def gradients(
    channels: BFloat16[Array, "RT C"],
    d_out: BFloat16[Array, "RT NV"],
    g: Float32[Array, "N B L"],
    beta: Float32[Array, "N B L"],
    chunk_segments: ChunkSegments,
    terms: BackwardTerms,
) -> tuple[BFloat16[Array, "RT C"], Float32[Array, "N B L"], Float32[Array, "4 N B L"], Float32[Array, "N B L"]]:
    """Returns the gradients of the channels, of beta, of g and of the fade.

    The gradient of g is four summands. The gradient of the fade is one summand per row of the chunk.
    """
    N, B, _ = g.shape
    vector = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_gradients, N=N),
        out_type=[jax.ShapeDtypeStruct(channels.shape, channels.dtype), vector(g.shape), vector((4, *g.shape)), vector(g.shape)],
        grid=(B, N),
        grid_names=("chunk", "head"),
        num_threads=2,
        thread_name="group",
        scratch_types=[
            *(tiles(L, WIDTH) for _ in range(4)),  # q, k, v, the output's cotangent
            *(tiles(L, L), tiles(WIDTH, WIDTH), tiles(WIDTH, WIDTH), tiles(WIDTH, L), tiles(WIDTH, L)),
            tiles(2, L, L),  # matrices to be transposed
            tiles(L, WIDTH, dtype=jnp.dtype(jnp.float32)),  # the second warpgroup's summand of the keys' gradient
            plgpu.SMEM((2, 2, L), jnp.float32),
            *(plgpu.Barrier(num_arrivals=9), plgpu.Barrier(), plgpu.Barrier()),
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_gradients",
    )
    return tuple(kernel(channels, d_out, g, beta, *chunk_segments, *terms))


def _gradients(*refs, N):
    """Computes one chunk's gradients with two warpgroups.

    One propagates through the system to values and keys, the other through the attention and the state.
    Sums over rows cross warps through a scratch buffer that both warpgroups share. Hence the second one sums
    its columns first, and `summed` keeps the first one waiting until then.
    """
    channels, d_out, g, beta, segment, incoming_segment, *refs = refs
    matrices, (out, out_beta, out_shares, out_fade), scratch = refs[:5], refs[5:9], refs[9:]
    q_s, k_s, v_s, o_s, m_s, state_s, after_s, n_s, d_s, t_s, share_s, vectors_s, ready, shared, summed = scratch
    chunk, head, group = (lax.axis_index(name) for name in ("chunk", "head", "group"))
    rows = pl.ds(chunk * L, L)

    @pl.when(group == 0)
    def _():
        _fetch(channels, (q_s, k_s, v_s), ready, head, N)
        plgpu.copy_gmem_to_smem(d_out.at[rows, pl.ds(head * WIDTH, WIDTH)], o_s, ready)
        for source, dst in zip(matrices, (m_s, state_s, after_s, n_s, d_s), strict=True):
            plgpu.copy_gmem_to_smem(source.at[chunk, head], dst, ready)

    plgpu.barrier_wait(ready)

    def store_part(dst, part):
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dst, out.at[rows, pl.ds((part * N + head) * WIDTH, WIDTH)])

    @pl.when(group == 0)
    def _system():
        f = _factors(g, segment, incoming_segment, None, k_s, vectors_s.at[0], head, chunk)
        strength = load(beta.at[head, chunk])
        dr = product(m_s.transpose(TRANSPOSE), d_s.transpose(TRANSPOSE))
        d_beta = _row_dot(dr, _float32(v_s))
        v_s[...] = (dr * _along_width(strength)).astype(v_s.dtype)
        store_part(v_s, 2)
        dr = dr.astype(v_s.dtype)
        d_overlap = jnp.where(f.i > f.j, -product(dr, n_s) * f.between, 0.0)
        share = d_overlap * product(k_s, k_s.transpose(TRANSPOSE)) * along_rows(f.k_norm, L) * along_columns(f.k_norm_col, L)
        d_beta += jnp.sum(share, axis=1)
        share = share * along_rows(strength, L)
        plgpu.barrier_wait(summed)
        of_row, of_column = jnp.sum(share, axis=1), jnp.sum(share, axis=0)
        d_overlap = d_overlap * along_rows(strength, L)
        store_shared(d_overlap * along_rows(f.k_norm, L), t_s.at[0])
        d_overlap = (d_overlap * along_columns(f.k_norm_col, L)).astype(v_s.dtype)

        d_k = product(dr, state_s) * _along_width(-f.incoming)
        read_k = _row_dot(d_k, _float32(k_s)) * f.k_norm
        out_beta[head, chunk] = d_beta + read_k
        row_shares = of_row + strength * read_k
        _store_gate_shares(f, row_shares, None, of_column, vectors_s.at[0], out_shares.at[pl.ds(0, 2), head, chunk])
        d_k = accumulate(d_k * _along_width(strength), d_overlap, k_s)
        d_k = accumulate(d_k, t_s.at[0].transpose(TRANSPOSE), k_s)
        plgpu.barrier_wait(shared)  # the other warpgroup has read the keys
        k_s[...] = _norm_backward(d_k + share_s[...], _float32(k_s), f.k_norm, 1.0).astype(k_s.dtype)
        store_part(k_s, 1)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 1)
    def _attention():
        f = _factors(g, segment, incoming_segment, q_s, k_s, vectors_s.at[1], head, chunk)
        halves = (pl.ds(half * L, L) for half in range(2))
        out_fade[head, chunk] = sum(_row_dot(_float32(state_s.at[half]), _float32(after_s.at[half])) for half in halves)
        d_attention = jnp.where(f.i >= f.j, product(o_s, n_s) * f.between, 0.0)
        share = d_attention * product(q_s, k_s.transpose(TRANSPOSE)) * along_rows(f.q_norm, L) * along_columns(f.k_norm_col, L)
        share = jnp.where(f.i > f.j, share, 0.0)  # the diagonal's decay is 1 for any gates
        of_row, of_column = jnp.sum(share, axis=1), jnp.sum(share, axis=0)
        plgpu.barrier_arrive(summed)
        store_shared(d_attention * along_rows(f.q_norm, L), t_s.at[1])
        d_attention = (d_attention * along_columns(f.k_norm_col, L)).astype(q_s.dtype)
        d_k = product(n_s.transpose(TRANSPOSE), after_s) * _along_width(f.outgoing)
        of_rest = _row_dot(d_k, _float32(k_s)) * f.k_norm
        share_s[...] = accumulate(d_k, t_s.at[1].transpose(TRANSPOSE), q_s)

        d_q = product(o_s, state_s) * _along_width(f.incoming)
        of_row += _row_dot(d_q, _float32(q_s)) * f.q_norm
        d_q = accumulate(d_q, d_attention, k_s)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared)
        _store_gate_shares(f, of_row, of_rest, of_column, vectors_s.at[1], out_shares.at[pl.ds(2, 2), head, chunk])
        q_s[...] = _norm_backward(d_q, _float32(q_s), f.q_norm, WIDTH**0.5).astype(q_s.dtype)
        store_part(q_s, 0)
        plgpu.wait_smem_to_gmem(0)


def _along_width(vector):
    return along_rows(vector, WIDTH)


def _row_dot(x, y):
    return jnp.sum(x * y, axis=1)


def _float32(ref):
    return ref[...].astype(jnp.float32)


def _store_gate_shares(f, of_row, of_rest, of_column, vectors_s, out):
    """Stores the summands of the gates' gradients.

    A token's gate is part of the decay of that token and all later ones, with the sign flipped for columns.
    It is also part of the remaining decay of all earlier tokens. The vectors of rows pass through shared
    memory and are summed as columns, because a sum over rows crosses warps.
    """
    vectors_s[0] = of_row
    if of_rest is not None:
        vectors_s[1] = of_rest
    later, *rest = (along_columns(load(vectors_s.at[n], COL), L) for n in range(1 if of_rest is None else 2))
    out[0] = jnp.sum(jnp.where(f.j >= f.i, later, *(rest or [0.0])), axis=1)
    out[1] = -jnp.sum(jnp.where(f.j >= f.i, along_columns(of_column, L), 0.0), axis=1)


def _norm_backward(dx, x, norm, unit):
    """Returns the gradient of a row `x` from that of `norm x`, where `norm` is `1 / (unit |x|)`."""
    inverse = norm * unit
    return (dx - x * _along_width(_row_dot(dx, x) * inverse * inverse)) * _along_width(norm)
