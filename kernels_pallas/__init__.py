"""The operations that decide the model's speed, with a jnp reference and kernels for TPU and Hopper."""
