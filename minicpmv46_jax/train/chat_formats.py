"""Reads rows of chat data files as messages for `processing.Processor`.

A row has one of four forms, recognised by its keys:

    {"messages": [{"role": "user", "content": "<image>What is it?"}, ...], "images": ["a.jpg"]}
    {"conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", ...}], ...}
    {"conversation": [{"human": "What is it?", "assistant": "A cat."}], ...}
    {"query": ..., "response": ..., "history": [[query, response], ...]}

They are OpenAI's (and ms-swift's), LLaMA-Factory's sharegpt, ms-swift's sharegpt, and the older one of
ms-swift.

Optional keys of each form are `images` and `videos` (paths, URLs or {"path": ...}), `system`, and `tools` (a
list or JSON text). An `<image>` or `<video>` in a text stands for the next of them. Content may be a list of
OpenAI's parts instead.
Sources: LLaMA-Factory data/README.md, ms-swift docs "Custom Dataset".
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "function_call",
    "tool_call": "function_call",
    "observation": "tool",
    "tool_response": "tool",
    "tool": "tool",
}
MEDIA = re.compile(r"\n?<(image|video)>\n?")  # without the newlines around a mark: the template adds its own between parts


class ChatRow(NamedTuple):
    """A row's messages in the form that `processing.Processor` takes, and the tools offered in it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def read_row(line: str, root: Path) -> ChatRow:
    """Parses a line of a JSONL file.

    Args:
      line: its text.
      root: the folder that relative paths of media start from.

    Raises:
      ValueError: the row is malformed or a media file does not exist; the message gives the reason.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    media = {kind: _media(row, kind, root) for kind in ("image", "video")}
    given = {kind: len(sources) for kind, sources in media.items()}
    queues = {kind: iter(sources) for kind, sources in media.items()}
    messages = [_message(role, content, extra, queues, given) for role, content, extra in _turns(row)]
    for kind, queue in queues.items():
        if left := len(list(queue)):
            raise ValueError(f"{given[kind]} {kind}s, but {given[kind] - left} <{kind}> marks in the texts")
    return ChatRow(messages, _tools(row.get("tools")))


def _turns(row: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yields (role, content, other keys) of every turn, with roles as in the values of `ROLES`."""
    forms = [form for form in ("messages", "conversations", "conversation", "query") if row.get(form) is not None]
    if len(forms) != 1:
        raise ValueError(f"expected one of messages, conversations, conversation and query, found {', '.join(forms) or 'none'}")
    system = row.get("system")
    if system:
        yield "system", system, {}
    turns = row[forms[0]]
    if forms[0] == "query":
        pairs = [*(row.get("history") or []), [turns, row.get("response")]]
        turns = [{"human": query, "assistant": response} for query, response in pairs]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{forms[0]}: expected a list of objects")
    for turn in turns:
        if forms[0] in ("conversation", "query"):
            pair = [("user", turn.get("human")), ("assistant", turn.get("assistant"))]
            yield from ((role, content, {}) for role, content in pair if content is not None)
        else:
            name, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
            if name not in ROLES:
                raise ValueError(f"role {name!r} is unknown, expected one of {', '.join(ROLES)}")
            yield ROLES[name], content, {key: turn[key] for key in ("reasoning_content", "tool_calls") if key in turn}


def _message(
    role: str, content: Any, extra: Mapping[str, Any], queues: dict[str, Iterator], given: dict[str, int]
) -> dict[str, Any]:
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content)}
    if content is None and "tool_calls" in extra:
        return {"role": role, **extra}
    if isinstance(content, str):
        content = _parts(content, queues, given) if MEDIA.search(content) else content
    elif not isinstance(content, list):
        raise ValueError(f"a {role}'s text: expected a string or a list of parts, got {type(content).__name__}")
    return {"role": role, "content": content, **extra}


def _parts(text: str, queues: dict[str, Iterator], given: dict[str, int]) -> list[dict[str, Any]]:
    """Returns the parts of a text, with the next image or video in the place of each mark."""
    parts = []
    for i, part in enumerate(MEDIA.split(text)):
        if i % 2 == 0:
            parts += [{"type": "text", "text": part}] if part.strip() else []
            continue
        source = next(queues[part], None)
        if source is None:
            raise ValueError(f"more <{part}> marks in the texts than {part}s: {given[part]}")
        parts.append({"type": part, part: source})
    return parts


def _media(row: Mapping[str, Any], kind: str, root: Path) -> list[Any]:
    """Returns the paths and URLs of the row's images or videos; relative paths start from `root`."""
    found = row.get(f"{kind}s", row.get(kind))
    found = [] if found is None else found if isinstance(found, list) else [found]
    return [_source(source, kind, root) for source in found]


def _source(source: Any, kind: str, root: Path) -> str:
    if isinstance(source, dict):
        source = source.get("path", source.get("url"))
    if not isinstance(source, str) or not source:
        raise ValueError(f"{kind}s: expected paths or URLs, got {source!r}")
    if re.match(r"(https?|data|file):", source):
        return source
    path = root / source
    if not path.is_file():
        raise ValueError(f"{kind} {path} does not exist")
    return str(path)


def _calls(content: Any) -> list[dict[str, Any]]:
    """Parses LLaMA-Factory's function_call: JSON of {"name", "arguments"}, or a list of such objects."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise ValueError(f"a function_call is not valid JSON: {error}") from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    try:
        if isinstance(tools, str):
            tools = json.loads(tools) if tools.strip() else None
    except ValueError as error:
        raise ValueError(f"tools: not valid JSON: {error}") from None
    return tools or None
