"""Short programs that show how to use the project; each has a `--help`.

    python -m minicpmv46_jax.examples.describe_picture      # an answer about a picture, from Python
    python -m minicpmv46_jax.examples.loss_and_gradient     # the functional core, with jax.grad
    python -m minicpmv46_jax.examples.client                # a client of a running server (`python -m serve`)

The model is the small demo model that comes with the package, unless another one is given.
"""
