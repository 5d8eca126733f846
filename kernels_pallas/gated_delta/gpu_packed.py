"""`packed` for Hopper, its convolution done: a chunk's own part, in one kernel forwards and one backwards, around `gpu_handover`.

With a chunk's tokens i, j, D the log of the decay from the chunk's start, beta the writing strengths, q and k normalised, and
e = exp(D) where a token inherits the memory S handed to the chunk, x = exp(D_L - D) where the memory after the chunk is of its
sequence, all else 0:

    A_ij = beta_i (k_i k_j) exp(D_i - D_j), i > j,      M = (I + A)^-1,      P_ij = (q_i k_j) exp(D_i - D_j), i >= j,
    U = M beta v,   W = M beta e k,   Q = e q,   X = x k.

Backwards, with n what the tokens add to S, d its cotangent, o the output's and G that of the memory after the chunk, one product
with M' (the transposed) passes through the system, and its matrix's gradient takes n itself, since n = M r with
r = beta (v - e S k):

    dr = M' d,   dA = -dr n' (i > j),   dP = o n' (i >= j),   dv = beta dr,
    dq = dP~ k + e o S,   dk = dA~ k + dA~' k + dP~' q - beta e dr S + x n G,

~ being the factors that turn products of keys and queries into A and P.
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

from kernels_pallas.backends import mosaic_gap
from kernels_pallas.gated_delta.gpu_chunked import inverse_length, invert, put, send
from kernels_pallas.gated_delta.gpu_convolve import TAPS
from kernels_pallas.gated_delta.gpu_state_scan import hand_back, hand_over
from kernels_pallas.gated_delta.packing import CHUNK
from kernels_pallas.gpu.mosaic import ACROSS, COL, ROW, accumulate, along_columns, along_rows, iota, load, params, product, tiles

L = CHUNK
WIDTH = 128  # of keys and of values


def gap(qkv: jax.Array, conv: jax.Array, heads: int, key_width: int, value_width: int) -> str | None:
    """What the kernels lack for these arguments of `packed`, or None."""
    if (key_width, value_width) != (WIDTH, WIDTH):
        return f"heads have {key_width} keys and {value_width} values, and it takes {WIDTH} and {WIDTH}"
    if qkv.shape[-1] != 3 * heads * WIDTH:
        return f"qkv has {qkv.shape[-1]} channels, and it takes {3 * heads * WIDTH}: as many key heads as value heads"
    if conv.shape[1] != TAPS:
        return f"layer.conv has {conv.shape[1]} taps, and it takes {TAPS}"
    if qkv.dtype != jnp.bfloat16:
        return f"qkv is {qkv.dtype}, and it takes bfloat16"
    return mosaic_gap()


class Seams(NamedTuple):
    """What a chunk's tokens are to the memory.

    Attributes:
      sequence: of each token.
      before: whose memory the chunk is handed; -1 for nobody's.
    """

    sequence: Int32[Array, "B L"]
    before: Int32[Array, " B"]


class System(NamedTuple):
    """A chunk's, as `gpu_handover` takes it; and the inverse for the way back."""

    writes: BFloat16[Array, "B N V L"]
    reads: BFloat16[Array, "B N L K"]
    queries: BFloat16[Array, "B N L K"]
    keys: BFloat16[Array, "B N L K"]
    attention: BFloat16[Array, "B N L L"]
    inverse: BFloat16[Array, "B N L L"]


@jax.custom_vjp
def rule(
    channels: BFloat16[Array, "R T C"],
    g: Float32[Array, "R T N"],
    beta: Float32[Array, "R T N"],
    segments: Int32[Array, "R T"],
) -> BFloat16[Array, "R T N V"]:
    """What each token reads of its own sequence's memory.

    Args:
      channels: queries, keys and values after convolution and SiLU; of any length.
      g, beta: log decay and writing strength.
      segments: as in `packed`.
    """
    return _remember(channels, g, beta, segments)[0]


def _remember(channels: Array, g: Array, beta: Array, segments: Array) -> tuple[Array, Any]:
    R, T, N = g.shape
    inputs = channels.reshape(R * T, -1), _by_head(g), _by_head(beta), _seams(segments)
    system = prepare(*inputs)
    fade = _fade(inputs[1], inputs[3]).T.reshape(R, -1, N)
    rowed = [x.reshape(R, -1, *x.shape[1:]) for x in system]
    out, memories, new = hand_over(*rowed[:5], fade)
    return out.reshape(R, T, N, WIDTH), (inputs, rowed, fade, memories, new)


def _pull_back(kept: Any, cotangent: Array) -> tuple[Array | None, ...]:
    (channels, g, beta, seams), (_, *rest, inverse), fade, memories, new = kept
    R, T, N, V = cotangent.shape
    cotangent = cotangent.reshape(R, T, N * V)
    after, d = hand_back(cotangent, *rest, fade)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (inverse, memories, after, new, d))
    d_channels, d_beta, shares, of_fade = gradients(channels, cotangent.reshape(R * T, -1), g, beta, seams, *flat)
    # The decay from the chunk's start to its end fades the whole memory: each of its tokens' share is the same.
    d_g = shares.sum(axis=0) + (_fade(g, seams) * of_fade.sum(axis=-1))[..., None]
    return d_channels.reshape(R, T, -1), *(x.reshape(N, R, T).transpose(1, 2, 0) for x in (d_g, d_beta)), None


rule.defvjp(_remember, _pull_back)


def _by_head(x: Float32[Array, "R T N"]) -> Float32[Array, "N B L"]:
    return x.reshape(-1, L, x.shape[-1]).transpose(2, 0, 1)


def _seams(segments: Int32[Array, "R T"]) -> Seams:
    chunks = segments.reshape(segments.shape[0], -1, L)
    before = jnp.pad(chunks[:, :-1, -1], ((0, 0), (1, 0)), constant_values=-1)
    return Seams(chunks.reshape(-1, L), before.reshape(-1))


def _fade(g: Float32[Array, "N B L"], seams: Seams) -> Float32[Array, "N B"]:
    """What is left of the memory handed to a chunk at its end; nothing where another sequence has begun."""
    return jnp.where((seams.sequence[:, -1] == seams.before)[None], jnp.exp(g.sum(axis=-1)), 0.0)


def prepare(channels: BFloat16[Array, "RT C"], g: Float32[Array, "N B L"], beta: Float32[Array, "N B L"], seams: Seams) -> System:
    """Every chunk's system, solved."""
    N, B, _ = g.shape
    shapes = System((WIDTH, L), (L, WIDTH), (L, WIDTH), (L, WIDTH), (L, L), (L, L))
    kernel = plgpu.kernel(
        functools.partial(_prepare, N=N),
        out_type=System(*(jax.ShapeDtypeStruct((B, N, *shape), channels.dtype) for shape in shapes)),
        grid=(B, N),
        grid_names=("chunk", "head"),
        scratch_types=[
            *(tiles(L, WIDTH), tiles(L, WIDTH), tiles(L, WIDTH)),  # q, k, v
            *(tiles(WIDTH, L), tiles(L, WIDTH), tiles(L, L), tiles(L, L)),
            plgpu.SMEM((2, L), jnp.float32),  # vectors on their way from rows to columns
            plgpu.Barrier(num_arrivals=3),
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_prepare",
    )
    return kernel(channels, g, beta, *seams)


class _Factors(NamedTuple):
    """Of a chunk and head, in registers: vectors along rows, but for those of columns, and matrices."""

    q_norm: Any
    k_norm: Any
    k_norm_col: Any
    inherited: Any  # e
    left: Any  # x
    between: Any  # exp(D_i - D_j) within a sequence, 0 elsewhere
    i: Any
    j: Any


def _factors(g, sequence, before, q_s, k_s, vectors_s, head, chunk):
    i, j = iota((L, L), 0), iota((L, L), 1)
    g_col = along_columns(load(g.at[head, chunk], COL), L)
    decay = jnp.sum(jnp.where(i >= j, g_col, 0.0), axis=1)  # a cumulative sum
    rest = jnp.sum(jnp.where(i < j, g_col, 0.0), axis=1)  # from each token to the chunk's end
    own, own_col = (load(sequence.at[chunk], layout) for layout in (ROW, COL))
    k_norm, q_norm = inverse_length(k_s), None if q_s is None else inverse_length(q_s) * WIDTH**-0.5
    vectors_s[0], vectors_s[1] = k_norm, decay
    k_norm_col, decay_col = (load(vectors_s.at[n], COL) for n in range(2))
    between = jnp.exp(jnp.minimum(along_rows(decay, L) - along_columns(decay_col, L), 0.0))
    between = jnp.where(along_rows(own, L) == along_columns(own_col, L), between, 0.0)
    inherited = jnp.where(own == before[chunk], jnp.exp(decay), 0.0)
    left = jnp.where(own == sequence[chunk, L - 1], jnp.exp(rest), 0.0)
    return _Factors(q_norm, k_norm, k_norm_col, inherited, left, between, i, j)


def _fetch(channels, place, ready, head, N):
    """A chunk's queries, keys and values of a head."""
    rows = pl.ds(lax.axis_index("chunk") * L, L)
    for part, tile in enumerate(place):
        plgpu.copy_gmem_to_smem(channels.at[rows, pl.ds((part * N + head) * WIDTH, WIDTH)], tile, ready)


def _prepare(*refs, N):
    channels, g, beta, sequence, before, *outputs, q_s, k_s, v_s, u_s, w_s, d_s, m_s, vectors_s, ready = refs
    out_u, out_w, out_q, out_k, out_p, out_m = (x.at[lax.axis_index("chunk"), lax.axis_index("head")] for x in outputs)
    chunk, head = lax.axis_index("chunk"), lax.axis_index("head")
    _fetch(channels, (q_s, k_s, v_s), ready, head, N)
    beta_row, beta_col = (load(beta.at[head, chunk], layout) for layout in (ROW, COL))
    plgpu.barrier_wait(ready)
    f = _factors(g, sequence, before, q_s, k_s, vectors_s, head, chunk)
    scaled = f.between * along_columns(f.k_norm_col, L)

    attention = product(q_s, k_s.transpose(ACROSS)) * scaled * along_rows(f.q_norm, L)
    send(jnp.where(f.i >= f.j, attention, 0.0), m_s, out_p)
    send(q_s[...].astype(jnp.float32) * along_rows(f.q_norm * f.inherited, WIDTH), q_s, out_q)
    overlap = product(k_s, k_s.transpose(ACROSS)) * scaled * along_rows(f.k_norm * beta_row, L)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    inverse = invert(jnp.where(f.i > f.j, overlap, 0.0), f.i, f.j, d_s, m_s)

    send(inverse, m_s, out_m)
    put(inverse * along_columns(beta_col, L), d_s)
    send(product(v_s.transpose(ACROSS), d_s.transpose(ACROSS)), u_s, out_u)
    put(k_s[...].astype(jnp.float32) * along_rows(f.k_norm * f.inherited, WIDTH), v_s)
    send(product(d_s, v_s), w_s, out_w)
    send(k_s[...].astype(jnp.float32) * along_rows(f.k_norm * f.left, WIDTH), k_s, out_k)
    plgpu.wait_smem_to_gmem(0)


def gradients(
    channels: BFloat16[Array, "RT C"],
    cotangent: BFloat16[Array, "RT NV"],
    g: Float32[Array, "N B L"],
    beta: Float32[Array, "N B L"],
    seams: Seams,
    inverse: BFloat16[Array, "B N L L"],
    memories: BFloat16[Array, "B N V K"],
    after: BFloat16[Array, "B N V K"],
    new: BFloat16[Array, "B N V L"],
    d: BFloat16[Array, "B N V L"],
) -> tuple[BFloat16[Array, "RT C"], Float32[Array, "N B L"], Float32[Array, "4 N B L"], Float32[Array, "N B L"]]:
    """Of the channels; of beta; g's in four shares, and the fade's in one a row, to be added up."""
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
            tiles(L, WIDTH, dtype=jnp.dtype(jnp.float32)),  # what the second warpgroup has of the keys' gradient
            plgpu.SMEM((2, 2, L), jnp.float32),
            *(plgpu.Barrier(num_arrivals=9), plgpu.Barrier()),
        ],
        compiler_params=params(approximate=True),
        kernel_name="gated_delta_gradients",
    )
    return tuple(kernel(channels, cotangent, g, beta, *seams, inverse, memories, after, new, d))


def _gradients(*refs, N):
    """One warpgroup goes back through the system to values and keys, the other through the attention and the memory."""
    channels, cotangent, g, beta, sequence, before, *refs = refs
    matrices, (out, out_beta, out_shares, out_fade), scratch = refs[:5], refs[5:9], refs[9:]
    q_s, k_s, v_s, o_s, m_s, memory_s, after_s, n_s, d_s, t_s, share_s, vectors_s, ready, shared = scratch
    chunk, head, group = (lax.axis_index(name) for name in ("chunk", "head", "group"))
    rows = pl.ds(chunk * L, L)

    @pl.when(group == 0)
    def _():
        _fetch(channels, (q_s, k_s, v_s), ready, head, N)
        plgpu.copy_gmem_to_smem(cotangent.at[rows, pl.ds(head * WIDTH, WIDTH)], o_s, ready)
        for source, place in zip(matrices, (m_s, memory_s, after_s, n_s, d_s), strict=True):
            plgpu.copy_gmem_to_smem(source.at[chunk, head], place, ready)

    plgpu.barrier_wait(ready)

    def leave(place, part):
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(place, out.at[rows, pl.ds((part * N + head) * WIDTH, WIDTH)])

    @pl.when(group == 0)
    def _system():
        f = _factors(g, sequence, before, None, k_s, vectors_s.at[0], head, chunk)
        strength = load(beta.at[head, chunk])
        dr = product(m_s.transpose(ACROSS), d_s.transpose(ACROSS))
        d_beta = _along(dr, _read(v_s))
        v_s[...] = (dr * _wide(strength)).astype(v_s.dtype)
        leave(v_s, 2)
        dr = dr.astype(v_s.dtype)
        d_overlap = jnp.where(f.i > f.j, -product(dr, n_s) * f.between, 0.0)
        share = d_overlap * product(k_s, k_s.transpose(ACROSS)) * along_rows(f.k_norm, L) * along_columns(f.k_norm_col, L)
        d_beta += jnp.sum(share, axis=1)
        share = share * along_rows(strength, L)
        of_row, of_column = jnp.sum(share, axis=1), jnp.sum(share, axis=0)
        d_overlap = d_overlap * along_rows(strength, L)
        put(d_overlap * along_rows(f.k_norm, L), t_s.at[0])
        d_overlap = (d_overlap * along_columns(f.k_norm_col, L)).astype(v_s.dtype)

        d_k = product(dr, memory_s) * _wide(-f.inherited)
        read_k = _along(d_k, _read(k_s)) * f.k_norm
        out_beta[head, chunk] = d_beta + read_k
        _leave_shares(f, of_row + strength * read_k, None, of_column, out_shares.at[pl.ds(0, 2), head, chunk])
        d_k = accumulate(d_k * _wide(strength), d_overlap, k_s)
        d_k = accumulate(d_k, t_s.at[0].transpose(ACROSS), k_s)
        plgpu.barrier_wait(shared)  # the other has read the keys, too
        k_s[...] = _through_length(d_k + share_s[...], _read(k_s), f.k_norm, 1.0).astype(k_s.dtype)
        leave(k_s, 1)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 1)
    def _attention():
        f = _factors(g, sequence, before, q_s, k_s, vectors_s.at[1], head, chunk)
        halves = (pl.ds(half * L, L) for half in range(2))
        out_fade[head, chunk] = sum(_along(_read(memory_s.at[half]), _read(after_s.at[half])) for half in halves)
        d_attention = jnp.where(f.i >= f.j, product(o_s, n_s) * f.between, 0.0)
        share = d_attention * product(q_s, k_s.transpose(ACROSS)) * along_rows(f.q_norm, L) * along_columns(f.k_norm_col, L)
        share = jnp.where(f.i > f.j, share, 0.0)  # the diagonal's decay is 1 whatever the gates are
        of_row, of_column = jnp.sum(share, axis=1), jnp.sum(share, axis=0)
        put(d_attention * along_rows(f.q_norm, L), t_s.at[1])
        d_attention = (d_attention * along_columns(f.k_norm_col, L)).astype(q_s.dtype)
        d_k = product(n_s.transpose(ACROSS), after_s) * _wide(f.left)
        of_rest = _along(d_k, _read(k_s)) * f.k_norm
        share_s[...] = accumulate(d_k, t_s.at[1].transpose(ACROSS), q_s)

        d_q = product(o_s, memory_s) * _wide(f.inherited)
        of_row += _along(d_q, _read(q_s)) * f.q_norm
        d_q = accumulate(d_q, d_attention, k_s)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared)
        _leave_shares(f, of_row, of_rest, of_column, out_shares.at[pl.ds(2, 2), head, chunk])
        q_s[...] = _through_length(d_q, _read(q_s), f.q_norm, WIDTH**0.5).astype(q_s.dtype)
        leave(q_s, 0)
        plgpu.wait_smem_to_gmem(0)


def _wide(vector):
    return along_rows(vector, WIDTH)


def _along(x, y):
    return jnp.sum(x * y, axis=1)


def _read(ref):
    return ref[...].astype(jnp.float32)


def _leave_shares(f, of_row, of_rest, of_column, out):
    """A token's gate is in the decay of all from it on, less what columns take back, and in the rest of all before it."""
    rest = 0.0 if of_rest is None else along_rows(of_rest, L)
    out[0] = jnp.sum(jnp.where(f.i >= f.j, along_rows(of_row, L), rest), axis=0)
    out[1] = -jnp.sum(jnp.where(f.j >= f.i, along_columns(of_column, L), 0.0), axis=1)


def _through_length(dx, x, norm, unit):
    """The gradient of a row `x` from that of `norm x`, `norm` being `1 / (unit |x|)`."""
    inverse = norm * unit
    return (dx - x * _wide(_along(dx, x) * inverse * inverse)) * _wide(norm)
