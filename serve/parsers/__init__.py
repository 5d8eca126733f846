"""Parsers of a model's streamed output: reasoning, text and tool calls. Pure Python, without HTTP or jax.

- output.py: `OutputParser`, the chain of parsers for one answer. parts.py: the parts that it returns.
- reasoning.py: `<think>`. tools.py: `<tool_call>` and its end. calls.py: the two notations of a call.
- typed.py: arguments converted to the types of a tool's schema.
- newlines.py: literal backslash-n restored to line breaks.

Parsers take text in pieces of any size. The joined output depends on the text alone, not on the size of the
pieces.
"""

from serve.parsers.output import OutputParser
from serve.parsers.parts import Content, Part, Reasoning, ToolCall

__all__ = ["Content", "OutputParser", "Part", "Reasoning", "ToolCall"]
