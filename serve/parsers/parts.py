"""What an answer is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class Content:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole tool call. `arguments` is the text of a JSON object, as OpenAI's API has it."""

    name: str
    arguments: str


Part = Reasoning | Content | ToolCall


def overlap(text: str, mark: str) -> int:
    """The longest end of `text` that is a beginning of `mark`, but not all of it."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
