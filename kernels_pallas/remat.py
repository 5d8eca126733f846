"""What rematerialisation (`jax.checkpoint`) may keep of the operations here."""

# The name (`jax.ad_checkpoint.checkpoint_name`) of what attention's backward passes need besides their arguments: small beside
# what it costs to compute again. A policy of `jax.checkpoint_policies` keeps it by this name.
KEPT = "attention"
