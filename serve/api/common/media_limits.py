"""The pictures and videos of a conversation: how many there may be, and what they cost."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from minicpmv46_jax.processing import Inputs
from serve.api.common.errors import ApiError


def check_media(messages: list[dict[str, Any]], limits: Mapping[str, int]) -> None:
    """Refuses a conversation with too many pictures before any is fetched."""
    seen: Counter[str] = Counter()
    for kind, where in _media(messages):
        seen[kind] += 1
        if seen[kind] > limits.get(kind, seen[kind]):
            fault = f"{where} is {kind} number {seen[kind]}, but a request may have at most {limits[kind]}"
            raise ApiError(400, f"{fault} (--limit-mm-per-prompt)", where)


def media_costs(messages: list[dict[str, Any]], inputs: Inputs) -> list[dict[str, Any]]:
    """What each picture and video of a conversation was made into, and how many of the prompt's tokens that takes.

    `grid` is the rows and columns of an image's slices, [0, 0] where it was left whole; `views` are sizes in patches.
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
    for i, message in enumerate(messages):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            kind = str(part.get("type")).removesuffix("_url") if isinstance(part, dict) else ""
            if kind in ("image", "video"):
                yield kind, f"messages[{i}].content[{j}]"
