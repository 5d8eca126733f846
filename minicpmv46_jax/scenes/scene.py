"""A scene: pictures, and questions about them with known answers."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minicpmv46_jax.processing.video import Video
from minicpmv46_jax.scenes.picture import Clip, Picture

HELD_OUT = 16  # one scene in 16, and one printed word in 16, is held out of training
THINKING = 0.3  # share of an exam's questions with a thought that are asked with thinking


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
      group: the group of questions that its score counts in.
      question, answer: the texts of both.
      thought: the thought before the answer; "" for none.
      call: (name, arguments) of the function call that replaces the answer.
    """

    group: str
    question: str
    answer: str
    thought: str = ""
    call: tuple[str, tuple[tuple[str, str | int], ...]] | None = None

    @property
    def reply(self) -> str:
        """The answer, or the function call, in the notation that the model writes."""
        if self.call is None:
            return self.answer
        name, arguments = self.call
        body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
        return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


@dataclass(frozen=True)
class Scene:
    """Media, questions about them, and functions on offer as JSON."""

    kind: str
    media: tuple[Picture | Clip, ...]
    turns: tuple[Turn, ...]
    tools: tuple[str, ...] = ()

    @property
    def held_out(self) -> bool:
        """True for a scene of the held-out split. The hash of the media decides, not the seed."""
        return bool(self.media) and is_held_out(repr(self.media))


def is_held_out(description: str) -> bool:
    """Returns whether the hash of a description is in the held-out split, on every machine and version."""
    return hashlib.sha256(description.encode()).digest()[0] % HELD_OUT == 0


def messages(scene: Scene, turns: Sequence[Turn], answered: bool = True) -> list[dict[str, Any]]:
    """Returns a conversation for `processing.Processor`; without `answered`, the last answer is left out."""
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
    """Returns a list such as "a red circle, a blue star and a black cross"."""
    *most, last = [article(name) for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def article(name: str) -> str:
    """Returns the name after "a" or "an"."""
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def sentence(text: str) -> str:
    """Returns the text with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def exam_turn(seed: int, scene: Scene) -> tuple[Turn, bool]:
    """Returns (the scene's question in an exam, True to ask it with thinking)."""
    rng = random.Random(f"exam {seed}")
    turn = rng.choice(scene.turns)
    return turn, bool(turn.thought) and rng.random() < THINKING
