"""The parts of an answer: reasoning, content and tool calls."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """A piece of the reasoning that precedes the answer."""

    text: str


@dataclass(frozen=True)
class Content:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete tool call. `arguments` is the text of a JSON object, as in OpenAI's API."""

    name: str
    arguments: str


Part = Reasoning | Content | ToolCall


def partial_overlap(text: str, tag: str) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
