"""Requests to every route: valid examples, mutated as JSON, as bytes, and in headers, methods and paths."""

import copy
import dataclasses
import functools
import json
import random
import re
from typing import Any

from tests.fuzz.run import TINY_PNG, Case, data_url, is_directed, json_case

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
COUNT, TOKENIZE, DETOKENIZE = "/v1/messages/count_tokens", "/tokenize", "/detokenize"
GETS = ("/", "/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/none", "/openapi.json", "/docs", "/scene")
LIMITS = {CHAT: "max_tokens", COMPLETIONS: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
MOST_TOKENS = 16  # longer answers are legal and slow
TWICE = "\0twice"  # ends a key that repeats another one
MARK = "\0raw:"  # begins a string that stands for JSON which `json.dumps` cannot write
_RAW = re.compile(r'"\\u0000raw:((?:[^"\\]|\\.)*)"')

NUMBERS = [0, -1, 1, 2, 2**31, 2**32, 2**63, -(2**63), 10**30, 0.5, -0.0, 5e-324, 1e39, 1e308, float("nan"), float("inf")]
RAW = ["1e999", "-1e999", "9" * 5000, "-0", "1E400", "NaN", "-Infinity", "01", "0x10"]
TEXTS = ["", " ", "\0", "\ud800", "a\udfff\ud800", "\u202e", "😀", "<|im_end|>", "<image>", "<|image_pad|>", "\r\n", "a" * 300]
TEXTS += "null data:, ../../etc/passwd http://127.0.0.1:1/ http://host:99999/ file:///etc/passwd".split() + ["é" * 3000]
CONTAINERS = [[], {}, [[]], [{}], [None], {"type": []}, {"type": {}}, {"type": None}, [1, "a", None], {"": ""}]
NAMES = ["", "\ud800", "a" * 5000, *"x type content stream max_tokens __class__ é temperatur".split()]
BYTES = [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\x00", b"\xef\xbb\xbf", b"\xf5", b"[", b'"']
METHODS = [*"GET PUT HEAD DELETE OPTIONS PATCH TRACE FOO post".split(), "P" * 300]
TAILS = [*"?a=b / // /.. /%2e%2e/ /%00 %ff ?a=%ud800 #x ; /é".split(), "?" + "a" * 5000, "/" + "b" * 9000]
CONTENT_TYPES = [b"", b"\xff", b"text/plain", b"multipart/form-data; boundary=x", b"application/json; charset=utf-16"]
CHUNK_SIZES = [b"-1", b"zz", b"f" * 17, b"1;x=y"]
HEADERS = b"Authorization X-Request-Id X-Api-Key Content-Encoding Expect Range Cookie Accept Origin Te".split()
HEADER_VALUES = [b"", b"\xff", b"\x01", b"a" * 5000, b"a, b", *b"Bearer gzip bytes=0-1 100-continue 0".split()]

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
TOOLS = [{"type": "function", "function": WEATHER}]
PICTURE = {"type": "image_url", "image_url": {"url": data_url(TINY_PNG, "image/png")}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}


def make(rng: random.Random, index: int, model: str) -> Case:
    """Returns a directed or a mutated case."""
    known = directed(model)
    return rng.choice(known) if is_directed(rng, index, len(known)) else mutated(rng, model)


@functools.cache
def examples(model: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns a valid body of every kind, with its route."""
    user = {"role": "user", "content": "Hello"}
    chat = {"model": model, "messages": [user], "max_tokens": 4}
    parts = [{"type": "text", "text": "What is it?"}, PICTURE]
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    turns = [user, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    turns.append({"role": "tool", "tool_call_id": "c1", "content": "rain"})
    message = {"model": model, "messages": [user], "max_tokens": 4}
    claude_tools = [{"name": "weather", "description": "w", "input_schema": WEATHER["parameters"]}]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    chats = [
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "stop": ["a", "b"], "logit_bias": {"65": 5}},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"n": 2, "logprobs": True, "top_logprobs": 3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"n": 3, "stream": True, "logprobs": True, "repetition_penalty": 1.1, "stop_token_ids": [5], "ignore_eos": True},
        {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]},
        {"messages": turns, "tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": False},
        {"tools": TOOLS, "tool_choice": "required", "stream": True},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}},
        {"response_format": {"type": "json_object"}, "stream": True},
        {"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 1.5},
        {"structured_outputs": {"regex": "[a-c]{2}"}, "n": 2},
        {"guided_json": schema, "guided_regex": None},
        {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 2, "include_reasoning": True},
        {"reasoning_effort": "high", "thinking_token_budget": 0, "stream": True},
        {"continue_final_message": True, "messages": [user, {"role": "assistant", "content": "He"}]},
        {"mm_processor_kwargs": {"downsample_mode": "4x", "max_slice_nums": 2}, "messages": [{"role": "user", "content": parts}]},
        {"restore_newlines": True, "user": "u", "metadata": {"a": "b"}, "store": False},
    ]
    claude = [
        {
            "system": "Be short.",
            "stop_sequences": ["x"],
            "temperature": 0.5,
            "top_k": 4,
            "top_p": 0.5,
            "metadata": {"user_id": "u"},
        },
        {"tools": claude_tools, "tool_choice": {"type": "auto"}, "stream": True},
        {"tools": claude_tools, "tool_choice": {"type": "tool", "name": "weather"}},
        {"thinking": {"type": "enabled", "budget_tokens": 2}, "stream": True},
        {"system": [{"type": "text", "text": "a"}], "messages": [{"role": "user", "content": [{"type": "text", "text": "b"}]}]},
    ]
    answers = [
        {"input": "Hello", "instructions": "Be short.", "temperature": 0.3, "metadata": {"a": "b"}, "user": "u"},
        {"input": items, "stream": True, "reasoning": {"effort": "low"}},
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "s", "schema": schema}}},
        {"input": "x", "tools": [{"type": "function", **WEATHER}], "tool_choice": "required", "parallel_tool_calls": True},
    ]
    completions = [
        {"prompt": "Once upon", "max_tokens": 4, "logprobs": 2, "echo": False, "n": 2},
        {"prompt": [72, 101, 108], "max_tokens": 4, "stream": True, "stop": "x"},
        {"prompt": "a", "max_tokens": 4, "ignore_eos": True, "best_of": 1, "logit_bias": {"65": -100}},
    ]
    return [
        *((CHAT, {**chat, **more}) for more in chats),
        *((COMPLETIONS, {"model": model, **more}) for more in completions),
        *((RESPONSES, {"model": model, "max_output_tokens": 4, **more}) for more in answers),
        *((MESSAGES, {**message, **more}) for more in claude),
        (COUNT, {"model": model, "messages": [user], "system": "s", "tools": claude_tools}),
        (TOKENIZE, {"model": model, "prompt": "Hello", "add_special_tokens": False, "return_token_strs": True}),
        (TOKENIZE, {"model": model, "messages": turns, "tools": TOOLS, "return_token_strs": True}),
        (DETOKENIZE, {"model": model, "tokens": [72, 105]}),
    ]


def nested(opening: str, depth: int, closing: str, inner: str = "") -> str:
    return MARK + opening * depth + inner + closing * depth


def odd_value(rng: random.Random) -> Any:
    """Returns a value that few fields expect."""
    kind = rng.randrange(8)
    if kind == 0:
        return MARK + rng.choice(RAW)
    if kind == 1:
        depth = rng.choice([5, 100, 400, 900, 940, 990, 1100, 100_000])
        return nested(*rng.choice([("[", depth, "]"), ('{"a":', depth, "}", "1"), ('[{"a":', depth // 2, "}]", "[]")]))
    if kind == 2:
        size = rng.choice([20, 1000, 20_000])
        return rng.choice([[0] * size, ["a"] * size, {str(i): i for i in range(size)}, "ab " * size, [[]] * size])
    return copy.deepcopy(rng.choice([NUMBERS, TEXTS, TEXTS, CONTAINERS, [None, True, False]][kind - 3]))


def dump(value: Any) -> bytes:
    """Writes JSON, not valid where a value is raw; a lone surrogate stays an escape."""
    return _RAW.sub(lambda found: found[1].replace('\\"', '"'), json.dumps(value).replace(json.dumps(TWICE)[1:-1], "")).encode()


def places(value: Any, above: tuple[Any, Any] | None = None) -> list[tuple[Any, Any]]:
    """Returns (container, key) of every value in a tree."""
    found = [] if above is None else [above]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inner in list(items) for place in places(inner, (value, key))]


def change_value(rng: random.Random, body: dict[str, Any], model: str) -> str:
    container, key = rng.choice(places(body) or [(body, "a")])
    container[key] = odd_value(rng)
    return f"odd {key}"


def drop(rng: random.Random, body: dict[str, Any], model: str) -> str:
    if not (found := places(body)):
        return "nothing to drop"
    container, key = rng.choice(found)
    del container[key]
    return f"no {key}"


def repeat(rng: random.Random, body: dict[str, Any], model: str) -> str:
    lists = [value for container, key in places(body) if isinstance(value := container[key], list) and value]
    if lists:
        chosen = rng.choice(lists)
        chosen.extend(copy.deepcopy(chosen[: rng.choice([1, 3])]) * rng.choice([1, 5, 200]))
    return "repeated items"


def add_field(rng: random.Random, body: dict[str, Any], model: str) -> str:
    objects = [body, *(value for container, key in places(body) if isinstance(value := container[key], dict))]
    chosen = rng.choice(objects)
    name = rng.choice([*NAMES, *(name + TWICE for name in chosen)])
    chosen[name] = odd_value(rng)
    return f"more {name[:20]!r}"


def swap(rng: random.Random, body: dict[str, Any], model: str) -> str:
    _, other = rng.choice(examples(model))
    for name in rng.sample(sorted(other), min(3, len(other))):
        body[name] = copy.deepcopy(other[name])
    return "foreign fields"


def toggle(rng: random.Random, body: dict[str, Any], model: str) -> str:
    body["stream"] = not body.get("stream", False)
    body["n"] = rng.choice([1, 2, 16, 17])
    return "stream and n"


CHANGES = (change_value, change_value, change_value, drop, repeat, add_field, swap, toggle)


def bounded(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Returns a body whose answer is short: a valid limit that is large, or absent, is replaced."""
    name = LIMITS.get(path)
    limit = body.get(name) if name else 0
    if limit is None or (isinstance(limit, int) and limit > MOST_TOKENS) or (isinstance(limit, str) and limit.startswith(MARK)):
        body = {**body, name: 4}
    other = body.get("max_completion_tokens")
    return {**body, "max_completion_tokens": 4} if isinstance(other, int) and other > MOST_TOKENS else body


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cuts, flips or inserts some bytes."""
    at = rng.randrange(len(data) + 1)
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + rng.choice(BYTES) + data[at:]
        case 3:
            return data[:at] + data[at // 2 :]
    return data + rng.choice([b"}", b"\x00", data, b" " * 100_000])


def change_head(rng: random.Random, case: Case) -> Case:
    """Returns a case with another method, path or header."""
    match rng.randrange(6):
        case 0:
            return dataclasses.replace(case, method=rng.choice(METHODS), label=f"method, {case.label}")
        case 1:
            return dataclasses.replace(case, path=case.path + rng.choice(TAILS), label=f"path, {case.label}")
        case 2:
            headers = ((b"Content-Type", rng.choice(CONTENT_TYPES)),)
            return dataclasses.replace(case, headers=headers, label=f"content type, {case.label}")
        case 3:
            return in_chunks(rng, case)
    number = rng.choice([1, 1, 3, 90, 300])
    added = [(rng.choice(HEADERS) + (b"%d" % i if i > 3 else b""), rng.choice(HEADER_VALUES)) for i in range(number)]
    return dataclasses.replace(case, headers=(*case.headers, *added), label=f"{number} headers, {case.label}")


def in_chunks(rng: random.Random, case: Case) -> Case:
    """Returns a case whose body is sent in chunks, some with a wrong size."""
    size = max(rng.choice([1, 3, 10_000]), len(case.body) // 2000 + 1)
    pieces = [case.body[i : i + size] for i in range(0, len(case.body), size)]
    wrong = rng.random() < 0.3
    sizes = [rng.choice(CHUNK_SIZES) if wrong else b"%x" % len(piece) for piece in pieces]
    body = b"".join(size + b"\r\n" + piece + b"\r\n" for size, piece in zip(sizes, pieces, strict=True)) + b"0\r\n\r\n"
    headers = (*case.headers, (b"Transfer-Encoding", b"chunked"))
    return dataclasses.replace(case, body=body, headers=headers, label=f"chunks, {case.label}")


def mutated(rng: random.Random, model: str) -> Case:
    """Returns a random case."""
    if rng.random() < 0.05:
        return change_head(rng, Case("GET", rng.choice(GETS)))
    path, body = copy.deepcopy(rng.choice(examples(model)))
    labels = [rng.choice(CHANGES)(rng, body, model) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
    if rng.random() < 0.05:
        path = rng.choice([path for path, _ in examples(model)])
    data = dump(bounded(path, body))
    if rng.random() < 0.15:
        data, labels = change_bytes(rng, data), [*labels, "bytes"]
    case = Case("POST", path, data, ((b"Content-Type", b"application/json"),), f"{path}: {', '.join(labels)}")
    return change_head(rng, case) if rng.random() < 0.15 else case


@functools.cache
def directed(model: str) -> list[Case]:
    """Returns cases that once got a 5xx."""
    chat = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    cases: list[tuple[str, dict[str, Any]]] = []
    for odd in ([], {}):
        content = [{"role": "user", "content": [{"type": odd}]}]
        cases += [(path, {**chat, "messages": content}) for path in (CHAT, MESSAGES, COUNT, TOKENIZE)]
        cases += [(RESPONSES, {"model": model, "input": content}), (MESSAGES, {**chat, "tool_choice": {"type": odd}})]
    for field in ("user", "metadata", "tools", "reasoning"):
        body = {"model": model, "input": "x", "max_output_tokens": 4, field: MARK + "1e999"}
        cases += [(RESPONSES, body), (RESPONSES, {**body, "stream": True})]
    system = {"role": "system", "content": [{"type": "input_text", "text": "a"}]}
    cases.append((RESPONSES, {"model": model, "input": [system, {"role": "system", "content": "b"}], "max_output_tokens": 4}))
    cases += [(COMPLETIONS, {"model": model, "prompt": "\ud800"}), (COMPLETIONS, {"model": model, "prompt": "a", "\ud800": 1})]
    cases += [
        (COMPLETIONS, {"model": model, "prompt": "a", "max_tokens": 4, "temperature": value}) for value in (MARK + "NaN", 1e39)
    ]
    cases += [(path, {**chat, "prompt": "a", "logit_bias": {"9" * 5000: 1}}) for path in (CHAT, COMPLETIONS)]
    for depth in (400, 940, 100_000):
        call = {**CALL, "function": {"name": "weather", "arguments": "[" * depth}}
        turns = [*chat["messages"], {"role": "assistant", "tool_calls": [call]}]
        cases += [(TOKENIZE, {"model": model, "messages": turns}), (CHAT, {**chat, "messages": turns})]
        deep = nested("[", depth, "]")
        cases += [(TOKENIZE, {**chat, "tools": deep}), (COUNT, {"model": model, "messages": chat["messages"], "tools": deep})]
        use = [{"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "w", "input": deep}]}]
        cases.append((COUNT, {"model": model, "messages": [*chat["messages"], *use]}))
    for argument in ("\\ud800", "1e999"):
        text = '<tool_call>\n{"name": "weather", "arguments": {"city": %s}}\n</tool_call>'
        choice = [text % (argument if argument == "1e999" else f'"{argument}"')]
        forced = {**chat, "max_tokens": 200, "tools": TOOLS, "structured_outputs": {"choice": choice}}
        cases += [(CHAT, forced), (CHAT, {**forced, "stream": True})]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    cases += [(CHAT, {**chat, "temperature": value, "structured_outputs": {"json": schema}}) for value in (1e39, 1e308, 3.5e38)]
    part = {"type": "image_url", "image_url": {"url": "http://host:99999/"}}
    cases += [
        (CHAT, {**chat, "messages": [{"role": "user", "content": [part]}]}),
        (CHAT, {**chat, "stop": [f"abc{i}" for i in range(20_000)]}),
    ]
    cases += [
        (CHAT, {**chat, "structured_outputs": {"choice": [text]}, "max_tokens": 40}) for text in ("<box>1 2</box>", "<image>")
    ]
    cases.append((CHAT, {**chat, "structured_outputs": {"regex": "<ref>[a-z]+</ref>"}, "max_tokens": 40}))
    thinking = {"chat_template_kwargs": {"enable_thinking": True}, "stream": True}
    cases += [(CHAT, {**chat, **thinking, "thinking_token_budget": budget}) for budget in (2040, 2048, 10**9, 2**63)]
    cases.append((MESSAGES, {**chat, "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x" * 10**6: 1}]}]}))
    posts = [
        Case("POST", path, dump(body), ((b"Content-Type", b"application/json"),), f"directed {path}") for path, body in cases
    ]
    surrogate = b'{"model": "%s", "prompt": "\xed\xa0\x80"}' % model.encode()
    heads = [Case("GET", "/health", b"", tuple((b"X-%d" % i, b"a") for i in range(3000)), "directed 3000 headers")]
    heads += [Case("GET", "/health", b"", ((b"X-Long", b"a" * size),), "directed long header") for size in (70_000, 2_000_000)]
    return [*posts, Case("POST", COMPLETIONS, surrogate, (), "directed surrogate bytes"), *heads]


def valid(model: str) -> list[Case]:
    """Returns the examples as they are, which must be answered."""
    return [json_case(path, body, path) for path, body in examples(model)]
