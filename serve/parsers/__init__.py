"""What a model wrote, taken apart while it writes: reasoning, text, tool calls. Pure Python; knows no HTTP and no jax.

- output.py: the whole way of an answer, `OutputParser`. parts.py: what comes out.
- reasoning.py: `<think>`. tools.py: `<tool_call>` and when one has ended; calls.py: the two ways to write one.
- typed.py: arguments by a tool's schema.
- newlines.py: literal backslash-n restored to line breaks.

All of them are fed in pieces. What they give out, joined, depends on the text alone and never on how it was cut.
"""

from serve.parsers.output import OutputParser
from serve.parsers.parts import Content, Part, Reasoning, ToolCall

__all__ = ["Content", "OutputParser", "Part", "Reasoning", "ToolCall"]
