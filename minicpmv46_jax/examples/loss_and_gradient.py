"""Computes a loss and its gradient: `python -m minicpmv46_jax.examples.loss_and_gradient`.

The model is a set of pure functions over a plain tree of arrays, so jax.grad, jax.jit and optax work on it
directly. The loss here is the mean cross entropy of every token of a short conversation about a picture.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from minicpmv46_jax import MiniCPMV, demo, model
from minicpmv46_jax.examples.describe_picture import drawn_picture
from minicpmv46_jax.generation.generate import token_block
from minicpmv46_jax.model import Params, packing


def loss_and_gradient(vlm: MiniCPMV, question: str) -> tuple[Float32[Array, ""], Params]:
    """Returns the loss and its gradient, a tree like `vlm.params`."""
    graph = model.schema(vlm.config)  # static: the modules without their parameters
    content = [{"type": "image", "image": drawn_picture()}, {"type": "text", "text": question}]
    inputs = vlm.process([{"role": "user", "content": content}], max_slice_nums=1)
    ((_, views),) = packing.pack(inputs.views, vlm.config.vision.positions_per_side)
    feature_rows = vlm.generator.feature_rows(inputs, [0])  # for each token its row of the picture's features, or -1
    block = token_block(inputs.token_ids, feature_rows, len(inputs.token_ids))
    tokens, views = jax.tree.map(jnp.asarray, (block, views))

    def loss(params: Params) -> Float32[Array, ""]:
        features = model.encode(graph.vision, params["vision"], views)
        logits = model.forward(graph, params, tokens, features)[0, :-1]
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probabilities, tokens.ids[0, 1:, None], axis=1).mean()

    return jax.jit(jax.value_and_grad(loss))(vlm.params)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default=demo.FOLDER, help="checkpoint folder or hub id (default: the demo model)")
    parser.add_argument("--question", default="What do you see?", help="the question (default: %(default)s)")
    args = parser.parse_args(arguments)
    loss, gradient = loss_and_gradient(MiniCPMV.from_pretrained(args.model, dtype="float32"), args.question)
    print(f"loss {loss:.4f}")
    for part, tree in gradient.items():
        norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))
        print(f"norm of the gradient of {part}: {norm:.4f}")


if __name__ == "__main__":
    main()
