"""The name under which rematerialisation (`jax.checkpoint`) can save results of the operations."""

# The `jax.ad_checkpoint.checkpoint_name` of the results that attention's backward passes need besides their
# arguments. They are small next to the cost of recomputing them, so `jax.checkpoint_policies` may save them.
SAVE_NAME = "attention"
