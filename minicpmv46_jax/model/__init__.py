"""The model: layers, state and batches, and the pure functions that run it on plain trees."""

from minicpmv46_jax.model.model import (
    MiniCPMV46,
    Params,
    PrefillInput,
    Schema,
    TokenBlock,
    decode_step,
    embed,
    encode,
    forward,
    init_params,
    merge,
    parameter_shapes,
    prefill,
    schema,
)

__all__ = [
    "MiniCPMV46",
    "Params",
    "PrefillInput",
    "Schema",
    "TokenBlock",
    "decode_step",
    "embed",
    "encode",
    "forward",
    "init_params",
    "merge",
    "parameter_shapes",
    "prefill",
    "schema",
]
