"""Limits on the images and videos of a conversation, and their cost in tokens."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from minicpmv46_jax.processing import Inputs
from serve.api.common.errors import ApiError


def check_media(messages: list[dict[str, Any]], limits: Mapping[str, int]) -> None:
    """Raises ApiError for a conversation with too many images or videos, before any is fetched.

    Args:
      messages: the conversation.
      limits: maximum number per kind, "image" and "video"; a kind that is absent has no limit.
    """
    count: Counter[str] = Counter()
    for kind, path in _media(messages):
        count[kind] += 1
        if count[kind] > limits.get(kind, count[kind]):
            message = f"{path} is {kind} number {count[kind]}, but a request may have at most {limits[kind]}"
            raise ApiError(400, f"{message} (--limit-mm-per-prompt)", path)


def media_costs(messages: list[dict[str, Any]], inputs: Inputs) -> list[dict[str, Any]]:
    """Returns the size and the prompt tokens of each image and video of a conversation.

    `pictures` is 1 for an image and the number of frames for a video. `grid` is the rows and columns of an
    image's slices, [0, 0] for an image without slices. `views` are the sizes of the source image and its
    slices, in patches.
    """
    views, images, videos = iter(inputs.views), iter(inputs.image_grids), iter(inputs.video_grids)
    costs = []
    for kind, _ in _media(messages):
        grids = [next(images)] if kind == "image" else list(next(videos))
        own = list(itertools.islice(views, sum(1 + rows * columns for rows, columns in grids)))
        cost = {"type": kind, "pictures": len(grids), "tokens": sum(view.num_tokens for view in own)}
        costs.append({**cost, "grid": list(grids[0]), "views": [list(view.grid) for view in own]})
    return costs


def _media(messages: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yields (kind, path) of each image and video."""
    for i, message in enumerate(messages):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            kind = str(part.get("type")).removesuffix("_url") if isinstance(part, dict) else ""
            if kind in ("image", "video"):
                yield kind, f"messages[{i}].content[{j}]"
