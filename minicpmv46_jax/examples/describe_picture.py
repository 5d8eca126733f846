"""Answers a question about a picture: `python -m minicpmv46_jax.examples.describe_picture --picture FILE`."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from minicpmv46_jax import MiniCPMV, demo
from minicpmv46_jax.scenes.picture import Picture, Shape


def drawn_picture() -> np.ndarray:
    """Returns a red star above a blue circle, uint8 [224, 224, 3]."""
    marks = Shape("star", "red", x=60, y=60, radius=30), Shape("circle", "blue", x=160, y=160, radius=30)
    return Picture(224, 224, (255, 255, 255), marks).render()


def describe(model: MiniCPMV, picture: Any, question: str) -> str:
    """Returns the model's greedy answer; `picture` is a path, URL, PIL image or uint8 [height, width, 3]."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return model.chat([{"role": "user", "content": content}], temperature=0.0, max_new_tokens=128)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default=demo.FOLDER, help="checkpoint folder or hub id (default: the demo model)")
    parser.add_argument("--picture", help="path or URL of a picture (default: two drawn shapes)")
    parser.add_argument("--question", default="What do you see?", help="the question (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype of the weights (default: the checkpoint's)")
    args = parser.parse_args(arguments)
    model = MiniCPMV.from_pretrained(args.model, dtype=args.dtype)
    print(describe(model, args.picture or drawn_picture(), args.question))


if __name__ == "__main__":
    main()
