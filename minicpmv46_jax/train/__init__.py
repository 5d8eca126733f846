"""Training: `python -m minicpmv46_jax.train --config run.toml`, and each of its parts as a function.

# data, on the host: numpy only
marks = Marks.of(processor)                               # how the template marks answers
one = conversation(processor, marks, messages)            # messages with the assistant's turns -> Conversation
one = Conversation(inputs, learned)                       # or from processing.Inputs and a bool a token: is it to be said?
shape = BatchShape(rows=8, tokens=512, patches=16384, views=128, longest=256)  # one static shape, one program
for rows in fill(conversations, shape):                   # several conversations a row, in order
    batch = stack([pack(rows, shape, config.vision)])     # TrainBatch with leading axes [accumulation, devices]

# on the device: plain trees, pure functions
optimizer = optax.adamw(1e-3)
trained, frozen = split(params, lambda path: True)        # path: ("text", "layers", 0, "mlp", "up_proj", "weight")
state = new_state(trained, frozen, optimizer)             # TrainState; masters in float32
step = jax.jit(make_step(config, optimizer, dtype=jnp.bfloat16), donate_argnums=0)
state, metrics = step(state, batch)                       # metrics.loss, .z_loss, .grad_norm, .learned
params = join(state.trained, state.frozen)                # the model's tree again, for convert.export.export_hf
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
