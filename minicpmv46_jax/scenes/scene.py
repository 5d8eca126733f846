"""A scene: pictures, and questions about them whose answers are known."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minicpmv46_jax.processing.video import Video
from minicpmv46_jax.scenes.picture import Clip, Picture

HELD_OUT = 16  # one scene, and one printed word, in so many is kept from training

THINKING = 0.3  # of an exam's questions that can be thought about


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
      group: what it asks for, for the scores.
      thought: what to think first; "" for none.
      call: the function to call in the answer's place: (name, arguments).
    """

    group: str
    question: str
    answer: str
    thought: str = ""
    call: tuple[str, tuple[tuple[str, str | int], ...]] | None = None

    @property
    def reply(self) -> str:
        """The answer as the model writes it, a call too."""
        if self.call is None:
            return self.answer
        name, arguments = self.call
        body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
        return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


@dataclass(frozen=True)
class Scene:
    """What is shown, every question that was thought of, and the functions on offer."""

    kind: str
    media: tuple[Picture | Clip, ...]
    turns: tuple[Turn, ...]
    tools: tuple[str, ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether training never sees this scene: decided by a hash of what is shown, whatever seed led to it."""
        return bool(self.media) and is_held_out(repr(self.media))


def is_held_out(description: str) -> bool:
    """The split: by hash, so that it holds across seeds, processes and versions."""
    return hashlib.sha256(description.encode()).digest()[0] % HELD_OUT == 0


def messages(scene: Scene, turns: Sequence[Turn], answered: bool = True) -> list[dict[str, Any]]:
    """A conversation as the processor takes it; without `answered`, the last turn is left open."""
    out: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        shown = [_part(medium) for medium in scene.media] if i == 0 else []
        out.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]})
        if answered or i < len(turns) - 1:
            out.append(_assistant_message(turn))
    return out


def _part(medium: Picture | Clip) -> dict[str, Any]:
    if isinstance(medium, Clip):
        return {"type": "video", "video": Video(medium.render(), fps=1)}
    return {"type": "image", "image": medium.render()}


def _assistant_message(turn: Turn) -> dict[str, Any]:
    reply: dict[str, Any] = {"role": "assistant", "content": turn.answer}
    if turn.thought:
        reply["reasoning_content"] = turn.thought
    if turn.call is not None:
        name, arguments = turn.call
        reply["tool_calls"] = [{"type": "function", "function": {"name": name, "arguments": dict(arguments)}}]
    return reply


def listed(names: Iterable[str]) -> str:
    """ "a red circle, a blue star and a black cross"."""
    *most, last = [article(name) for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def article(name: str) -> str:
    """With "a" or "an"."""
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def exam_turn(seed: int, scene: Scene) -> tuple[Turn, bool]:
    """The one question that an exam asks of a scene, and whether the answer is to be thought about first."""
    rng = random.Random(f"exam {seed}")
    turn = rng.choice(scene.turns)
    return turn, bool(turn.thought) and rng.random() < THINKING
