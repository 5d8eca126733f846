"""Low-rank adapters (LoRA, arXiv:2106.09685): a frozen matrix W is used as W + scale b a.

The sum is computed once a step, before the forward. The model therefore needs no code for adapters, any
matrix may have one, and the exported weights are exactly the trained ones. The cost is the gradient of the
whole matrix on its way to a and b: a third of the products of a full step, which a pair of thin products
beside every projection would save.
"""

import re
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from minicpmv46_jax.checkpoint.names import tree_path
from minicpmv46_jax.model import Params

TARGETS = r"text\..*(q_proj|k_proj|v_proj|o_proj|in_proj_qkv|in_proj_z|out_proj|gate_proj|up_proj|down_proj)\.weight"


class Adapter(TypedDict):
    """Trained matrices of one adapter; r is the rank."""

    a: Float32[Array, "r i"]
    b: Float32[Array, "o r"]


def init_adapters(params: Params, rank: int, targets: str = TARGETS, seed: int = 0) -> Any:
    """Returns a tree like `params` with a new adapter at every target matrix, and None elsewhere.

    Args:
      params: the model's parameters.
      rank: the adapters' rank.
      targets: regular expression for dotted paths of matrices.
      seed: seed of a; b starts at 0.

    Raises:
      ValueError: no path matches, a match is not a matrix, or the rank exceeds one of a matrix's sides.
    """
    pattern, matched = re.compile(targets), []

    def new(keys: Any, weight: Array) -> Adapter | None:
        dotted = ".".join(map(str, tree_path(keys)))
        if not pattern.fullmatch(dotted):
            return None
        if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
            raise ValueError(f"{dotted} is {weight.shape} and cannot have an adapter of rank {rank}")
        matched.append(dotted)
        key = jax.random.fold_in(jax.random.key(seed), len(matched))
        a = jax.random.normal(key, (rank, weight.shape[1])) * weight.shape[1] ** -0.5
        return Adapter(a=a, b=jnp.zeros((weight.shape[0], rank)))

    tree = jax.tree_util.tree_map_with_path(new, params)
    if not matched:
        raise ValueError(f"no parameter's name matches the targets {targets!r}")
    return tree


def merge_adapter(weight: Float[Array, "o i"], adapter: Adapter, scale: float) -> Float32[Array, "o i"]:
    """Returns W + scale b a in float32."""
    return weight.astype(jnp.float32) + scale * jnp.matmul(adapter["b"], adapter["a"], precision=jax.lax.Precision.HIGHEST)
