"""Muon: an optimiser that moves a matrix by its orthogonalised momentum.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.

Matrices of one shape are orthogonalised as one stack, because one by one they would launch thousands of
small kernels.
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
# In five steps it brings singular values from 0 to 1, except the smallest, to between 0.7 and 1.2.
QUINTIC = 3.4445, -4.7750, 2.0315
NUM_STEPS = 5
MIN_SIDE = 16  # smaller matrices are left to the other optimiser


def is_matrix(path: TreePath, leaf: Array) -> bool:
    """Returns whether the leaf is a matrix that Muon updates.

    Tables and convolution filters are not. Neither is the patch embedding, because its inputs are correlated.
    """
    return leaf.ndim == 2 and min(leaf.shape) >= MIN_SIDE and "embed" not in str(path[-2])


def orthogonalise(x: Float[Array, "n rows columns"]) -> Float[Array, "n rows columns"]:
    """Orthogonalises matrices approximately: Newton-Schulz steps in bfloat16, result in float32.

    The result is near the closest matrices with orthonormal rows or columns.
    """
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
    """Orthogonalises every matrix of the tree, and scales tall matrices up by sqrt(rows / columns)."""
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
    """Returns an optimiser: Muon for matrices, `rest` for other parameters.

    Args:
      learning_rate: largest singular value of a wide matrix's step; a tall matrix moves further.
      weight_decay: decay of matrices, multiplied by `learning_rate`.
      rest: the optimiser of other parameters, with its own learning rate.
    """
    matrix = optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.stateless(orthogonalise_updates),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )

    def label(keys: Any, leaf: Array) -> str:
        return "matrix" if is_matrix(names.tree_path(keys), leaf) else "rest"

    return optax.partition({"matrix": matrix, "rest": rest}, lambda tree: jax.tree_util.tree_map_with_path(label, tree))
