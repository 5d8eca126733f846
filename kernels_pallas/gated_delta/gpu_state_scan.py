"""Sequential part of `packed` for Hopper: a scan of the state over chunks, and the scan of its cotangent.

With a chunk's solved system (`gpu_packed.prepare`: writes U, reads W, queries Q, keys X, attention P and
fade f), the forward scan computes

    n^T = U^T - S W^T,          out^T = S Q^T + n^T P^T,    S' = f S + n^T X,

and the backward scan, with D the cotangent of out and G that of S',

    d^T = D^T P + G X^T,        G_before = f G + D^T Q - d^T W,

where d is the cotangent of n. The running matrix stays in registers, in float32, 64 rows of `[V, K]` per
warpgroup, and is the left operand of its products. Each block handles one head. Its warpgroups share their
loads, and one more warpgroup only issues copies.
Glossary: R rows, c chunks of a row, N heads, L tokens of a chunk, K key width, V value width.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from kernels_pallas.gated_delta.packing import CHUNK
from kernels_pallas.gpu.mosaic import MATRIX, TRANSPOSE, accumulate, params, product, tiles

L = CHUNK
SLICE = 64  # value channels of a warpgroup
STAGES = 2


def scan_states(
    writes: BFloat16[Array, "R c N V L"],
    reads: BFloat16[Array, "R c N L K"],
    queries: BFloat16[Array, "R c N L K"],
    keys: BFloat16[Array, "R c N L K"],
    attention: BFloat16[Array, "R c N L L"],
    fade: Float32[Array, "R c N"],
) -> tuple[BFloat16[Array, "R T NV"], BFloat16[Array, "R c N V K"], BFloat16[Array, "R c N V L"]]:
    """Returns the output of each token, the state before each chunk, and each token's write to the state."""
    (R, c, N, V, _), K = writes.shape, reads.shape[-1]
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=writes.dtype)
    outputs = [shape((R, c * L, N * V)), shape((R, c, N, V, K)), shape(writes.shape)]
    return _launch(_forward_step, "gated_delta_scan_states", [writes, reads, queries, keys, attention], fade, outputs)


def scan_states_backward(
    d_out: BFloat16[Array, "R T NV"],
    reads: BFloat16[Array, "R c N L K"],
    queries: BFloat16[Array, "R c N L K"],
    keys: BFloat16[Array, "R c N L K"],
    attention: BFloat16[Array, "R c N L L"],
    fade: Float32[Array, "R c N"],
) -> tuple[BFloat16[Array, "R c N V K"], BFloat16[Array, "R c N V L"]]:
    """Returns the cotangents of the state after each chunk and of each token's write."""
    (R, c, N, _, K), V = reads.shape, d_out.shape[-1] // reads.shape[2]
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=reads.dtype)
    outputs = [shape((R, c, N, V, K)), shape((R, c, N, V, L))]
    return _launch(_backward_step, "gated_delta_scan_states_backward", [d_out, reads, queries, keys, attention], fade, outputs)


def _launch(body, name, inputs, fade, outputs):
    (R, c, N), K = fade.shape, inputs[1].shape[-1]
    V = outputs[-1].shape[-2]
    groups = V // SLICE
    first = tiles(STAGES, groups, *((SLICE, L) if body is _forward_step else (L, SLICE)))
    kernel = plgpu.kernel(
        functools.partial(_kernel, body=body, chunks=c, K=K, V=V),
        out_type=outputs,
        grid=(R, N),
        grid_names=("row", "head"),
        num_threads=groups + 1,  # the last one only issues copies
        thread_name="group",
        scratch_types=[
            [first, *(tiles(STAGES, L, K) for _ in range(3)), tiles(STAGES, L, L)],
            [tiles(groups, SLICE, K), tiles(groups, SLICE, L), tiles(groups, L, SLICE)],
            plgpu.Barrier(num_arrivals=4 + groups, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
        ],
        compiler_params=params(approximate=False),
        kernel_name=name,
    )
    return tuple(kernel(*inputs, fade))


def _kernel(*refs, body, chunks, K, V):
    inputs, fade, outputs, (buffers, staging, ready, consumed) = refs[:5], refs[5], refs[6:-4], refs[-4:]
    row, head, group = (lax.axis_index(name) for name in ("row", "head", "group"))
    groups = V // SLICE

    def chunk_at(i):
        return i if body is _forward_step else chunks - 1 - i

    def lanes(part):
        return pl.ds(head * V + part * SLICE, SLICE)

    @pl.when(group == groups)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, chunks)
        def _(i):
            slot, chunk = lax.rem(i, STAGES), chunk_at(i)
            pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(consumed.at[slot]))
            for source, dst in zip(inputs[1:], buffers[1:], strict=True):
                plgpu.copy_gmem_to_smem(source.at[row, chunk, head], dst.at[slot], ready.at[slot])
            for part in range(groups):
                if body is _forward_step:
                    source = inputs[0].at[row, chunk, head, pl.ds(part * SLICE, SLICE)]
                else:
                    source = inputs[0].at[row, pl.ds(chunk * L, L), lanes(part)]
                plgpu.copy_gmem_to_smem(source, buffers[0].at[slot, part], ready.at[slot])

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(208, action="increase")
        own_channels = pl.ds(group * SLICE, SLICE)

        def step(i, state):
            slot, chunk = lax.rem(i, STAGES), chunk_at(i)
            decay = fade[row, chunk, head]
            plgpu.barrier_wait(ready.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            rounded = state.astype(jnp.bfloat16)
            tile = buffers[0].at[slot, group], *(buffer.at[slot] for buffer in buffers[1:])
            state, new, read = body(state * decay, rounded, *tile)
            plgpu.barrier_arrive(consumed.at[slot])
            state_s, new_s, read_s = (dst.at[group] for dst in staging)
            state_s[...], new_s[...] = rounded, new
            if read is not None:
                read_s.transpose(TRANSPOSE)[...] = plgpu.layout_cast(read.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            states, new_values = outputs[-2:]
            plgpu.copy_smem_to_gmem(state_s, states.at[row, chunk, head, own_channels])
            plgpu.copy_smem_to_gmem(new_s, new_values.at[row, chunk, head, own_channels])
            if read is not None:
                plgpu.copy_smem_to_gmem(read_s, outputs[0].at[row, pl.ds(chunk * L, L), lanes(group)])
            return state

        zeros = plgpu.layout_cast(jnp.zeros((SLICE, K), jnp.float32), MATRIX)
        lax.fori_loop(0, chunks, step, zeros)
        plgpu.wait_smem_to_gmem(0)


def _forward_step(faded, state, writes, reads, queries, keys, attention):
    new = (writes[...].astype(jnp.float32) - product(state, reads.transpose(TRANSPOSE))).astype(jnp.bfloat16)
    read = accumulate(product(state, queries.transpose(TRANSPOSE)), new, attention.transpose(TRANSPOSE))
    return accumulate(faded, new, keys), new, read


def _backward_step(faded, state, d_out, reads, queries, keys, attention):
    transposed = d_out.transpose(TRANSPOSE)
    new = accumulate(product(transposed, attention), state, keys.transpose(TRANSPOSE)).astype(jnp.bfloat16)
    return accumulate(accumulate(faded, transposed, queries), -new, reads), new, None
