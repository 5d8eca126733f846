"""The name under which rematerialisation (`jax.checkpoint`) can save results of the operations."""

# The name (`jax.ad_checkpoint.checkpoint_name`) of the results that attention's backward passes need besides their arguments.
# They are small next to the cost of recomputing them. A policy of `jax.checkpoint_policies` saves them by this name.
SAVE_NAME = "attention"
