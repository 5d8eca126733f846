"""The sequential part of `packed` for Hopper: the memory handed from chunk to chunk, forwards, and its cotangent backwards.

Forwards, with a chunk's writes U, reads W, keys X and fade f, all after the chunk's own system is solved,

    n^T = U^T - S W^T,    S' = f S + n^T X,

and backwards, with D the cotangent of n from what reads it, Z that of S from what reads it, and G that of S',

    d^T = D^T + G X^T,    G_before = f G + Z - d^T W,

which is the same kernel with W and X exchanged, the signs turned and the chunks from last to first. What is left of the
gradient are products of a chunk's own: dW = -d S, dX = n G, df = <S, G>, dU = d. The running matrix, 64 rows of `[V, K]` a
warpgroup, stays in registers and is its own left operand.
Glossary: R rows, c chunks, N heads, L tokens of a chunk, K key width, V value width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from kernels_pallas.backends import mosaic_gap
from kernels_pallas.gated_delta.packing import CHUNK
from kernels_pallas.mosaic import ACROSS, MATRIX, params, product, tiles

L = CHUNK
WIDTH = 128  # of keys and of values
SLICE = 64  # value channels of a warpgroup
STAGES = 2


def gap(dtype: jnp.dtype, key_width: int, value_width: int) -> str | None:
    """What the kernel lacks for these arguments, or None."""
    if (key_width, value_width) != (WIDTH, WIDTH):
        return f"heads have {key_width} keys and {value_width} values, and it takes {WIDTH} and {WIDTH}"
    if dtype != jnp.bfloat16:
        return f"qkv is {dtype}, and it takes bfloat16"
    return mosaic_gap()


@jax.custom_vjp
def hand_over(
    writes: BFloat16[Array, "R c N V L"],
    reads: BFloat16[Array, "R c N L K"],
    keys: BFloat16[Array, "R c N L K"],
    fade: Float32[Array, "R c N"],
) -> tuple[BFloat16[Array, "R c N V K"], BFloat16[Array, "R c N V L"]]:
    """The memory before each chunk, and what each token adds to it."""
    return _walk(writes, reads, keys, fade)


def _remember(writes: Array, reads: Array, keys: Array, fade: Array) -> tuple[tuple[Array, Array], Any]:
    memories, new = _walk(writes, reads, keys, fade)
    return (memories, new), (reads, keys, fade, memories, new)


def _pull_back(kept: Any, cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
    reads, keys, fade, memories, new = kept
    of_memories, of_new = cotangents
    after, d = _walk(of_new, keys, reads, fade, of_memories)
    d_reads = -_dot("rcnvl,rcnvk->rcnlk", d, memories)
    d_keys = _dot("rcnvl,rcnvk->rcnlk", new, after)
    d_fade = jnp.sum(memories.astype(jnp.float32) * after.astype(jnp.float32), axis=(-1, -2))
    return d, d_reads, d_keys, d_fade


hand_over.defvjp(_remember, _pull_back)


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def _walk(add: Array, left: Array, right: Array, fade: Array, to_memory: Array | None = None) -> tuple[Array, Array]:
    """The kernel: forwards, or backwards where something is added to the memory as well."""
    (R, c, N, V, _), K = add.shape, left.shape[-1]
    inputs = [add, left, right] + ([] if to_memory is None else [to_memory])
    kernel = plgpu.kernel(
        functools.partial(_kernel, chunks=c, K=K, backwards=to_memory is not None),
        out_type=[
            jax.ShapeDtypeStruct((R, c, N, V, K), add.dtype),
            jax.ShapeDtypeStruct(add.shape, add.dtype),
        ],
        grid=(R, N, V // SLICE),
        grid_names=("row", "head", "slice"),
        num_threads=2,  # the second only fetches
        thread_name="group",
        scratch_types=[
            [
                *(tiles(STAGES, SLICE, L), tiles(STAGES, L, K), tiles(STAGES, L, K)),
                *([] if to_memory is None else [tiles(STAGES, SLICE, K)]),
            ],
            tiles(SLICE, K),
            tiles(SLICE, L),
            plgpu.Barrier(num_arrivals=len(inputs), num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
        ],
        compiler_params=params(approximate=False),
        kernel_name="gated_delta_hand_back" if to_memory is not None else "gated_delta_hand_over",
    )
    memories, new = kernel(*inputs, fade)
    return memories, new


def _kernel(*refs, chunks, K, backwards):
    *inputs, fade, memories, new, buffers, memory_s, new_s, ready, free = refs
    row, head, part, group = (lax.axis_index(name) for name in ("row", "head", "slice", "group"))
    mine, sign = pl.ds(part * SLICE, SLICE), 1.0 if backwards else -1.0

    def chunk_at(i):
        return chunks - 1 - i if backwards else i

    @pl.when(group == 1)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, chunks)
        def _(i):
            slot, chunk = lax.rem(i, STAGES), chunk_at(i)
            pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
            add, left, right, *rest = (x.at[row, chunk, head] for x in inputs)
            sources = [add.at[mine], left, right, *(x.at[mine] for x in rest)]
            for source, place in zip(sources, buffers, strict=True):
                plgpu.copy_gmem_to_smem(source, place.at[slot], ready.at[slot])

    @pl.when(group == 0)
    def _compute():
        plgpu.set_max_registers(208, action="increase")

        def step(i, memory):
            slot, chunk = lax.rem(i, STAGES), chunk_at(i)
            kept = fade[row, chunk, head]
            plgpu.barrier_wait(ready.at[slot])
            before = memory.astype(memories.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            memory_s[...] = before
            add = buffers[0].at[slot][...].astype(jnp.float32)
            change = (add + sign * product(before, buffers[1].at[slot].transpose(ACROSS))).astype(new.dtype)
            new_s[...] = change
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(memory_s, memories.at[row, chunk, head, mine])
            plgpu.copy_smem_to_gmem(new_s, new.at[row, chunk, head, mine])
            memory = memory * kept - sign * product(change, buffers[2].at[slot])
            if backwards:
                memory = memory + buffers[3].at[slot][...].astype(jnp.float32)
            plgpu.barrier_arrive(free.at[slot])
            return memory

        nothing = plgpu.layout_cast(jnp.zeros((SLICE, K), jnp.float32), MATRIX)
        lax.fori_loop(0, chunks, step, nothing)
        plgpu.wait_smem_to_gmem(0)
