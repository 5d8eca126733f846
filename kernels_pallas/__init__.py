"""The operations that decide this model's speed, one folder each: a readable reference in jnp, kernels beside it."""
