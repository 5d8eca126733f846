"""Training: `python -m minicpmv46_jax.train --config run.toml`, and its parts as functions.

Given `jax`, `jnp`, `optax`, `vlm = MiniCPMV.from_pretrained(...)` and `messages` with an answer:

    # On the host, in numpy.
    markers = AnswerMarkers.from_processor(vlm.processor)     # where the chat template puts answers
    example = conversation(vlm.processor, markers, messages)  # Conversation: tokens, pictures, loss mask
    shape = BatchShape(rows=2, tokens=256)                    # static sizes: one shape is one program
    for rows in fill([example], shape):                       # several conversations in a row, in order
        batch = stack([pack(rows, shape, vlm.config.vision)])  # TrainBatch, [accumulation, devices, ...]

    # On the device: pure functions over plain trees.
    optimizer = optax.adamw(1e-3)
    trained, frozen = split(vlm.params, lambda path: path[0] == "text")  # ("text", "layers", 0, ...)
    state = new_state(trained, frozen, optimizer)             # TrainState; masters in float32
    step = jax.jit(make_step(vlm.config, optimizer, dtype=jnp.bfloat16), donate_argnums=0)
    state, metrics = step(state, batch)                       # .loss, .z_loss, .grad_norm, .learned
    params = join(state.trained, state.frozen)                # the model's tree, for convert.export.export_hf
"""

from minicpmv46_jax.train.batch import BatchShape, Conversation, TrainBatch, fill, pack, stack
from minicpmv46_jax.train.loss import summed_loss
from minicpmv46_jax.train.loss_mask import AnswerMarkers, conversation
from minicpmv46_jax.train.step import Metrics, TrainState, cast_for_compute, join, make_step, new_state, place, split

__all__ = [
    "AnswerMarkers",
    "BatchShape",
    "Conversation",
    "Metrics",
    "TrainBatch",
    "TrainState",
    "cast_for_compute",
    "conversation",
    "fill",
    "join",
    "make_step",
    "new_state",
    "pack",
    "place",
    "split",
    "stack",
    "summed_loss",
]
