"""Muon: an optimiser that moves a matrix by its momentum made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Matrices of one shape are orthogonalised as one stack: one by one, a small model's hundred would launch thousands of kernels.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from minicpmv46_jax.checkpoint import names
from minicpmv46_jax.checkpoint.names import TreePath
from minicpmv46_jax.model import Params

MOMENTUM = 0.95
# Of singular values from 0 to 1 it takes all but the least to about 1 (0.7 to 1.2) in five rounds.
QUINTIC = 3.4445, -4.7750, 2.0315
NUM_STEPS = 5
MIN_SIDE = 16  # smaller matrices are not worth it


def is_matrix(path: TreePath, leaf: Array) -> bool:
    """Whether the leaf is a product's weights: no table, no filter, and not the patches' embedding, whose inputs are alike."""
    return leaf.ndim == 2 and min(leaf.shape) >= MIN_SIDE and "embed" not in path[-2]


def orthogonalise(x: Float[Array, "n rows columns"]) -> Float[Array, "n rows columns"]:
    """Matrices near the closest ones with orthonormal rows or columns, by Newton and Schulz; bfloat16 inside, float32 out."""
    wide = x.shape[1] <= x.shape[2]
    x = (x if wide else x.swapaxes(1, 2)).astype(jnp.bfloat16)
    x = x / (jnp.linalg.norm(x.astype(jnp.float32), axis=(1, 2), keepdims=True) + 1e-7).astype(x.dtype)
    a, b, c = QUINTIC

    def newton_schulz_step(_: Array, x: Array) -> Array:
        square = jnp.einsum("nij,nkj->nik", x, x)
        return a * x + jnp.einsum("nik,nkj->nij", b * square + c * jnp.einsum("nij,njk->nik", square, square), x)

    x = jax.lax.fori_loop(0, NUM_STEPS, newton_schulz_step, x)
    return (x if wide else x.swapaxes(1, 2)).astype(jnp.float32)


def orthogonalise_updates(updates: Params, params: Params | None = None) -> Params:
    """Every matrix of the tree made orthogonal, and larger where it is taller than wide."""
    del params
    leaves, tree = jax.tree.flatten(updates)
    stacks = collections.defaultdict(list)
    for i, leaf in enumerate(leaves):
        stacks[leaf.shape].append(i)
    for (rows, columns), places in stacks.items():
        stack = orthogonalise(jnp.stack([leaves[i] for i in places])) * max(1.0, rows / columns) ** 0.5
        for i, matrix in zip(places, stack, strict=True):
            leaves[i] = matrix
    return jax.tree.unflatten(tree, leaves)


def muon(learning_rate: Any, weight_decay: float, rest: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon for matrices, `rest` for all else.

    Args:
      learning_rate: largest singular value of a wide matrix's step; a tall matrix moves further.
      weight_decay: of matrices, times `learning_rate`.
      rest: its own rate is in it.
    """
    own = optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.stateless(orthogonalise_updates),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )

    def label(keys: Any, leaf: Array) -> str:
        return "matrix" if is_matrix(names.tree_path(keys), leaf) else "rest"

    return optax.partition({"matrix": own, "rest": rest}, lambda tree: jax.tree_util.tree_map_with_path(label, tree))
