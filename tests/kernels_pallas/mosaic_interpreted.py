"""Stand-ins for operations that Mosaic's interpreter lacks."""

import jax
import jax.numpy as jnp


def product(a, b):
    """Computes `mosaic.product` in jnp.

    The interpreter has no wgmma with a left operand in registers.
    """
    a = a if isinstance(getattr(a, "aval", a), jax.core.ShapedArray | jax.Array) else a[...]
    return jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32), precision="highest")
